"""A fitted variant through all stages: what is asked, what is made, and what result.json and tame.json say of it."""

import json
import re
import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from configs.errors import BadInputError
from configs.load import load_recipe
from configs.schema import Calibrate, Fit, Gate, Recipe, Source, Variant
from flows.direct import DIRECT
from flows.pipeline import make
from tasks import result as results
from tasks.download.task import download
from tasks.fit.task import fit
from tasks.fit.weights import Restorer
from tasks.publish.rederive import rederive
from tasks.report.html import render
from tests.models import quantize, tiny, zoo
from tests.test_fit import TEXT

RECIPE = """\
name: fitted
source: {model: MODEL}
variants:
  - {method: nf4}
  - {method: nf4, fit: FIT}
calibration: {text: {files: [TEXT]}, sequences: 8, length: 64}
evaluate: {text: {builtin: python-docs}, window: 64, max_tokens: 640, speed: null, samples: null}
"""


def recipe(tmp_path: Path, limit: str, *settings: str, model: Path | None = None) -> Recipe:
    path, text = tmp_path / "recipe.yaml", tmp_path / "text.txt"
    text.write_text(TEXT)
    path.write_text(RECIPE.replace("MODEL", str(model or "x/y")).replace("FIT", limit).replace("TEXT", str(text)))
    return load_recipe(path, list(settings))


@pytest.mark.parametrize(
    ("fit", "settings", "said"),
    [
        ("{max_mean_kl: 0}", [], "max_mean_kl is 0: input should be greater than 0"),
        ("{max_mean_kl: 0.1, max_bytes: 1GB}", [], "give exactly one of max_mean_kl and max_bytes; got both"),
        ("{}", [], "give exactly one of max_mean_kl and max_bytes; got neither"),
        ("{max_bytes: 1 parsec}", [], "max_bytes is '1 parsec'"),
        ("{max_bytes: 0.1B}", [], "is less than one byte; write it as 500MB or 1.2GB"),
        ("gate", [], "fit is gate, and the gate has no limit that can be fitted; give gate.max_mean_kl"),
        ("gate", ["gate.max_task_drop=0.1", "evaluate.tasks=[piqa]"], "no limit that can be fitted"),
        ("{max_mean_kl: 0.1}", ["variants.1.method=int8"], "fit belongs to nf4, fp4, w4a16 and w8a16, not to int8"),
        ("{max_mean_kl: 0.1}", ["variants.2={method: nf4, fit: {max_bytes: 1GB}}"], "give one a name"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(tmp_path: Path, fit: str, settings: list[str], said: str) -> None:
    with pytest.raises(BadInputError) as error:
        recipe(tmp_path, fit, *settings)
    assert said in str(error.value)


def test_a_mixture_of_experts_in_one_scheme_is_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.plan import preflight

    monkeypatch.setenv("TAME_HOME", str(tmp_path / "home"))
    model = tiny(tmp_path / "model", zoo("qwen3-moe"))
    asked = recipe(tmp_path, "{max_mean_kl: 0.1}", "variants.1.method=w4a16", model=model)
    with pytest.raises(
        BadInputError, match="w4a16-fit cannot be fitted, as transformers opens the experts of all layers"
    ):
        preflight(asked, tmp_path / "out")


def test_what_a_limit_is_called() -> None:
    sizes = {"1.2GB": 1_200_000_000, "125 MB": 125_000_000, "1000": 1000, "2KB": 2000}
    assert {text: Fit(max_bytes=text).bytes for text in sizes} == sizes
    assert Fit.model_validate({"max_bytes": 5000}).bytes == 5000
    variant = Variant(method="nf4", calibrate=True, fit=Fit(max_mean_kl=0.1))
    assert (variant.label, variant.unfitted.label) == ("nf4-cal-fit", "nf4-dq-cal")
    assert Variant.model_validate_json(variant.model_dump_json()) == variant
    assert not Variant(method="nf4", double_quant=False, fit="gate").double_quant
    assert not Variant(method="w8a16", fit="gate").double_quant
    assert "fit" not in Variant(method="nf4").identity
    kept = variant.keeping(["a.b"])
    assert (kept.label, kept.skip_modules, kept.fit) == ("nf4-cal-fit", ["a.b"], None)
    mixed = Variant(method="w4a16", fit="gate", skip_modules=["x"]).keeping(["a", "x"], ["b"], 64)
    assert (mixed.label, mixed.skip_modules, mixed.eight_bit_modules) == ("w4a16-fit", ["x", "a"], ["b"])
    assert (mixed.group_size, mixed.identity["eight_bit_modules"]) == (64, ["b"])
    assert "eight_bit_modules" not in variant.identity
    with pytest.raises(ValidationError):
        Variant(checkpoint="a/b", fit="gate")
    assert Gate(max_mean_kl=0.1, max_task_drop=0.2).fitted == {"max_mean_kl": 0.1}


@pytest.mark.e2e  # eight stages in processes of their own
def test_a_release_with_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAME_HOME", str(tmp_path / "home"))
    model = tiny(tmp_path / "model", spread=True)
    quantize(model, tmp_path / "nf4", Variant(method="nf4"))
    most = (tmp_path / "nf4" / "model.safetensors").stat().st_size + 25_000
    asked, out = recipe(tmp_path, f"{{max_bytes: {most}}}", "publish.to=folder", model=model), tmp_path / "out"
    lines: list[str] = []
    made = make(asked, out, results.begin(asked, None), DIRECT, say=lines.append)
    variant = made.variant("nf4-fit")
    assert variant.error is None
    assert variant.fit is not None
    assert variant.fit.taken.holds
    assert variant.fit.modules
    assert made.variant("nf4").metrics["size_bytes"] < variant.metrics["size_bytes"] <= most
    assert f"fitted to {variant.fit.limit}" in re.sub(
        r" \d+\.\d s", "", next(line for line in lines if "nf4-fit" in line)
    )
    assert any("It was fitted to weights" in note for note in variant.notes)
    assert any(entry.reason == "skip_modules of the recipe" for entry in variant.left)
    content = json.loads(results.write(made, out).read_text())
    assert content["variants"][1]["fit"]["curve"][0]["bytes"] < most
    page = render(made)
    assert "How the limits were kept" in page
    assert all(f'data-name="{name}-nf4-fit"' in page for name in ("frontier", "heat"))
    folder = Path(variant.published or "")
    told = json.loads((folder / "tame.json").read_text())
    assert told["variant"]["spec"]["skip_modules"] == variant.fit.modules
    assert rederive(str(folder), 8, str(model)).problems == []


@pytest.mark.e2e  # six stages in processes of their own
def test_two_sources_of_the_same_bytes_are_measured_apart(tiny_llama: Path, tame_home: Path, tmp_path: Path) -> None:
    dequantized = Path(shutil.copytree(tiny_llama, tmp_path / "dequantized"))
    plain = Variant(method="nf4", skip_modules=["model.layers.1", "self_attn"])
    quantize(tiny_llama, tmp_path / "nf4", plain)
    restorer = Restorer(tiny_llama, tmp_path / "nf4", plain)
    weights = load_file(tiny_llama / "model.safetensors")
    weights |= {name: restorer.weight(name, "cpu").bfloat16() for name in restorer.jobs}
    save_file(weights, dequantized / "model.safetensors", {"format": "pt"})
    variant, spec = plain.model_copy(update={"fit": Fit(max_mean_kl=5)}), Calibrate(sequences=2, length=32)
    exact, rounded = (
        fit(download(Source(model=str(folder))), variant, Gate(), spec, device="cpu")
        for folder in (dequantized, tiny_llama)
    )
    assert exact.codes_digest == rounded.codes_digest
    assert exact.taken.kl_mean is not None
    assert rounded.taken.kl_mean is not None
    assert exact.taken.kl_mean < 1e-6 < rounded.taken.kl_mean
