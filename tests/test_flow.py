"""The whole flow through the command line, on a tiny model, with a real Prefect server and a real MLflow database."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from configs.load import load_recipe
from flows.direct import DIRECT
from flows.pipeline import make
from tasks import result as results
from tasks.evaluate import evidence
from tasks.result import Result
from tests.models import tiny, zoo

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "prefect", "mlflow", "transformers", "matplotlib")
TEXT = " ".join(f"Sentence number {i} is about the colour of the sky, and says that it is blue." for i in range(200))


class Place:
    """A folder to run recipes in, with a TAME_HOME of its own."""

    def __init__(self, folder: Path, prefect_url: str, environment: Mapping[str, str] = os.environ) -> None:
        self.folder = folder
        self.environment = {
            **environment, "TAME_HOME": str(folder / "home"), "PREFECT_API_URL": prefect_url, "COLUMNS": "120",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def recipe(self, model: Path, **sections: Any) -> Path:
        (self.folder / "text.txt").write_text(TEXT)
        content = {
            "name": "tiny",
            "source": {"model": str(model)},
            "variants": [{"method": "nf4"}],
            "evaluate": {
                "text": {"files": [str(self.folder / "text.txt")]}, "window": 64, "max_tokens": 512,
                "speed": {"prompt_tokens": 8, "new_tokens": 2, "repeats": 1}, "samples": {"prompts": ["The"], "new_tokens": 4},
            },
            "publish": {"to": "folder"},
            **sections,
        }  # fmt: skip
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def start(self, *arguments: str | Path, code: tuple[str, ...] = ("-m", "tame")) -> "subprocess.Popen[str]":
        """Start `tame` with these arguments, or other code of Python's that takes them."""
        return subprocess.Popen(
            [sys.executable, *code, *map(str, arguments)],
            cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def tame(self, *arguments: str | Path, code: tuple[str, ...] = ("-m", "tame")) -> tuple[int, str, str]:
        process = self.start(*arguments, code=code)
        output, errors = process.communicate()
        return process.returncode, output, errors

    def run(self, recipe: Path, *arguments: str | Path) -> tuple[int, dict[str, Any], str]:
        code, output, errors = self.tame("run", recipe, "--out", self.folder / "out", *arguments)
        path = self.folder / "out" / "result.json"
        assert path.exists(), f"{output}\n{errors}"
        return code, json.loads(path.read_text()), output + errors


def made(place: Place, recipe: Path, *sets: str) -> Result:
    """The result of the same run by plain calls in this process, which takes a third of the time of the command."""
    asked = load_recipe(recipe, list(sets))
    return make(asked, place.folder / "out", results.begin(asked, None), DIRECT)


@pytest.fixture
def place(tmp_path: Path, prefect_url: str) -> Place:
    return Place(tmp_path, prefect_url)


def built(place: Place) -> dict[str, set[str]]:
    """The keys of the artifacts that are there, by kind."""
    kinds: dict[str, set[str]] = {}
    for folder in (place.folder / "home" / "artifacts").glob("[!.]*"):
        kind, key = folder.name.rsplit("-", 1)
        if kind == "plots":  # drawn again when a limit changes
            continue
        kinds.setdefault(kind, set()).add(key)
    return kinds


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """What must be equal between two runs of the same thing: digests, and metrics that are no timings."""
    timed = ("second", "peak_")
    return {
        v["name"]: (v["artifact"]["digest"], {k: m for k, m in v["metrics"].items() if not any(t in k for t in timed)})
        for v in result["variants"]
    }


class Release(NamedTuple):
    """A run of the command line, and what was there after it."""

    place: Place
    recipe: Path
    result: dict[str, Any]
    said: str
    built: dict[str, set[str]]


@pytest.fixture(scope="module")
def release(
    tmp_path_factory: pytest.TempPathFactory, prefect_url: str, environment: dict[str, str], tiny_llama: Path
) -> Release:
    """One release of nf4, for all that is asked of one; what is run after it in its place leaves it as it is."""
    place = Place(tmp_path_factory.mktemp("release"), prefect_url, environment)
    recipe = place.recipe(tiny_llama, gate={"max_mean_kl": 1.0})
    code, result, said = place.run(recipe)
    assert code == 0, said
    return Release(place, recipe, result, said, built(place))


def test_a_release_is_measured_judged_and_published(release: Release) -> None:
    result, (variant,) = release.result, release.result["variants"]
    assert variant["status"] == "published"
    assert result["source"]["commit"] is None
    for measured in [result["baseline"], variant]:
        assert {"size_bytes", "perplexity", "load_seconds", "prefill_tokens_per_second"} <= measured["metrics"].keys()
    assert {"kl_mean", "kl_p99", "top1_agreement", "perplexity_ratio_low", "bits_per_weight"} <= variant[
        "metrics"
    ].keys()
    layers = evidence.layers(variant["evidence"])
    assert {(layer.depth, layer.kind) for layer in layers} >= {(0, "self_attn.q_proj"), (1, "mlp.down_proj")}
    assert variant["metrics"]["weight_error_max"] == max(layer.error for layer in layers)
    assert variant["artifact"]["bytes"] > 0
    for told in ("✓ 1/4 ", "✓ 2/4 baseline measured ", "✓ 3/4 nf4 quantized ", " · passed", "✓ 4/4 nf4 published "):
        assert told in release.said
    assert "time      about 1 minute" in release.said
    folder = Path(variant["published"])
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "tame.json"} <= {
        p.name for p in folder.iterdir()
    }
    assert (release.place.folder / "out" / "report.html").stat().st_size > 1000


def test_a_run_that_is_cached_needs_neither_prefect_nor_mlflow_and_says_the_same(
    release: Release, tiny_llama: Path
) -> None:
    place, recipe, first = release.place, release.recipe, release.result
    program = f"import sys, tame\ntry: tame.main()\nfinally: print([m for m in {HEAVY} if m in sys.modules])"
    with_prefect = place.environment
    place.environment = {name: value for name, value in with_prefect.items() if name != "PREFECT_API_URL"}
    code, output, said = place.tame("run", recipe, "--out", place.folder / "out", code=("-c", program))
    assert code == 0, said
    assert output.splitlines()[-1] == "[]"
    assert "from the cache" in output
    assert "✓ 3/4 nf4 quantized before · measured before" in said
    assert built(place) == release.built
    again = json.loads((place.folder / "out" / "result.json").read_text())
    assert again["mlflow_run"] == first["mlflow_run"]
    assert again["variants"][0]["metrics"] == first["variants"][0]["metrics"]
    code, output, said = place.tame("run", recipe, "--out", place.folder / "out", "--json")
    assert json.loads(output)["exit_code"] == code == 0
    code, output, said = place.tame("plan", recipe, "--out", place.folder / "out")
    assert "quantized and measured: in the cache" in output
    assert "a few seconds: all of it is in the cache" in output
    listed = place.tame("cache", "list")[1]
    assert f"{tiny_llama.name} nf4" in listed
    place.environment = with_prefect


def test_what_a_changed_recipe_makes_anew(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    place, recipe, before = release.place, release.recipe, release.built
    monkeypatch.setenv("TAME_HOME", place.environment["TAME_HOME"])

    # A changed limit judges again and measures nothing; another variant is made alone.
    judged = made(place, recipe, "gate.max_mean_kl=0.0000001", "variants.1={method: fp4, double_quant: true}")
    assert judged.exit_code == 3
    assert [variant.status for variant in judged.variants] == ["rejected"] * 2
    assert built(place)["baseline"] == before["baseline"]
    assert len(built(place)["quantized"]) == len(before["quantized"]) + 1
    assert len(built(place)["scores"]) == len(before["scores"]) + 1

    # Another window measures again and quantizes nothing.
    more = built(place)
    assert made(place, recipe, "evaluate.window=32").exit_code == 0
    assert built(place)["quantized"] == more["quantized"]
    assert len(built(place)["scores"]) == len(more["scores"]) + 2


def test_one_variant_fails_alone(place: Place, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(tiny_llama, place.folder / "model"))
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name][3, 5] = torch.tensor(1e5, dtype=tensors[name].dtype)  # finite in bf16, infinite in fp16
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setenv("TAME_HOME", place.environment["TAME_HOME"])
    result = made(place, place.recipe(model, variants=[{"method": "int8"}, {"method": "nf4"}]))
    int8, nf4 = result.variants
    assert (result.exit_code, int8.status, nf4.status) == (1, "failed", "published")
    assert name in str(int8.error)
    assert len(str(int8.error).splitlines()) == 1


def test_what_cannot_be_made_of_a_model_is_found_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path, "")
    monkeypatch.setenv("TAME_HOME", place.environment["TAME_HOME"])
    model = tiny(place.folder / "model", zoo("mamba"))
    result = made(place, place.recipe(model, variants=[{"method": "nf4"}, {"method": "w4a16"}]))
    assert (result.exit_code, result.baseline) == (2, None)
    assert "its MambaMixer wants weights that are not packed" in str(result.error)
    assert built(place) == {}


def test_a_source_that_is_damaged_ends_in_one_line(place: Place, tiny_llama: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, place.folder / "model"))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, errors = place.tame("run", place.recipe(model), "--out", place.folder / "out")
    assert code == 1
    [line] = errors.splitlines()
    assert "model.safetensors" in line
    assert "truncated" in line
    assert not (place.folder / "home" / "artifacts").exists()


def test_a_text_that_cannot_be_measured_is_refused_before_anything_is_made(place: Place, tiny_llama: Path) -> None:
    recipe = place.recipe(tiny_llama)
    program = (
        "import sys, tame\n"
        "for text in (b'', b'   \\n', b'\\xff\\xfe', b'too short'):\n"
        "    open(sys.argv[1], 'wb').write(text)\n"
        "    try: tame.main(sys.argv[2:])\n"
        "    except SystemExit as ended: print(ended.code)\n"
    )
    arguments = (place.folder / "text.txt", "run", recipe, "--out", place.folder / "out")
    _, codes, errors = place.tame(*arguments, code=("-c", program))
    assert codes.split() == ["2"] * 4
    assert len(errors.splitlines()) == 4
    assert all("text.txt" in line for line in errors.splitlines())
    assert not (place.folder / "out").exists()
    assert not (place.folder / "home" / "artifacts").exists()


@pytest.mark.e2e
def test_two_runs_at_once_build_everything_once(place: Place, tiny_llama: Path) -> None:
    recipe = place.recipe(tiny_llama)
    runs = [place.start("run", recipe, "--out", place.folder / f"out{i}") for i in range(2)]
    for run in runs:
        output, errors = run.communicate()
        assert run.returncode == 0, output + errors
    first, second = (json.loads((place.folder / f"out{i}" / "result.json").read_text()) for i in range(2))
    assert numbers(first) == numbers(second)
    assert first["variants"][0]["metrics"] == second["variants"][0]["metrics"]  # timings too: measured once
    assert {kind: len(keys) for kind, keys in built(place).items() if kind in ("quantized", "baseline", "evaluation")} == {
        "quantized": 1, "baseline": 1, "evaluation": 1,
    }  # fmt: skip


def test_prefect_and_mlflow_show_the_release(release: Release, tiny_llama: Path) -> None:
    import httpx
    from mlflow import MlflowClient

    place, result = release.place, release.result
    api = httpx.Client(base_url=place.environment["PREFECT_API_URL"])
    run = api.get(f"/flow_runs/{result['prefect_run']}").json()
    assert re.fullmatch(r"tiny: use nf4 \(\d+ % smaller than the original, KL up to [\d.e-]+\) – passed", run["name"])
    assert run["state"]["type"] == "COMPLETED"
    named = {"flow_run_id": {"any_": [result["prefect_run"]]}}
    tasks = {
        task["name"]: task
        for task in api.post("/task_runs/filter", json={"flow_runs": {"id": named["flow_run_id"]}}).json()
    }
    assert {"evaluate baseline", "quantize nf4", "evaluate nf4", "gate nf4", "publish nf4"} <= tasks.keys()
    artifacts = api.post("/artifacts/filter", json={"artifacts": named}).json()
    assert "table" in {artifact["type"] for artifact in artifacts}
    mlflow = MlflowClient(f"sqlite:///{place.folder / 'home' / 'mlflow.db'}")
    runs = mlflow.search_runs([experiment.experiment_id for experiment in mlflow.search_experiments()])
    parent = next(run for run in runs if run.info.run_id == result["mlflow_run"])
    assert re.fullmatch(rf"{tiny_llama.name}: nf4 \(\d{{4}}-\d\d-\d\d \d\d:\d\d\)", parent.info.run_name)
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 2
    nf4 = next(run for run in children if "kl_mean" in run.data.metrics)
    assert nf4.data.metrics["kl_mean"] == pytest.approx(result["variants"][0]["metrics"]["kl_mean"])
