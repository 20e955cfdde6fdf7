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
from configs.schema import Evaluate, Samples, Speed, TextSource
from tasks.evaluate.task import evaluate_baseline, evaluate_variant
from tasks.store import artifacts as store
from tasks.store.digests import sha256_files
from tasks.values import Snapshot
from tests.models import tiny

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
    digest = store.digest_of(files)
    where = str(folder)
    return Snapshot(path=where, model=where, name=folder.name, revision=None, commit=None, files=files, digest=digest)


def artifacts(kind: str) -> list[str]:
    return [artifact.key for artifact in store.artifacts() if artifact.kind == kind]


def test_a_variant_is_compared_and_a_rerun_costs_nothing(tiny_llama: Path, tmp_path: Path, tame_home: Path) -> None:
    other = tiny(tmp_path / "other", seed=1)
    base, variant = snapshot_of(tiny_llama), snapshot_of(other)
    baseline = evaluate_baseline(base, SPEC)
    result = evaluate_variant(variant.path, variant.digest, "other", baseline, base, SPEC)
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
        "result = evaluate_variant(variant.path, variant.digest, 'other', baseline, base, SPEC);"
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


def test_what_was_measured_before_a_failure_is_kept(tame_home: Path) -> None:
    from tasks.evaluate.task import _build_together

    def fails_after_the_first(folders: dict[str, str]) -> None:
        (Path(folders["scores"]) / "result.json").write_text("{}")
        raise TameError("no data")

    wanted = [("scores", {"model": "a"}), ("tasks", {"model": "a"})]
    with pytest.raises(TameError, match="no data"):
        _build_together(wanted, fails_after_the_first)
    assert len(artifacts("scores")) == 1
    asked: list[list[str]] = []

    def succeeds(folders: dict[str, str]) -> None:
        asked.append(list(folders))
        for folder in folders.values():
            (Path(folder) / "result.json").write_text("{}")

    parts, cached = _build_together(wanted, succeeds)
    assert asked == [["tasks"]]
    assert parts.keys() == {"scores", "tasks"}
    assert not cached
    assert _build_together(wanted, succeeds)[1]
