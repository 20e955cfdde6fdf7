"""Fitted variants: the arithmetic of choosing, the walk against the whole model, and what comes of a limit."""

import itertools
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import BadInputError, TameError
from configs.schema import Calibrate, CalibrationSource, Fit, Gate, Source, Variant
from tasks.fit.allocate import Choice, best_within, frontier, predicted, smallest_keeping, smallest_within
from tasks.fit.limits import Limits, Measure
from tasks.fit.search import WHOLE
from tasks.fit.table import Table
from tasks.fit.walk import Walk, growth
from tasks.fit.weights import Restorer
from tasks.fitted import FitGroup
from tasks.quantize.methods import described_by, method_of
from tasks.values import Calibration, Snapshot
from tests.models import quantize, tiny, zoo


def drawn(seed: int, count: int, choices: int = 2) -> list[list[Choice]]:
    """Groups whose choices are larger and better one after the other, and some that are not."""
    draw = random.Random(seed)
    groups = []
    for _ in range(count):
        sizes = sorted(draw.randint(10, 100) for _ in range(choices))
        damage = sorted((draw.random() for _ in range(choices - 1)), reverse=True)
        if draw.random() < 0.2:
            draw.shuffle(damage)
        groups.append(list(zip(sizes, [*damage, 0.0], strict=True)))
    return groups


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("choices", [2, 3])
def test_a_mix_fits_and_no_other_is_better(seed: int, choices: int) -> None:
    groups = drawn(seed, 7, choices)
    every = [(sum(c[0] for c in mix), sum(c[1] for c in mix)) for mix in itertools.product(*groups)]
    for most in range(min(size for size, _ in every), max(size for size, _ in every), 23):
        found = best_within(groups, most)
        assert found is not None
        assert found.bytes == sum(group[i][0] for group, i in zip(groups, found.chosen, strict=True)) <= most
        assert found.sum == pytest.approx(sum(group[i][1] for group, i in zip(groups, found.chosen, strict=True)))
        assert found.sum <= min(total for size, total in every if size <= most) + 1e-9
        smallest = smallest_within(groups, found.sum + 1e-3)
        assert smallest is not None
        assert smallest.sum <= found.sum + 1e-3
        assert smallest.bytes <= min(size for size, total in every if total <= found.sum + 1e-4)
    assert best_within(groups, min(size for size, _ in every) - 1) is None
    assert smallest_within(groups, min(total for _, total in every) - 1e-6) is None


@pytest.mark.parametrize("seed", range(10))
def test_the_frontier_grows_by_what_buys_most_and_ends_at_no_damage(seed: int) -> None:
    points = frontier(drawn(seed, 12, 3))
    slopes = [(a.sum - b.sum) / max(b.bytes - a.bytes, 1) for a, b in itertools.pairwise(points)]
    assert all(a.bytes <= b.bytes and a.sum > b.sum for a, b in itertools.pairwise(points))
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(slopes))
    assert points[-1].sum == pytest.approx(0)


def test_a_prediction_goes_through_what_was_measured() -> None:
    assert [predicted(total, [(10.0, 5.0)]) for total in (0, 2, 20)] == pytest.approx([0, 1, 10])
    measured = [(1.0, 1.0), (4.0, 16.0), (8.0, 32.0)]
    assert [predicted(total, measured) for total in (0.5, 1, 2, 4, 6, 8, 16)] == pytest.approx(
        [0.25, 1, 4, 16, 24, 32, 64]
    )
    measured = [(10.0, 5.0), (4.0, 1.0)]
    groups = [[(10, 4.0), (20, 0.0)], [(10, 6.0), (30, 0.0)]]
    taken = smallest_keeping(groups, 1.0, measured)
    assert taken is not None
    assert (taken.bytes, taken.sum) == (40, 4.0)
    assert smallest_keeping([[(10, 4.5)]], 1.0, measured) is None


def table(limits: Limits, whole: float = 0.4, count: int = 40, seed: int = 0) -> Table:
    groups = [
        FitGroup(block=i, modules=[f"layers.{i}.{name}"], bits=[4, 16], bytes=[size, 4 * size], kl=[kl, 0.0])
        for i in range(count)
        for name, size, kl in [("q", 1000 + 10 * i, random.Random(seed + i).random() / count)]
    ]
    size = sum(group.bytes[0] for group in groups) + 5000
    return Table(groups, size, Measure((whole, 0.9 * whole, 1.1 * whole), (0.1, 0, 0.2), (0.8, 0.7, 0.9)), limits)


@pytest.mark.parametrize("bend", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("limit", [0.02, 0.1, 0.3])
def test_the_search_ends_with_the_smallest_mix_that_holds(bend: float, limit: float) -> None:
    """Whatever the true damage is of a sum, at most five mixes are measured, and the last but one or better is taken."""
    whole = table(Limits(max_mean_kl=limit))
    everything = whole.measured[0][0].sum
    asked = []

    def measure(point: Any) -> Measure:
        asked.append(point)
        kl = 0.4 * (point.sum / everything) ** bend
        return Measure((kl, 0.9 * kl, 1.1 * kl), (0, 0, 0), (1, 1, 1))

    found = whole.fit(measure)
    assert 1 <= len(asked) <= 5
    assert found["taken"]["holds"]
    assert 0.75 * limit < found["taken"]["kl_mean_high"] <= limit
    assert found["error"] == pytest.approx(
        sum(abs(p["predicted"] - p["kl_mean"]) / p["kl_mean"] for p in found["measured"][1:]) / len(asked)
    )
    assert len(found["modules"]) == found["taken"]["kept"]
    assert "a megabyte" in found["next"]


def test_what_no_mix_keeps_is_refused_with_the_best_that_is_possible() -> None:
    def never(_: Any) -> Measure:
        raise AssertionError("measured")

    with pytest.raises(
        BadInputError, match=r"weights ≤ 0.001 MB: no mix fits; with all quantized the weights take .* MB, with KL"
    ):
        table(Limits(max_bytes=1000)).fit(never)
    with pytest.raises(
        BadInputError, match=r"KL ≤ 1e-09: no mix keeps it; the one with the least damage quantizes layers"
    ):
        table(Limits(max_mean_kl=1e-9)).fit(never)
    with pytest.raises(BadInputError, match=r"the model takes .* MB as it is"):
        table(Limits(max_bytes=10**9)).fit(never)
    with pytest.raises(TameError, match=r"none of \d measured mixes keeps it"):
        table(Limits(max_mean_kl=0.1)).fit(lambda _: Measure((1, 1, 1), (0, 0, 0), (1, 1, 1)))
    kept = table(Limits(max_mean_kl=0.5)).fit(never)
    assert kept["modules"] == []
    assert kept["taken"]["name"] == "all quantized"


def test_a_gate_limits_by_its_worst() -> None:
    found = Measure(kl=(0.1, 0.09, 0.12), loss=(0.02, 0.01, 0.04), agreement=(0.9, 0.85, 0.95))
    assert found.damage(Limits(max_mean_kl=0.06)) == pytest.approx(2)
    assert found.damage(Limits(max_mean_kl=0.06, min_top1_agreement=0.95)) == pytest.approx(3)
    assert found.damage(Limits(max_perplexity_increase=0.01)) == pytest.approx(math.expm1(0.04) / 0.01)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3-moe"])
def test_the_walk_gives_the_divergences_of_the_whole_model(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source, variant = tiny(tmp_path / "model", zoo(name), spread=True), Variant(method="nf4")
    quantize(source, tmp_path / "out", variant)
    restorer = Restorer(source, tmp_path / "out", variant)
    ids = torch.randint(1, 500, (3, 24), generator=torch.Generator().manual_seed(0))
    walk = Walk(source, ids, set(restorer.jobs), [lambda weight: restorer.weight(weight, "cpu")], "cpu")
    alone = walk.each_alone(lambda *_: None, "it")
    names = [name for group, _, _ in alone for name in group.weights]
    assert sorted(names) == sorted(restorer.jobs)
    (everything,) = walk.measure([dict.fromkeys(names, 0)], lambda *_: None, "it")
    (_, _, whole), *without = walk.without(lambda *_: None, "it")
    assert [group for group, _, _ in without] == [group for group, _, _ in alone]

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        original = model(ids).logits[:, :-1].double().log_softmax(-1)

        def diverged(weights: Any) -> torch.Tensor:
            before = {weight: model.get_parameter(weight).data for weight in weights}
            for weight in weights:
                restored = restorer.weight(weight, "cpu")
                transposed = name == "gpt2"
                model.get_parameter(weight).data = restored.T.contiguous() if transposed else restored
            ours = model(ids).logits[:, :-1].double().log_softmax(-1)
            for weight, tensor in before.items():
                model.get_parameter(weight).data = tensor
            return (original.exp() * (original - ours)).sum(-1).mean(-1)

        for group, _, found in alone[-4:]:
            assert torch.allclose(found.kl, diverged(group.weights), rtol=2e-3, atol=1e-9)
        for group, _, found in without[:2] + without[-2:]:
            rest = [weight for weight in names if weight not in group.weights]
            assert torch.allclose(found.kl, diverged(rest), rtol=2e-3, atol=1e-9)
        for found in (everything, whole):
            assert torch.allclose(found.kl, diverged(names), rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "gemma2", "gpt2"])
def test_single_groups_are_compared_on_the_likely_tokens(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    from tasks.fit import walk as walks

    monkeypatch.setattr(walks, "LIKELY", 100)
    source = tiny(tmp_path / "model", zoo(name), spread=True)
    quantize(source, tmp_path / "out", Variant(method="nf4"))
    restorer = Restorer(source, tmp_path / "out", Variant(method="nf4"))
    ids = torch.randint(1, 500, (3, 24), generator=torch.Generator().manual_seed(0))
    walk = Walk(source, ids, set(restorer.jobs), [lambda weight: restorer.weight(weight, "cpu")], "cpu")
    group, _, found = walk.each_alone(lambda *_: None, "it")[-1]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        original = model(ids).logits[:, :-1].double()
        for weight in group.weights:
            restored = restorer.weight(weight, "cpu")
            model.get_parameter(weight).data = restored.T.contiguous() if name == "gpt2" else restored
        ours = model(ids).logits[:, :-1].double()
    for window in range(3):
        likely = original[window].softmax(-1).sum(0).topk(100).indices
        p, q = (logits[window][:, likely].log_softmax(-1) for logits in (original, ours))
        assert float(found.kl[window]) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=2e-3)
    (everything,) = walk.measure([dict.fromkeys(group.weights, 0)], lambda *_: None, "it")
    assert bool((everything.agreement <= 1).all())
    p, q = original.log_softmax(-1), ours.log_softmax(-1)
    assert everything.kl.mean() == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=2e-3)


TEXT = "".join(
    f"Chapter {i}. It was {i * 7 % 13} o'clock, and the {i % 5}th rain fell on {i * i % 97} roofs.\n"
    for i in range(900)
)


def to_fit(folder: Path, calibrate: Any) -> tuple[Snapshot, Calibrate, Calibration | None]:
    """A tiny model whose layers differ, the text to fit on, and its sequences for a variant that is calibrated."""
    from tasks.calibrate.task import calibrate as sequences
    from tasks.download.inspection import inspect_source
    from tasks.download.task import download

    (folder / "text.txt").write_text(TEXT)
    source = Source(model=str(tiny(folder / "model", spread=True)))
    snapshot = download(source, inspect_source(source))
    spec = Calibrate(text=CalibrationSource(files=[str(folder / "text.txt")]), sequences=8, length=64)
    return snapshot, spec, sequences(snapshot, spec, "codes") if calibrate else None


@pytest.mark.parametrize("calibrate", [False, "fast", True])
def test_a_limit_becomes_a_checkpoint_that_keeps_whole_groups(
    calibrate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import safe_open

    from tasks.fit import task
    from tasks.quantize.task import quantize as stage

    monkeypatch.setenv("TAME_HOME", str(tmp_path / "home"))
    snapshot, spec, calibration = to_fit(tmp_path, calibrate)
    asked = Variant(method="nf4", calibrate=calibrate, fit=Fit(max_bytes="200KB"))
    size = stage(snapshot, asked.unfitted, calibration, device="cpu")
    most = sum(p.stat().st_size for p in Path(size.path).glob("*.safetensors")) + 20_000
    asked = asked.model_copy(update={"fit": Fit(max_bytes=str(most))})

    fitted = task.fit(snapshot, asked, Gate(), spec, calibration, device="cpu")
    assert [group.kind for group in fitted.groups] == 2 * [
        "q_proj+k_proj+v_proj",
        "o_proj",
        "gate_proj+up_proj",
        "down_proj",
    ]
    assert fitted.modules
    assert fitted.taken.bytes <= most
    kept, small = set(fitted.modules), set(fitted.in_small_groups)
    assert small
    assert "have 32 weights to a scale" in fitted.sentence
    assert not kept & small
    for group in fitted.groups:
        assert group.bits == [4, 4, 16]
        assert group.bytes == sorted(group.bytes)
        assert all(names.isdisjoint(group.modules) or names.issuperset(group.modules) for names in (kept, small))

    made = stage(snapshot, asked, calibration, fitted, device="cpu")
    weights = Path(made.path) / "model.safetensors"
    assert fitted.taken.bytes - 20_000 < weights.stat().st_size <= fitted.taken.bytes
    config = json.loads((Path(made.path) / "config.json").read_text())["quantization_config"]
    skipped = set(config["llm_int8_skip_modules"])
    assert kept <= skipped
    fused = {"v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}  # what vLLM calls them
    assert all(re.sub(part, fused[part], name) in skipped for name in kept for part in fused if part in name)
    described = described_by(config)
    assert described is not None
    assert (
        kept
        <= set(described[1].skip_modules)
        <= skipped - {name for name in skipped if "qkv" in name or "gate_up" in name}
    )
    with safe_open(weights, "pt") as file, safe_open(Path(fitted.codes) / "model.safetensors", "pt") as all_of_it:
        for name in file.keys():  # noqa: SIM118
            module = name.partition(".weight")[0]
            if module in kept:
                assert file.get_tensor(name).dtype == torch.bfloat16
            elif module not in small or calibrate is True:
                assert torch.equal(file.get_tensor(name), all_of_it.get_tensor(name))
            elif name.endswith(".absmax"):
                assert len(file.get_tensor(name)) == 2 * len(all_of_it.get_tensor(name))
    # In bf16, in which transformers opens it, weights are rounded.
    assert told_by_the_model(made.path, snapshot, spec, asked) == pytest.approx(fitted.taken.kl_mean, rel=0.03)
    assert stage(snapshot, asked, calibration, fitted, device="cpu").cached
    # Codes that undo what others did are chosen again for the mix: more than what stays in 16 bits differs from all quantized.
    assert (fitted.codes == size.path) == (calibrate is not True)

    monkeypatch.setattr(task, "sensitivities", None)  # not run again
    curve = [point for point in fitted.curve if point.kept == 4]
    again = asked.model_copy(update={"fit": Fit(max_mean_kl=float(curve[0].predicted or 0) * 1.2)})
    other = task.fit(snapshot, again, Gate(), spec, calibration, device="cpu")
    assert other.groups == fitted.groups
    assert other.taken.holds
    assert task.fit(snapshot, again, Gate(), spec, calibration, device="cpu").cached


@pytest.mark.parametrize(
    "calibrate", [False, *(pytest.param(level, marks=pytest.mark.e2e) for level in ("fast", True))]
)
def test_a_mix_of_4_8_and_16_bits(calibrate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of compressed-tensors: the least sizes are bought with 8 bits, and what is measured is what transformers opens."""
    from safetensors import safe_open

    from tasks.fit import task
    from tasks.quantize.task import quantize as stage

    monkeypatch.setenv("TAME_HOME", str(tmp_path / "home"))
    snapshot, spec, calibration = to_fit(tmp_path, calibrate)
    asked = Variant(method="w4a16", calibrate=calibrate, fit=Fit(max_bytes="200KB"))
    whole = stage(snapshot, asked.unfitted, calibration, device="cpu")
    most = sum(p.stat().st_size for p in Path(whole.path).glob("*.safetensors")) + 25_000
    asked = asked.model_copy(update={"fit": Fit(max_bytes=str(most))})

    fitted = task.fit(snapshot, asked, Gate(), spec, calibration, device="cpu")
    assert all(group.bits == [4, 8, 16] and group.bytes == sorted(group.bytes) for group in fitted.groups)
    assert all(group.kl[1] < 0.02 * group.kl[0] for group in fitted.groups if group.kl[0] > 0)
    assert fitted.in_8_bits
    assert fitted.group_size == 64
    assert fitted.taken.in_8_bits > 0
    assert "are in 8" in fitted.sentence
    kept, eight = set(fitted.modules), set(fitted.in_8_bits)
    assert not kept & eight
    for group in fitted.groups:
        assert all(names.isdisjoint(group.modules) or names.issuperset(group.modules) for names in (kept, eight))

    made = stage(snapshot, asked, calibration, fitted, device="cpu")
    weights = Path(made.path) / "model.safetensors"
    assert fitted.taken.bytes - 20_000 < weights.stat().st_size <= most
    described = described_by(json.loads((Path(made.path) / "config.json").read_text())["quantization_config"])
    assert described is not None
    assert set(described[1].eight_bit_modules) == eight
    with safe_open(weights, "pt") as file, safe_open(Path(fitted.codes) / "model.safetensors", "pt") as all_of_it:
        for name in file.keys():  # noqa: SIM118
            module = name.rpartition(".")[0]
            if module not in kept | eight:
                assert torch.equal(file.get_tensor(name), all_of_it.get_tensor(name))

    assert told_by_the_model(made.path, snapshot, spec, asked) == pytest.approx(fitted.taken.kl_mean, rel=0.005)


def test_logits_that_are_far_apart_have_a_divergence_too() -> None:
    """As one outlier in a module's weights makes them: exp of a difference overflows, and meets shares that are 0."""
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(5, 300, generator=draw) * 4
    other = base + torch.randn(5, 300, generator=draw) * 1e-3
    other[1, 7] += 15
    base[2] *= 60
    other[3] = -2 * base[3] * 60
    other[4] = base[4] - 90
    grown = growth(base, base.softmax(-1), other - base)
    expected = other.double().logsumexp(-1) - base.double().logsumexp(-1)
    assert torch.allclose(grown.double(), expected, rtol=1e-5, atol=1e-7)


def told_by_the_model(made: str, snapshot: Snapshot, spec: Calibrate, variant: Variant) -> float:
    """The KL divergence on the fit text of a checkpoint, as transformers opens it."""
    from safetensors.torch import load_file

    from tasks.fit import task
    from tests.test_compressed_tensors import loaded

    part: Any = "fit" if variant.calibrate else "all"
    ids = load_file(task.fit_text(snapshot, spec, part)[0] / task.IDS)["ids"].long()
    windows, length = WHOLE["cpu"]
    ids, logits = ids[:: max(1, len(ids) // windows)][:windows, :length], []
    for folder in (made, snapshot.path):
        model = loaded(Path(folder))
        if folder == made:
            method_of(variant).densify(model, 1 << 40)
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            tensor.data = tensor.data.float()
        with torch.no_grad():
            logits.append(model(ids).logits[:, :-1].double().log_softmax(-1))
    ours, original = logits
    return float((original.exp() * (original - ours)).sum(-1).mean())
