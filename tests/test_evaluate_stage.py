"""The stage as the flow calls it: processes, the store, and what happens when something ends early."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from configs.errors import TameError
from configs.schema import Evaluate, Gate, Samples, Speed, TextSource
from tasks.download.text import load_text
from tasks.evaluate.task import evaluate_baseline, evaluate_variant
from tasks.gate import judge
from tasks.store import artifacts as store
from tasks.store import on_disk
from tasks.store.digests import sha256_files
from tasks.values import Checkpoint, Snapshot
from tests.models import VOCABULARY, tiny

SPEC = Evaluate(
    text=TextSource(builtin="python-docs"),
    window=64,
    max_tokens=64 * 12,
    batch_size=4,
    speed=Speed(prompt_tokens=16, new_tokens=4, repeats=1),
    samples=Samples(prompts=["import", "The"], new_tokens=8),
)
ALONE = SPEC.model_copy(update={"speed": None, "samples": None})


def snapshot_of(folder: Path) -> Snapshot:
    files = sha256_files(folder, sorted(path.name for path in folder.iterdir()))
    digest = on_disk.digest_of(files)
    where = str(folder)
    return Snapshot(path=where, model=where, name=folder.name, revision=None, commit=None, files=files, digest=digest)


def checkpoint(made: Snapshot) -> Checkpoint:
    return Checkpoint(path=made.path, digest=made.digest, label="other")


def artifacts(kind: str) -> list[str]:
    return [artifact.key for artifact in store.artifacts() if artifact.kind == kind]


def test_a_variant_is_compared_and_a_rerun_costs_nothing(tiny_llama: Path, tmp_path: Path, tame_home: Path) -> None:
    other = tiny(tmp_path / "other", seed=1)
    base, variant = snapshot_of(tiny_llama), snapshot_of(other)
    baseline = evaluate_baseline(base, SPEC)
    result = evaluate_variant(checkpoint(variant), baseline, base, SPEC)
    assert not baseline.cached
    assert not result.cached
    metrics = result.metrics
    for name in ("perplexity", "perplexity_ratio", "kl_mean", "top1_agreement"):
        assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"]
    assert metrics["perplexity_ratio"] == pytest.approx(metrics["perplexity"] / baseline.metrics["perplexity"])
    assert 0 < metrics["kl_median"] <= metrics["kl_p99"] <= metrics["kl_max"]
    for name in ("load_seconds", "peak_memory_bytes", "prefill_tokens_per_second", "decode_tokens_per_second"):
        assert metrics[name] > 0
        assert baseline.metrics[name] > 0
    assert result.protocol.model_dump()["tokens_scored"] == 12 * 63
    assert result.protocol.text.name == "python-docs"
    for sample in result.samples:
        at = sample.diverges_at
        assert at is None or sample.baseline[:at] == sample.answer[:at]
    assert [sample.prompt for sample in result.samples] == ["import", "The"]
    rows = json.loads((Path(result.path) / "windows.json").read_text())
    assert len(rows) == 12
    assert sum(row["kl"] for row in rows) / 12 == pytest.approx(metrics["kl_mean"])

    code = (
        "import sys; from tests.test_evaluate_stage import *; base = snapshot_of(Path(sys.argv[1]));"
        "variant = snapshot_of(Path(sys.argv[2])); baseline = evaluate_baseline(base, SPEC);"
        "result = evaluate_variant(checkpoint(variant), baseline, base, SPEC);"
        "assert baseline.cached and result.cached; assert not {'torch', 'transformers'} & set(sys.modules);"
        "print(result.model_dump_json())"
    )
    again = subprocess.run(
        [sys.executable, "-c", code, str(tiny_llama), str(other)], capture_output=True, text=True, check=True
    )
    assert json.loads(again.stdout)["metrics"] == metrics

    before = artifacts("scores"), artifacts("samples")
    faster = SPEC.model_copy(update={"speed": Speed(prompt_tokens=8, new_tokens=4, repeats=1)})
    assert not evaluate_baseline(base, faster).cached
    assert len(artifacts("speed")) == 3
    assert (artifacts("scores"), artifacts("samples")) == before  # what did not change was not measured again


def test_two_models_under_one_path_never_see_each_others_numbers(
    tiny_llama: Path, tmp_path: Path, tame_home: Path
) -> None:
    place = tmp_path / "model"
    shutil.copytree(tiny_llama, place)
    first = evaluate_baseline(snapshot_of(place), ALONE)
    size, stamp = (place / "model.safetensors").stat().st_size, (place / "model.safetensors").stat().st_mtime_ns
    tiny(place, seed=2)
    os.utime(place / "model.safetensors", ns=(stamp, stamp))  # same path, size and time: only the content differs
    assert (place / "model.safetensors").stat().st_size == size
    second = evaluate_baseline(snapshot_of(place), ALONE)
    assert not second.cached
    assert second.metrics["perplexity"] != first.metrics["perplexity"]
    third = snapshot_of(shutil.copytree(tiny_llama, tmp_path / "elsewhere"))
    assert evaluate_baseline(third, ALONE).cached  # the same weights at another path are the same input


def test_another_bitsandbytes_measures_quantized_models_again_and_no_others(
    tiny_llama: Path, tmp_path: Path, tame_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.evaluate import task
    from tasks.runtime.device import versions

    base = snapshot_of(tiny_llama)
    evaluate_baseline(base, ALONE)
    installed = versions()
    monkeypatch.setattr(task, "versions", lambda *more: {**installed, "bitsandbytes": "99", "accelerate": "99"})
    assert evaluate_baseline(base, ALONE).cached
    quantized = shutil.copytree(tiny_llama, tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_8bit": True}}))
    assert task._deciding_versions(quantized)["bitsandbytes"] == "99"
    monkeypatch.setattr(task, "versions", lambda *more: {**installed, "torch": "99"})
    assert not evaluate_baseline(base, ALONE).cached


def test_a_killed_evaluation_says_so_and_leaves_nothing_half_done(tiny_llama: Path, tame_home: Path) -> None:
    def kill_the_child() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.01)
        children[0].kill()

    threading.Thread(target=kill_the_child, daemon=True).start()
    with pytest.raises(
        TameError, match=r"evaluate baseline: its process was killed \(SIGKILL\), most likely for want of memory"
    ):
        evaluate_baseline(snapshot_of(tiny_llama), ALONE)
    assert not list(store.artifacts())
    assert not list((tame_home / "artifacts").glob(".partial-*"))


def test_a_part_that_fails_leaves_the_other_numbers_and_is_tried_again(tmp_path: Path, tame_home: Path) -> None:
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=128)
    base = snapshot_of(tiny(tmp_path / "base", config))
    other = snapshot_of(tiny(tmp_path / "other", config, seed=1))
    definition = "task: {}\ndataset_path: json\ndataset_kwargs: {{data_files: {{validation: {}}}}}\nvalidation_split: "
    definition += 'validation\noutput_type: multiple_choice\ndoc_to_text: {}\ndoc_to_choice: ["one", "two"]\n'
    definition += "doc_to_target: label\nmetric_list: [{{metric: acc}}]\n"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.py").write_text("import os\n\ndef end(row):\n    os.kill(os.getpid(), 9)\n")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"label": i % 2}) + "\n" for i in range(20)))
    for name, prompt in {"good": '"Say"', "broken": '"{{ no.such.column }}"', "killed": "!function own.end"}.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(definition.format(name, data, prompt))
    spec = SPEC.model_copy(
        update={
            "tasks": ["broken", "killed", "good"],
            "task_path": str(tmp_path / "tasks"),
            "speed": Speed(prompt_tokens=200, new_tokens=2, repeats=1),  # more than it has positions for
        }
    )
    baseline = evaluate_baseline(base, spec)
    result = evaluate_variant(checkpoint(other), baseline, base, spec)
    for evaluation in (baseline, result):
        assert evaluation.parts.keys() == {"scores", "samples", "tasks/good"}
        assert evaluation.metrics["task/good/items"] == 20
        assert evaluation.metrics["task/broken/items"] == 0
        assert "load_seconds" not in evaluation.metrics
        said = "\n".join(evaluation.notes)
        assert "speed was not measured: " in said
        assert "task broken was not measured: " in said
        assert "task killed was not measured: evaluate " in said
        assert "was killed (SIGKILL), most likely for want of memory" in said
    assert result.metrics["perplexity_ratio"] > 0
    assert "task/good/acc_difference" in result.metrics
    verdict = judge(result.metrics, Gate(max_task_drop=1))
    assert verdict.reasons == [f"{task} drop was not measured (limit 1)" for task in ("broken", "killed")]
    before = len(list(store.artifacts()))
    text = (tmp_path / "tasks" / "broken.yaml").read_text().replace("{{ no.such.column }}", "Say")
    good = spec.model_copy(
        update={"tasks": ["broken", "good"], "task_path": str(shutil.copytree(tmp_path / "tasks", tmp_path / "mended"))}
    )
    (tmp_path / "mended" / "broken.yaml").write_text(text)
    mended = evaluate_variant(checkpoint(other), evaluate_baseline(base, good), base, good)
    assert mended.metrics["task/broken/items"] == 20
    assert mended.metrics["perplexity"] == result.metrics["perplexity"]
    assert len(artifacts("scores")) == 2
    assert len(list(store.artifacts())) > before


def evaluate(arguments: list[str]) -> None:
    """`tame` with these arguments, in this process."""
    from tame import main

    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0


def test_tame_evaluate_measures_what_it_is_asked_for(tiny_llama: Path, tmp_path: Path, tame_home: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(load_text(TextSource(builtin="python-docs")).text[:40_000])
    asked = ["evaluate", str(tiny_llama), "--text", str(text), "--window", "64", "--max-tokens", "1280"]
    kinds = ("scores", "tasks", "speed", "samples", "layers")
    evaluate([*asked, "--json", str(tmp_path / "alone.json")])
    alone = json.loads((tmp_path / "alone.json").read_text())
    assert [len(artifacts(kind)) for kind in kinds] == [1, 0, 0, 0, 0]
    assert alone["metrics"].keys() == {"size_bytes", "perplexity", "perplexity_low", "perplexity_high"}
    assert alone["samples"] == []
    (scores,) = (artifact for artifact in store.artifacts() if artifact.kind == "scores")
    assert scores.files.keys() == {"result.json", "windows.npz"}  # nothing is kept for variants that there are none of
    evaluate([*asked, "--baseline", str(tiny_llama), "--json", str(tmp_path / "compared.json")])
    compared = json.loads((tmp_path / "compared.json").read_text())
    assert [len(artifacts(kind)) for kind in kinds] == [3, 0, 0, 0, 0]
    assert compared["metrics"]["perplexity"] == alone["metrics"]["perplexity"]
    assert compared["metrics"]["perplexity_ratio"] == 1
    assert compared["protocol"]["floor"]["windows"] == 2  # a tenth
    evaluate([*asked, "--samples", "--json", str(tmp_path / "samples.json")])
    assert [len(artifacts(kind)) for kind in kinds] == [3, 0, 0, 1, 0]
    assert len(json.loads((tmp_path / "samples.json").read_text())["samples"]) == 3
