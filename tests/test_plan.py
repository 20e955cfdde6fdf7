"""`tame plan` as people run it: what cannot be done is refused in one line, before anything slow is imported."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub import Hub
from tests.models import with_own_code
from tests.test_download import change

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "prefect", "mlflow", "transformers", "datasets", "lm_eval")
PROGRAM = (
    "import json, sys, tame\n"
    "try: tame.main(sys.argv[1:])\n"
    f"except SystemExit as e: print(json.dumps([e.code, [m for m in {HEAVY} if m in sys.modules]]))"
)


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def plan(tmp_path: Path, source: Path | str, *sets: str, **environment: str) -> tuple[int, list[str], str]:
    """Exit code, which of HEAVY were imported, and all that was said."""
    recipe = tmp_path / "recipe.yaml"
    text = "evaluate: {text: {builtin: python-docs}, window: 64, tasks: []}\npublish: {to: nowhere}\n"
    recipe.write_text(f"name: x\nsource: {{model: {json.dumps(str(source))}}}\nvariants: [{{method: nf4}}]\n{text}")
    changes = [argument for one in sets for argument in ("--set", one)]
    command = [sys.executable, "-c", PROGRAM, "plan", str(recipe), "--out", str(tmp_path / "out"), *changes]
    settings = {**os.environ, "TAME_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}
    done = subprocess.run(command, cwd=ROOT, env={**settings, **environment}, capture_output=True, text=True)
    code, imported = json.loads(done.stdout.splitlines()[-1])
    return code, imported, "\n".join([*done.stdout.splitlines()[:-1], *done.stderr.splitlines()])


def vlm(model: Path) -> None:
    change(model / "config.json", model_type="llava", architectures=["LlavaForConditionalGeneration"])


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
    (vlm, "it is LlavaForConditionalGeneration, which tame cannot measure: it reads images beside text"),
    (reward, "it is LlamaForSequenceClassification, which tame cannot measure: it gives scores"),
    (embedding, "it makes embeddings (modules.json says so)"),
    (llama4, "it is Llama4ForCausalLM, which tame cannot release"),
    (without_tokenizer, "it has no tokenizer"),
    (own_code, "it carries code (own_model.py)"),
]


@pytest.mark.parametrize(("damage", "said"), [*REFUSED, (unwritable, "out is a file")])
def test_a_folder_that_cannot_be_released(
    model: Path, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(model)
    code, imported, told = plan(tmp_path, model)
    assert code == (1 if damage is unwritable else 2)
    assert said in told
    assert len(told.splitlines()) == 1
    assert imported == []


@pytest.mark.parametrize(("damage", "said"), REFUSED)
def test_a_repo_that_cannot_be_released(model: Path, tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(model)
    with Hub() as hub:
        hub.add_model("org/model", model)
        publish = ("publish.to=hub", "publish.repo=me/{model}-{variant}")
        code, imported, told = plan(tmp_path, "org/model", *publish, HF_ENDPOINT=hub.url, HF_TOKEN=hub.token())
    assert code == 2
    assert said in told
    assert len(told.splitlines()) == 1
    assert imported == []
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


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
