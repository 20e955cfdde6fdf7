"""What comes of measured parts: numbers by position, what a task recovered, and what is too good or too bad to be true."""

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.schema import Evaluate, Recipe, Source, TextSource, Variant
from flows.direct import DIRECT
from flows.pipeline import make
from tasks import result as results
from tasks.download.inspection import inspect_source
from tasks.download.published_scores import PublishedScore, published_scores
from tasks.download.text import load_text
from tasks.evaluate.comparison import assemble
from tasks.evaluate.sanity import far_below
from tasks.publish.card import release_files
from tasks.report.html import render
from tasks.values import Found
from tests.hub import Hub
from tests.models import quantize
from tests.test_evaluate_stage import evaluate
from tests.test_evaluate_tasks import own_tasks

__all__ = ["own_tasks"]

SPEC = Evaluate(window=32, max_tokens=64)


def scores(folder: Path, loss: Any, kl: Any = None) -> Path:
    """The scores of a model as a part: loss, and divergence from a baseline, [windows, positions]."""
    folder.mkdir(parents=True)
    arrays = {"loss": loss.astype(np.float32)}
    if kl is not None:
        arrays |= {"kl": kl.astype(np.float32), "agree": np.ones(loss.shape, bool)}
    np.savez(folder / "windows.npz", **arrays)
    (folder / "result.json").write_text(json.dumps({"protocol": {"window": loss.shape[1] + 1}, "notes": []}))
    return folder


def compared(tmp_path: Path, ours: dict[str, Path], theirs: dict[str, Path]) -> tuple[dict[str, Any], Path]:
    out = tmp_path / "out"
    out.mkdir()
    assemble(ours, theirs, {}, SPEC, {}, out)
    return json.loads((out / "evaluation.json").read_text()), out


@pytest.mark.parametrize(
    ("length", "edges"),
    [(511, [0, 128, 256, 511]), (2048, [0, 128, 256, 512, 1024, 2048]), (16_383, [0, 2048, 8192, 16_383])],
)
def test_the_curve_by_position_is_that_of_a_plain_loop(length: int, edges: list[int], tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    before, loss, kl = (draws.gamma(2, 1, (3, length)) + np.linspace(0, shift, length) for shift in (0, 1, 2))
    theirs = scores(tmp_path / "theirs", before)
    found, out = compared(tmp_path, {"scores": scores(tmp_path / "ours", loss, kl)}, {"scores": theirs})
    curve = json.loads((out / "positions.json").read_text())
    assert [(part["from"], part["to"]) for part in curve] == list(itertools.pairwise(edges))
    for part in curve:
        here = range(part["from"], part["to"])
        of = [(float(loss[w, p]), float(kl[w, p])) for w in range(3) for p in here]
        assert part["perplexity"] == pytest.approx(np.exp(np.mean([one for one, _ in of])), rel=1e-5)
        assert part["kl_mean"] == pytest.approx(np.mean([one for _, one in of]), rel=1e-5)
    by_length = {name: value for name, value in found["metrics"].items() if "_from_" in name}
    if length < 2049:
        assert by_length == {}
    else:  # quantizing hurts first where the context is long: this is in result.json and MLflow, too
        assert list(by_length) == [f"{name}_from_{at}" for at in (0, 2048, 8192) for name in ("perplexity", "kl_mean")]
        assert by_length["kl_mean_from_8192"] == curve[2]["kl_mean"] > by_length["kl_mean_from_0"]


def task(folder: Path, right: list[int]) -> Path:
    """A task's answers as a part, of which `right` says which are right."""
    folder.mkdir(parents=True)
    rows = [
        {"doc_id": i, "doc_hash": "h", "filter": "none", "acc": float(value), "answer": value}
        for i, value in enumerate(right)
    ]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = [{"doc_id": i, "question": "?", "choices": ["a", "b"]} for i in range(len(right))]
    (folder / "own.questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    about = {"metrics": {"acc": float(np.mean(right))}, "items": len(right), "version": 1, "fewshot": 0}
    told = {"tasks": {"own": about}, "groups": {}, "protocol": {"batch_size": 1}, "notes": []}
    (folder / "result.json").write_text(json.dumps(told))
    return folder


def test_what_a_task_recovered_is_the_ratio_of_the_accuracies_with_an_interval(tmp_path: Path) -> None:
    draws = np.random.default_rng(1)
    theirs = (draws.random(400) < 0.7).astype(int)
    ours = np.where(draws.random(400) < 0.1, 0, theirs)
    found, _ = compared(
        tmp_path,
        {"tasks/own": task(tmp_path / "ours", ours.tolist())},
        {"tasks/own": task(tmp_path / "theirs", theirs.tolist())},
    )
    metrics = found["metrics"]
    name = "task/own/acc_recovery"
    assert metrics[name] == pytest.approx(ours.mean() / theirs.mean())
    resampled = []
    for _ in range(2000):  # both of the same items
        drawn = draws.integers(0, 400, 400)
        resampled.append(ours[drawn].mean() / theirs[drawn].mean())
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert (metrics[f"{name}_low"], metrics[f"{name}_high"]) == (
        pytest.approx(low, abs=0.005),
        pytest.approx(high, abs=0.005),
    )


def test_of_nothing_nothing_is_recovered(tmp_path: Path) -> None:
    parts = {"tasks/own": task(tmp_path / "ours", [0, 1])}, {"tasks/own": task(tmp_path / "theirs", [0, 0])}
    found, _ = compared(tmp_path, *parts)
    assert not [name for name in found["metrics"] if "recovery" in name]


def test_a_variant_that_is_better_than_its_baseline_is_flagged(tmp_path: Path) -> None:
    loss = np.random.default_rng(2).gamma(2, 1, (12, 31))
    worse = task(tmp_path / "theirs-task", [0] * 30 + [1] * 30)
    better = task(tmp_path / "ours-task", [1] * 55 + [0] * 5)
    theirs = {"scores": scores(tmp_path / "theirs", loss), "tasks/own": worse}
    ours = {"scores": scores(tmp_path / "ours", loss - 0.2, loss * 0 + 0.1), "tasks/own": better}
    found, _ = compared(tmp_path, ours, theirs)
    flagged = [note for note in found["notes"] if "quantizing does not do" in note]
    assert [note.partition(" than")[0] for note in flagged] == ["perplexity is lower", "task own: acc is higher"]


CARD = """---
model-index:
- name: m
  results:
  - dataset: {type: ai2_arc, config: ARC-Challenge, name: AI2 Reasoning Challenge}
    metrics: [{type: acc_norm, value: 61.5, name: normalized accuracy}]
  - dataset: {type: ybisk/piqa}
    metrics: [{type: accuracy, value: 0.8}, {type: accuracy, value: high}]
  - dataset: {type: winogrande, config: winogrande_xl}
    metrics: [{type: acc, value: 70}]
---
"""


def model(folder: Path, card: str = CARD) -> Path:
    (folder / ".eval_results").mkdir(parents=True)
    (folder / "README.md").write_text(card)
    entries = "- {dataset: {id: openai/gsm8k, task_id: gsm8k}, value: 52.1}\n"
    (folder / ".eval_results" / "gsm8k.yaml").write_text(entries)
    return folder


def test_what_is_published_is_read_from_a_card_and_from_eval_results(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    found = Found(kind="folder", name="m", path=str(folder), commit=None, files={}, config={})
    scored = {score.dataset: score for score in published_scores(Source(model=str(folder)), found)}
    assert {name: score.value for name, score in scored.items()} == {
        "ai2_arc": 0.615,
        "ybisk/piqa": 0.8,
        "winogrande": 0.7,
        "openai/gsm8k": 0.521,
    }
    assert scored["openai/gsm8k"].where == ".eval_results/gsm8k.yaml"
    (folder / "README.md").write_text("---\nmodel-index: {a: [}\n---\n")
    (folder / ".eval_results" / "gsm8k.yaml").write_text("words")
    assert published_scores(Source(model=str(folder)), found) == []


@pytest.mark.parametrize(
    ("metrics", "flagged"),
    [
        ({"task/piqa/acc": 0.55, "task/piqa/acc_high": 0.6}, "piqa: acc is 55.00 %, and at most 60.00 %, far below the 80.00 %"),
        ({"task/piqa/acc": 0.65, "task/piqa/acc_high": 0.72}, None),
        ({"task/piqa/acc": 0.5, "task/piqa/acc_norm": 0.79}, None),  # it may be the one that is meant
        ({"task/arc_challenge/acc": 0.3, "task/arc_challenge/acc_norm": 0.33}, "arc_challenge: acc_norm is 33.00 %"),
        ({"task/arc_easy/acc_norm": 0.3}, None),  # of which nothing is published
        ({"task/winogrande/acc": 0.5}, "task winogrande: acc is 50.00 %"),
        ({"task/gsm8k/exact_match,strict": 0.02, "task/gsm8k/exact_match,flexible": 0.3}, "exact_match,flexible is 30.00 %"),
        ({"perplexity": 20.0}, None),
    ],
    ids=str,
)  # fmt: skip
def test_a_baseline_far_below_its_published_score_is_flagged(
    metrics: dict[str, float], flagged: str | None, tmp_path: Path
) -> None:
    folder = model(tmp_path / "m")
    found = Found(kind="folder", name="m", path=str(folder), commit=None, files={}, config={})
    told = far_below(metrics, published_scores(Source(model=str(folder)), found))
    assert len(told) == (flagged is not None)
    assert (flagged or "") in "".join(told)


def test_a_part_of_a_benchmark_is_not_the_whole() -> None:
    of_part = PublishedScore(dataset="cais/mmlu", config="abstract_algebra", metric="acc", value=0.9, where="README.md")
    assert far_below({"task/mmlu/acc": 0.3}, [of_part]) == []
    whole = of_part.model_copy(update={"config": "all"})
    assert len(far_below({"task/mmlu/acc": 0.3}, [whole])) == 1
    gpqa = of_part.model_copy(update={"dataset": "Idavidrein/gpqa", "config": "gpqa_diamond"})
    assert len(far_below({"task/gpqa_diamond_zeroshot/acc": 0.2}, [gpqa])) == 1


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", hub.token())
        yield hub


@pytest.mark.e2e  # four stages in processes of their own
def test_a_release_says_that_its_baseline_is_far_below_what_was_published(
    tiny_llama: Path, own_tasks: Path, hub: Hub, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    (source / "README.md").write_text(CARD.replace("ybisk/piqa", "own_choice"))
    hub.add_model("org/tiny", source)
    asked = {
        "name": "flagged",
        "source": {"model": "org/tiny"},
        "variants": [{"method": "nf4"}],
        "evaluate": {
            **{"text": {"builtin": "python-docs"}, "window": 32, "max_tokens": 64, "speed": None, "samples": None},
            **{"tasks": ["own_choice"], "task_path": str(own_tasks)},
        },
    }
    recipe = Recipe.model_validate(asked)
    result = make(recipe, tmp_path / "out", results.begin(recipe, None), DIRECT, say=lambda _line: None)
    assert result.baseline is not None, result.error
    (flag,) = [note for note in result.baseline.notes if "that was published with it (README.md)" in note]
    assert flag.startswith("task own_choice: ")
    assert "far below the 80.00 %" in flag
    assert flag in render(result)
    assert f"- Of the base model, {flag}" in release_files(result, "nf4")["README.md"].decode()


@pytest.mark.e2e
def test_tame_evaluate_takes_repos_of_the_hub_on_both_sides(hub: Hub, tiny_llama: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "nf4"
    quantize(tiny_llama, theirs, Variant(method="nf4", compute_dtype="bfloat16"))
    hub.add_model("org/base", tiny_llama)
    hub.add_model("somebody/nf4", theirs)
    text = tmp_path / "text.txt"
    text.write_text(load_text(TextSource(builtin="python-docs")).text[:10_000])
    asked = ["--text", str(text), "--window", "32", "--max-tokens", "256"]
    numbers = []
    for model, base in (("somebody/nf4", "org/base"), (str(theirs), str(tiny_llama))):
        evaluate(["evaluate", model, "--baseline", base, *asked, "--json", str(tmp_path / "numbers.json")])
        numbers.append(json.loads((tmp_path / "numbers.json").read_text()))
    ours, local = numbers
    assert ours["metrics"] == local["metrics"]
    assert ours["metrics"]["kl_mean"] > 0
    assert ours["metrics"]["weight_error_mean"] > 0.05
    assert ours["name"] == "nf4"
    assert inspect_source(Source(model="somebody/nf4"), quantized=True).kind == "hub"
