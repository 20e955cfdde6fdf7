"""`tame plan` as people run it: what cannot be done is refused in one line, before anything slow is imported."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.schema import Variant
from tests.hub import Hub
from tests.models import with_own_code
from tests.test_download import change

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "prefect", "mlflow", "transformers", "datasets", "lm_eval")
PROGRAM = f"""
import contextlib, io, json, sys, tame
told = []
for arguments in json.load(sys.stdin):
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            tame.main(arguments)
        except SystemExit as ended:
            code = ended.code
    told.append([code, [name for name in {HEAVY} if name in sys.modules], out.getvalue() + errors.getvalue()])
print(json.dumps(told))
"""
Told = tuple[int, list[str], str]


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def plans(folder: Path, sources: list[Path | str], *sets: str, **environment: str) -> list[Told]:
    """Plan a release of each source, all in one process: exit code, which of HEAVY were imported by then, and all that was said."""
    text = "evaluate: {text: {builtin: python-docs}, window: 64, tasks: []}\npublish: {to: nowhere}\n"
    changes = [argument for one in sets for argument in ("--set", one)]
    asked = []
    for number, source in enumerate(sources):
        recipe = folder / f"recipe-{number}.yaml"
        recipe.write_text(f"name: x\nsource: {{model: {json.dumps(str(source))}}}\nvariants: [{{method: nf4}}]\n{text}")
        out = Path(source).parent / "out" if isinstance(source, Path) else folder / "out"
        asked.append(["plan", str(recipe), "--out", str(out), *changes])
    settings = {**os.environ, "TAME_HOME": str(folder / "home"), "HF_HOME": str(folder / "hf"), "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env={**settings, **environment}, input=json.dumps(asked), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    return [(code, imported, said.strip()) for code, imported, said in json.loads(done.stdout)]


def plan(folder: Path, source: Path | str, *sets: str, **environment: str) -> Told:
    (told,) = plans(folder, [source], *sets, **environment)
    return told


def vlm(model: Path) -> None:
    change(model / "config.json", model_type="blip-2", architectures=["Blip2ForConditionalGeneration"])


def reward(model: Path) -> None:
    change(model / "config.json", architectures=["LlamaForSequenceClassification"])


def embedding(model: Path) -> None:
    (model / "modules.json").write_text("[]")


def llama4(model: Path) -> None:
    change(model / "config.json", model_type="llama4_text", architectures=["Llama4ForCausalLM"])


def without_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def own_code(model: Path) -> None:
    with_own_code(model)


def unwritable(model: Path) -> None:
    (model.parent / "out").write_text("a file")


REFUSED = [
    (vlm, "it is Blip2ForConditionalGeneration, which tame cannot measure: it writes text of images alone"),
    (reward, "it is LlamaForSequenceClassification, which tame cannot measure: it gives scores"),
    (embedding, "it makes embeddings (modules.json says so)"),
    (llama4, "it is Llama4ForCausalLM, which tame cannot release"),
    (without_tokenizer, "it has no tokenizer"),
    (own_code, "it carries code (own_model.py)"),
]


def damaged(tiny_llama: Path, folder: Path, damages: list[Callable[[Path], None]]) -> dict[str, Path]:
    """A model for each damage, by the name of the damage."""
    models = {damage.__name__: folder / damage.__name__ / "model" for damage in damages}
    for damage in damages:
        damage(Path(shutil.copytree(tiny_llama, models[damage.__name__])))
    return models


def test_folders_that_cannot_be_released(tiny_llama: Path, tmp_path: Path) -> None:
    expected = [*REFUSED, (unwritable, "out is a file")]
    models = damaged(tiny_llama, tmp_path, [damage for damage, _ in expected])
    for (damage, said), (code, imported, told) in zip(expected, plans(tmp_path, list(models.values())), strict=True):
        assert code == (1 if damage is unwritable else 2), damage
        assert said in told
        assert len(told.splitlines()) == 1
        assert imported == []


def test_repos_that_cannot_be_released(tiny_llama: Path, tmp_path: Path) -> None:
    models = damaged(tiny_llama, tmp_path, [damage for damage, _ in REFUSED])
    with Hub() as hub:
        for name, model in models.items():
            hub.add_model(f"org/{name}", model)
        publish = ("publish.to=hub", "publish.repo=me/{model}-{variant}")
        names: list[Path | str] = [f"org/{name}" for name in models]
        answers = plans(tmp_path, names, *publish, HF_ENDPOINT=hub.url, HF_TOKEN=hub.token())
    for (damage, said), (code, imported, told) in zip(REFUSED, answers, strict=True):
        assert code == 2, damage
        assert said in told
        assert len(told.splitlines()) == 1
        assert imported == []
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def mixture(model: Path) -> None:
    change(model / "config.json", model_type="mixtral", architectures=["MixtralForCausalLM"], num_local_experts=4)


def tied(model: Path) -> None:
    change(model / "config.json", tie_word_embeddings=True)


def whole(_model: Path) -> None:
    """As it is."""


@pytest.mark.parametrize(
    ("damage", "variant", "said"),
    [
        (
            whole,
            "{method: w4a16, group_size: 128}",
            "128 does not divide the model's hidden_size, 64; use 64 or 32 or -1",
        ),
        (whole, "{method: w4a16, group_size: -1, calibrate: true}", "calibrate needs groups"),
        (mixture, "{method: w8a8}", "transformers loads no mixture of experts as w8a8"),
        (mixture, "{method: nvfp4}", "transformers loads no mixture of experts as nvfp4"),
        (tied, "{method: w4a16, eight_bit_modules: [lm_head]}", "the embedding under another name"),
    ],
)
def test_variants_that_cannot_be_made_of_a_model(
    damage: Callable[[Path], None], variant: str, said: str, model: Path, tmp_path: Path
) -> None:
    damage(model)
    code, imported, told = plan(tmp_path, model, f"variants=[{variant}]")
    assert (code, imported, len(told.splitlines())) == (2, [], 1), told
    assert said in told


@pytest.mark.e2e
def test_own_code_that_is_trusted_is_planned_with_its_own_tokenizer(model: Path, tmp_path: Path) -> None:
    with_own_code(model)
    code, _, told = plan(tmp_path, model, "source.trust_remote_code=true")
    assert code == 0, told
    assert "nf4" in told


def test_a_repo_is_planned_from_its_headers(model: Path, tmp_path: Path) -> None:
    (model / "handler.py").write_text("raise SystemExit")
    (model / "README.md").write_text("---\nlicense: [mit, apache-2.0]\n---\n")
    with Hub() as hub:
        hub.add_model("org/model", model)
        code, _, told = plan(tmp_path, "org/model", HF_ENDPOINT=hub.url)
    assert code == 0, told
    assert "to download" in told
    assert "of its parameters quantized" in told
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "tried"),
    [
        ({}, 0),
        ({"fit": {"max_mean_kl": 0.1}}, 2),  # all quantized, and all of it in small groups
        ({"fit": {"max_mean_kl": 0.1}, "calibrate": "fast"}, 2),
        ({"fit": {"max_mean_kl": 0.1}, "calibrate": True}, 6),  # codes are chosen for each mix
        ({"fit": {"max_bytes": "1GB"}, "calibrate": True}, 2),
    ],
)
def test_the_plan_counts_the_checkpoints_that_a_fit_tries(options: dict[str, Any], tried: int) -> None:
    from tasks.describe import _tried

    assert _tried(Variant(method="nf4", **options)) == tried
