"""Programs that open a checkpoint: transformers in a process of its own for all tests, vLLM where it is installed."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.errors import BadInputError, TameError
from configs.schema import Recipe, Variant
from flows.direct import DIRECT
from flows.pipeline import make
from tasks import result as results
from tasks.plan import preflight
from tasks.publish.usage import serving
from tasks.quantize.command import quantize_folder
from tasks.quantize.methods import METHODS
from tasks.quantize.protocols import Request
from tasks.report.html import render
from tasks.serve.reference import Reference
from tasks.serve.runtimes import ask, versions_of
from tasks.serve.task import TIE, compare, serve
from tasks.track.mlflow_runs import _tags
from tasks.values import Checkpoint, Served, Unquantized
from tests.conftest import VLLM
from tests.test_download import change
from tests.test_flow import TEXT

ROOT = Path(__file__).parent.parent
TRIED = Served(
    runtime="vllm", title="vLLM", version="1.0", versions={"vllm": "1.0"}, device="cpu", opened=False
)  # fmt: skip
OURS = Reference(
    prompts=[[5, 6]],
    continuations=[[7, 8, 9]],
    logprobs=[[-1.0, -0.5, -2.0, -0.1]],
    likely=[[{7: -0.5, 4: -0.6}, {8: -2.0, 3: -2.1, 2: -9.0}, {9: -0.1, 1: -3.0}]],
)


def tame(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tame", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The tiny Llama in nf4."""
    out = tmp_path_factory.mktemp("served") / "nf4"
    quantize_folder(Request(source=tiny_llama, out=out, variant=Variant(method="nf4"), device="cpu"))
    return out


def a_runtime(folder: Path, probe: str) -> str:
    """A Python with transformers whose runs of the probe are `probe`, a line of shell, instead."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\ncase "$2" in *probe.py) {probe};; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


def test_a_runtime_that_computes_the_same_agrees() -> None:
    found = compare(TRIED, OURS, {"device": "cpu", "greedy": [[7, 8, 9]], "logprobs": [[-1.01, -0.5, -2.02, -0.1]]})
    assert (found.opened, found.agrees, found.same, found.answered, found.tokens, found.gap) == (True, True, 3, 3, 4, 0)
    assert found.difference == pytest.approx(0.0075)
    assert found.largest == pytest.approx(0.02)
    assert "3 of 3 tokens" in found.sentence


@pytest.mark.parametrize(("token", "agrees", "gap"), [(3, True, 0.1), (2, False, 7.0), (99, False, 7.0)])
def test_another_token_is_a_tie_or_another_model(token: int, agrees: bool, gap: float) -> None:
    answer = {"device": "cpu", "greedy": [[7, token, 9]], "logprobs": OURS.logprobs}
    found = compare(TRIED, OURS, answer)
    assert (found.agrees, found.same) == (agrees, 1)  # what follows another token answers another question
    assert found.gap == pytest.approx(gap)
    assert (gap <= TIE) is agrees


def test_other_probabilities_are_another_model() -> None:
    answer = {"device": "cpu", "greedy": OURS.continuations, "logprobs": [[-1.2, -0.5, -2.0, -0.1]]}
    assert compare(TRIED, OURS, answer).agrees
    answer["logprobs"] = [[-1.3, -0.5, -2.0, -0.1]]
    found = compare(TRIED, OURS, answer)
    assert (found.opened, found.agrees) == (True, False)
    assert "computes something else" in found.sentence


@pytest.mark.parametrize(("mean", "agrees"), [(0.29, True), (0.31, False)])
def test_a_runtime_may_be_half_as_far_again_as_transformers_in_16_bits(mean: float, agrees: bool) -> None:
    """Of formats that quantize activations, too, roundings alone make more than CLOSE."""
    ours = OURS._replace(rounding=[[0.1, 0.3, 0.2, 0.2]])
    answer = {"device": "cpu", "greedy": OURS.continuations, "logprobs": [[-1.0 - 4 * mean, -0.5, -2.0, -0.1]]}
    found = compare(TRIED, ours, answer)
    assert (found.agrees, found.rounding) == (agrees, pytest.approx(0.2))
    assert "(0.200 where transformers computes in 16 bits)" in found.sentence
    answer = {"device": "cpu", "greedy": [[7, 3, 9]], "logprobs": OURS.logprobs}
    other = ours._replace(likely=[[{7: -0.5}, {8: -2.0, 3: -2.0 - 2 * mean}, {9: -0.1}]])
    assert compare(TRIED, other, answer).agrees is agrees  # another token is a tie within two of the largest roundings


def test_numbers_that_are_not_finite_are_another_model() -> None:
    answer = {"device": "cpu", "greedy": OURS.continuations, "logprobs": [[math.nan, -0.5, -2.0, -0.1]]}
    found = Served.model_validate_json(compare(TRIED, OURS, answer).model_dump_json())
    assert (found.opened, found.agrees) == (True, False)
    assert found.sentence == "vLLM 1.0 on cpu opens it, and its log-probabilities are NaN or infinite"


@pytest.mark.parametrize(
    ("probe", "why"),
    [
        ("echo loading; kill -ILL $$", "transformers ended without an answer (SIGILL: loading)"),
        ("exit 7", "transformers ended without an answer (exit code 7)"),
        ("""echo '{"error": "ValueError: unknown quantization"}' > "$5"; exit 0""", "ValueError: unknown quantization"),
    ],
)
def test_what_a_runtime_says_or_dies_of_is_said(
    probe: str, why: str, tame_home: Path, tmp_path: Path, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAME_TRANSFORMERS", a_runtime(tmp_path, probe))
    found = serve(Checkpoint(path=str(quantized), digest="a", label="nf4"), "transformers")
    assert (found.opened, found.error) == (False, why)
    assert f"does not open it: {why}" in found.sentence


@pytest.mark.parametrize(
    "probe",
    [
        "echo loading; kill -KILL $$",
        """echo '{"error": "ValueError: Free memory on device (1/8 GiB) on startup is less than desired"}' > "$5"; exit 0""",
        """echo '{"error": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"}' > "$5"; exit 0""",
    ],
)
def test_want_of_memory_is_no_fault_of_the_checkpoint_and_not_kept(
    probe: str, tame_home: Path, tmp_path: Path, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(path=str(quantized), digest="a", label="nf4")
    monkeypatch.setenv("TAME_TRANSFORMERS", a_runtime(tmp_path, probe))
    with pytest.raises(TameError, match="free some memory, and run it again"):
        serve(checkpoint, "transformers")
    a_runtime(tmp_path, "exit 7")  # which the same question is put to again
    assert "exit code 7" in str(serve(checkpoint, "transformers").error)


@pytest.mark.e2e
def test_the_command_says_what_came_of_it(tmp_path: Path, tiny_llama: Path) -> None:
    done = tame("serve-check", tiny_llama, "--runtime", "transformers", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    [found] = json.loads(done.stdout)
    assert found["agrees"]
    done = tame("serve-check", tiny_llama, "--runtime", "transformers", TAME_TRANSFORMERS=a_runtime(tmp_path, "exit 7"))
    assert (done.returncode, done.stderr) == (0, "")  # kept: it is another Python of the same versions
    assert done.stdout.startswith("✓ transformers")


def test_a_runtime_that_is_not_there_is_refused_before_any_work(
    tame_home: Path, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = tame("serve-check", tiny_llama)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert "make vllm" in line
    assert "TAME_VLLM" in line
    change(
        Path(shutil.copytree(tiny_llama, tmp_path / "reward")) / "config.json",
        architectures=["LlamaForSequenceClassification"],
    )
    with pytest.raises(BadInputError, match="not text, and runtimes are asked for text"):
        preflight(recipe(tmp_path, tmp_path / "reward", serve=["transformers"], evaluate=None), tmp_path)
    monkeypatch.setenv("TAME_VLLM", sys.executable)
    with pytest.raises(BadInputError, match="vLLM is not installed for"):
        preflight(recipe(tmp_path, tiny_llama, serve=["vllm"]), tmp_path)


def recipe(folder: Path, model: Path, **sections: Any) -> Recipe:
    (folder / "text.txt").write_text(TEXT)
    measured = {
        "text": {"files": [str(folder / "text.txt")]},
        "window": 64,
        "max_tokens": 256,
        "speed": None,
        "samples": None,
    }
    asked = {"name": "served", "source": {"model": str(model)}, "variants": [{"method": "nf4"}], "evaluate": measured}
    return Recipe.model_validate({**asked, "publish": {"to": "folder", "repo": "served"}, **sections})


def test_a_recipe_asks_for_it_every_place_says_what_came_of_it_and_the_answer_is_kept(
    tame_home: Path, tmp_path: Path, tiny_llama: Path
) -> None:
    asked, said = recipe(tmp_path, tiny_llama, serve=["peft"]), list[str]()
    result = make(asked, tmp_path / "out", results.begin(asked, None), DIRECT, say=said.append)
    [variant] = result.variants
    assert (variant.status, variant.error) == ("published", None)
    [served] = variant.served
    assert (served.opened, served.agrees, served.steps, served.cached) == (True, True, 5, False)
    assert served.version == versions_of("peft")["peft"]
    assert served.tokens > 64
    assert served.difference < 1e-3
    assert served.first_loss
    assert served.last_loss
    assert served.last_loss < served.first_loss - 0.01
    assert any(f"opened by PEFT {served.version}" in line for line in said)
    card = (Path(str(variant.published)) / "README.md").read_text()
    assert f"LoraConfig(target_modules='all-linear'))`. **Tried**: {served.sentence}." in card
    assert "vllm serve served`. The format is made for it; tame has not tried it" in card
    assert json.loads((Path(str(variant.published)) / "tame.json").read_text())["served"][0]["agrees"]
    assert served.sentence in render(result)
    assert _tags(result, variant)["served.peft"] == served.sentence
    assert variant.artifact
    again = serve(Checkpoint(path=variant.artifact.path, digest=variant.artifact.digest, label="another"), "peft")
    assert again == served.model_copy(update={"cached": True})


def test_a_program_that_cannot_open_it_is_not_recommended() -> None:
    for method, variant in ((name, Recipe.model_validate(
        {"name": "a", "source": {"model": "me/a"}, "variants": [{"method": name}]}
    ).variants[0]) for name in METHODS):  # fmt: skip
        text = METHODS[method].card(variant)
        refused = TRIED.model_copy(update={"error": "ValueError: no kernel"})
        assert any(home.runtime == "vllm" for home in text.homes), method
        [_, lines] = serving("me/a", text, [refused])
        assert "not with these files" in lines
        assert "vllm serve" not in lines
        [_, lines] = serving("me/a", text, [TRIED.model_copy(update={"opened": True, "agrees": True})])
        assert "`vllm serve me/a`. **Tried**: vLLM 1.0 on cpu opens it" in lines
        reason = "fused expert weights"
        experts = Unquantized(module="model.layers.*.mlp.experts.down_proj", tensors=1, parameters=1, reason=reason)
        [_, lines] = serving("me/a", text, [], [experts])
        assert ("vllm serve" in lines) == (method not in ("int8", "nf4", "fp4")), method


@pytest.mark.e2e
@pytest.mark.parametrize("method", ["nf4", "int8", "w4a16", "w8a8", "fp8", "mxfp4"])
def test_vllm_opens_it_or_its_error_is_said(method: str, tmp_path: Path, tiny_llama: Path) -> None:
    if not Path(VLLM).is_file():
        pytest.skip(f"there is no vLLM at {VLLM}: make vllm")
    assert tame("quantize", tiny_llama, tmp_path / method, "--method", method).returncode == 0
    done = tame("serve-check", tmp_path / method, "--json", TAME_VLLM=VLLM)
    assert done.stderr == ""
    [found] = json.loads(done.stdout)
    assert found["agrees"] if found["opened"] else found["error"]


SAME: dict[str, Any] = {"device": "cpu", "greedy": OURS.continuations, "logprobs": OURS.logprobs}


@pytest.mark.parametrize(
    ("more", "agrees", "says"),
    [
        ({"losses": [2.5, 2.6, 1.25]}, True, "opens it: 3 of 3"),
        ({"losses": [2.5, 2.0, 1.25]}, True, "; a LoRA on it learns: loss 2.500 → 1.250 in 2 steps"),
        ({"losses": [2.5, 2.0, 2.5]}, False, "; but a LoRA on it does not learn: loss 2.500 → 2.500 in 2 steps"),
        ({"losses": [2.5, math.nan, 2.0]}, False, "; but a LoRA on it does not train: its loss is NaN or infinite"),
        ({"error": "ValueError: no gradient"}, False, "; but a LoRA on it does not train: ValueError: no gradient"),
    ],
)
def test_what_trains_must_also_learn(more: dict[str, Any], agrees: bool, says: str) -> None:
    trained = TRIED.model_copy(update={"runtime": "peft", "title": "PEFT"})
    found = Served.model_validate_json(compare(trained, OURS, SAME | more).model_dump_json())
    assert (found.opened, found.agrees) == (True, agrees)
    assert says in found.sentence
    other = SAME | more | {"logprobs": [[-1.3, -0.5, -2.0, -0.1]]}
    assert compare(trained, OURS, other).sentence == compare(TRIED, OURS, other).sentence.replace("vLLM", "PEFT")


def test_a_crash_while_it_trains_leaves_its_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dying = f"echo '{json.dumps(SAME)}' > \"$5\"; kill -ILL $$"
    monkeypatch.setenv("TAME_PEFT", a_runtime(tmp_path, dying))
    assert ask("peft", {}) == SAME | {"error": "PEFT ended without an answer (SIGILL)"}
    monkeypatch.setenv("TAME_PEFT", a_runtime(tmp_path, dying.replace("ILL", "KILL")))
    with pytest.raises(TameError, match="free some memory, and run it again"):
        ask("peft", {})


def test_the_card_promises_no_training_that_failed() -> None:
    failed = TRIED.model_copy(
        update={"runtime": "peft", "title": "PEFT", "opened": True, "untrained": "ValueError: no"}
    )
    [_, lines] = serving("me/a", METHODS["nf4"].card(Variant(method="nf4")), [failed])
    assert "(QLoRA): **not with these files.** PEFT 1.0 on cpu opens it" in lines
    assert "does not train: ValueError: no." in lines
    assert "get_peft_model" not in lines


def test_a_peft_that_is_not_there_is_refused_with_what_to_install(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setenv("TAME_PEFT", str(bare))
    with pytest.raises(BadInputError) as refused:
        preflight(recipe(tmp_path, tiny_llama, serve=["peft"]), tmp_path)
    assert str(refused.value) == (
        f"serve peft: PEFT is not installed for {bare}; run `pip install peft==0.21.2` in tame's environment, or let TAME_PEFT "
        "name the Python of an environment that has it"
    )
    assert '"peft==0.21.2"' in (ROOT / "pyproject.toml").read_text()  # the version that all of this is tested with


@pytest.mark.e2e
@pytest.mark.parametrize("method", ["nf4", "fp4", "int8", "w4a16", "w8a8", "fp8", "mxfp4"])
def test_peft_trains_on_it_or_its_error_is_said(method: str, tmp_path: Path, tiny_llama: Path) -> None:
    assert tame("quantize", tiny_llama, tmp_path / method, "--method", method).returncode == 0
    done = tame("serve-check", tmp_path / method, "--runtime", "peft", "--json")
    assert done.stderr == ""
    [found] = json.loads(done.stdout)
    assert found["opened"]
    assert found["agrees"] is (method in ("nf4", "fp4", "int8"))
    expected = "no gradient passes through" if method in ("w8a8", "fp8") else "no attribute 'weight'"
    assert found["agrees"] or expected in found["untrained"]
