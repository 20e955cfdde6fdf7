"""Calibrated codes: the arithmetic against the plain one, the walk against the model, and the same checkpoint as without."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import BadInputError, TameError
from configs.schema import Calibrate, CalibrationSource, Variant
from tasks.calibrate import scales, solve
from tasks.calibrate.grid import Grid
from tasks.calibrate.layers import Effort, nearest, searched, solved
from tasks.calibrate.sequences import check_apart, load_texts, make_sequences
from tasks.calibrate.walk import _local_products
from tasks.download.text import LoadedText, load_text
from tasks.quantize.methods import method_of
from tasks.quantize.protocols import CodedFormat
from tasks.values import Calibration, CalibrationText
from tests.models import quantize, tiny, tokenizer, zoo
from tests.test_quantize import ARCHITECTURES, tensors

VARIANTS = {
    "nf4": Variant(method="nf4"),
    "nf4-dq": Variant(method="nf4", double_quant=True),
    "fp4": Variant(method="fp4"),
}


def calibrating(variant: Variant, level: Any = True) -> Variant:
    return variant.model_copy(update={"calibrate": level})


def grid_of(variant: Variant = VARIANTS["nf4"]) -> Grid:
    coded = method_of(variant).tensor_format()
    assert isinstance(coded, CodedFormat)
    return Grid(coded.levels(variant), coded.block_size(variant), signed=coded.signed_scales(variant))


@pytest.fixture(scope="module")
def layer() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight [96, 192], the Hessian of inputs that are correlated, and C of somewhat different ones."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 192, generator=draw) * 0.05
    mix = torch.randn(192, 192, generator=draw) / 192**0.5 + torch.eye(192) * 0.3
    inputs = torch.randn(2000, 192, generator=draw) @ mix * torch.rand(192, generator=draw) * 2
    theirs = inputs + torch.randn(inputs.shape, generator=draw) * 0.1
    return weight, inputs.T @ inputs / 2000, theirs.T @ inputs / 2000


def lost(weight: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor) -> float:
    error = weight - values
    return float(((error @ hessian) * error).sum())


def test_the_column_loop_is_gptq(layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    weight, hessian, _ = layer
    grid, made = grid_of(), solve.form(hessian.clone(), 0.01, "it")
    spread = grid.spread(scales.largest(weight, grid), weight.shape)
    rest, scale = weight[:, made.order].clone(), spread[:, made.order]
    values = torch.zeros_like(rest)
    for j in range(192):  # as the paper has it, a column at a time
        values[:, j] = grid.nearest(rest[:, j] / scale[:, j]) * scale[:, j]
        error = (rest[:, j] - values[:, j]) / made.factor[j, j]
        rest[:, j:] -= error[:, None] * made.factor[j, j:]
    mine = grid.sorted[solve.column_loop(weight, spread, made, grid)] * spread
    assert torch.equal(mine[:, made.order], values)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(192)
    inverse = torch.linalg.inv(damped)[made.order][:, made.order]
    assert torch.allclose(made.factor.T @ made.factor, inverse, rtol=1e-3, atol=1e-3 * float(inverse.max()))


def local(hessian: torch.Tensor) -> torch.Tensor:
    """The blocks of 64 columns on the diagonal."""
    return torch.stack([hessian[start : start + 64, start : start + 64] for start in range(0, len(hessian), 64)])


def test_the_local_loop_is_the_loop_of_a_hessian_of_blocks(
    layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    weight, hessian, _ = layer
    grid = grid_of()
    spread = grid.spread(scales.largest(weight, grid), weight.shape)
    whole = solve.form(torch.block_diag(*local(hessian)), 0.01, "it")
    made = solve.local_form(local(hessian), 0.01, "it")
    same = solve.local_loop(weight, spread, made, grid) == solve.column_loop(weight, spread, whole, grid)
    assert same.float().mean() > 0.999


def test_a_wider_run_loses_less(layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    weight, hessian, _ = layer
    grid, effort = grid_of(), Effort(shrink=0)
    narrow = searched(weight, local(hessian), "it", grid, effort)
    wide = searched(weight, hessian[None], "it", grid, effort)
    assert lost(weight, wide.values(grid), hessian) < 0.95 * lost(weight, narrow.values(grid), hessian)


def test_a_hessian_shrinks_towards_its_diagonal() -> None:
    hessians = torch.tensor([[[2.0, 1.0], [1.0, 3.0]], [[5.0, -4.0], [-4.0, 6.0]]])
    solve.shrink(hessians, 0.25)
    assert hessians.tolist() == [[[2.0, 0.75], [0.75, 3.0]], [[5.0, -3.0], [-3.0, 6.0]]]


@pytest.mark.parametrize(("columns", "width"), [(192, 192), (1536, 256), (576, 192), (640, 128), (96, 1)])
def test_runs_have_whole_blocks(columns: int, width: int) -> None:
    given = torch.randn(4, columns)
    found = _local_products(given, 64)
    assert found.shape == (columns // width, width, width)
    assert torch.allclose(found[-1], given[:, -width:].T @ given[:, -width:], atol=1e-5)


@pytest.mark.cuda
def test_the_kernel_is_the_loop(layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    weight, hessian, _ = layer
    both = []
    for device in ("cpu", "cuda"):
        grid, made = grid_of().to(torch.device(device)), solve.form(hessian.to(device, copy=True), 0.01, "it")
        spread = grid.spread(scales.largest(weight.to(device), grid), weight.shape)
        ranks = solve.column_loop(weight.to(device), spread, made, grid)
        both.append(torch.stack([ranks, solve.descend(weight.to(device), spread, ranks, made, grid)]).cpu())
    assert (both[0] == both[1]).float().mean() > 0.999


def test_each_step_loses_less(layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    weight, hessian, _ = layer
    grid, made = grid_of(), solve.form(hessian.clone(), 0.01, "it")
    importance = hessian.diagonal()

    def loss(effort: Effort) -> float:
        return lost(weight, solved(weight, importance, None, made, grid, effort).values(grid), hessian)

    plain = lost(weight, nearest(weight, scales.largest(weight, grid), grid).values(grid), hessian)
    found = scales.search(weight, importance, grid, Effort().factors)
    steps = [plain, lost(weight, nearest(weight, found, grid).values(grid), hessian)]
    steps += [lost(weight, searched(weight, local(hessian), "it", grid, Effort()).values(grid), hessian)]
    steps += [loss(Effort(rounds=rounds)) for rounds in (0, 1, 3)]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] < 0.35 * plain


def test_the_target_puts_out_what_the_original_inputs_would(
    layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    weight, hessian, other = layer
    made = solve.form(hessian.clone(), 1e-4, "it")
    goal = solve.target(weight, weight @ (other - hessian), made, 1.0)
    damped = hessian + 1e-4 * hessian.diagonal().mean() * torch.eye(192)
    assert torch.allclose(goal, weight + weight @ (other - hessian) @ torch.linalg.inv(damped), atol=1e-4)


def test_a_hessian_that_cannot_be_inverted_is_damped_until_it_can(caplog: pytest.LogCaptureFixture) -> None:
    hessian = torch.ones(64, 64) - 0.5 * torch.eye(64)  # not even positive
    made = solve.form(hessian.clone(), 0.01, "model.layers.0.q")
    assert made.damping > 0.01
    assert "model.layers.0.q" in caplog.text
    assert torch.isfinite(made.factor).all()


def calibration(folder: Path, rows: int = 24, length: int = 32) -> Calibration:
    """Sequences of Python's documentation, in the tests' own tokens."""
    from safetensors.torch import save_file

    text = load_text(CalibrationSource(builtin="python-library")).text[: rows * length * 4]
    ids = torch.tensor(tokenizer()(text)["input_ids"][: rows * length], dtype=torch.int32).view(rows, length)
    folder.mkdir()
    save_file({"ids": ids}, folder / "ids.safetensors")
    texts = [CalibrationText(name="docs", sha256="0" * 64, characters=len(text), sequences=rows)]
    return Calibration(path=str(folder), digest="0" * 64, texts=texts, sequences=rows, length=length)


def outputs(folder: Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each linear layer within the blocks puts out, float32, in plain transformers."""
    import transformers
    from transformers.pytorch_utils import Conv1D

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: dict[str, torch.Tensor] = {}

    def keeping(name: str) -> Callable[..., None]:
        return lambda module, given, out: found.__setitem__(name, out.detach().float())

    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and any(part.isdigit() for part in name.split(".")):
            module.register_forward_hook(keeping(name))
    with torch.no_grad():
        model(input_ids=ids)
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_calibrates_or_is_refused_by_name(name: str, tmp_path: Path) -> None:
    source = tiny(tmp_path / "source", zoo(name), "float32", spread=True)
    made = calibration(tmp_path / "calibration")
    variant = VARIANTS[list(VARIANTS)[ARCHITECTURES.index(name) % 3]]
    if name in ("t5",):
        with pytest.raises(BadInputError, match="t5 is an encoder-decoder"):
            quantize(source, tmp_path / "refused", calibrating(variant), calibration=made)
        return
    plain = quantize(source, tmp_path / "plain", variant)
    written = quantize(source, tmp_path / "cal", calibrating(variant), calibration=made)
    one, other = tensors(tmp_path / "plain"), tensors(tmp_path / "cal")
    assert [(key, *value[:2]) for key, value in one.items() if "quant_state" not in key] == [
        (key, *value[:2]) for key, value in other.items() if "quant_state" not in key
    ]
    assert one.keys() == other.keys()
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("plain", "cal")]
    assert configs[0] == configs[1]
    assert written.quantized == plain.quantized
    if variant != VARIANTS["nf4-dq"]:
        assert written.weight_bytes == plain.weight_bytes
    if name == "llava":
        assert "outside the model's blocks" in written.notes[-1]
        assert "rounded plainly" in written.notes[-1]
        return
    from safetensors.torch import load_file

    ids = load_file(Path(made.path) / "ids.safetensors")["ids"].long()
    original, rounded, chosen = (outputs(tmp_path / folder, ids) for folder in ("source", "plain", "cal"))
    errors = {
        layer: [float((found[layer] - out).norm()) for found in (rounded, chosen)]
        for layer, out in original.items()
        if layer in rounded and rounded[layer].shape == out.shape and not torch.equal(rounded[layer], out)
    }
    assert errors
    assert {layer: pair for layer, pair in errors.items() if pair[1] >= pair[0]} == {}


def test_fast_and_best_lie_on_both_sides(tmp_path: Path, tiny_llama: Path) -> None:
    made = calibration(tmp_path / "calibration")
    from safetensors.torch import load_file

    ids = load_file(Path(made.path) / "ids.safetensors")["ids"].long()
    original = outputs(tiny_llama, ids)
    last = list(original)[-1]
    errors = {}
    for level in (False, "fast", True, "best"):
        variant = calibrating(VARIANTS["nf4"], level)
        quantize(tiny_llama, tmp_path / str(level), variant, calibration=made)
        errors[level] = float((outputs(tmp_path / str(level), ids)[last] - original[last]).norm())
    assert errors[False] > errors["fast"] > errors[True]
    assert errors["best"] < 1.02 * errors[True]


def test_a_killed_run_is_taken_up_behind_its_last_block(tmp_path: Path, tiny_llama: Path) -> None:
    made = calibration(tmp_path / "calibration")
    variant = calibrating(VARIANTS["nf4"])
    quantize(tiny_llama, tmp_path / "whole", variant, calibration=made)

    def killed(what: str, done: int, total: int) -> None:
        if what.startswith("calibrate") and done == 1:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_llama, out, variant, killed, calibration=made)
    (first,) = (out / ".calibrated").glob("block-*.safetensors")
    before = first.stat().st_mtime_ns
    seen: list[int] = []

    def look(what: str, done: int, total: int) -> None:
        if what.startswith("calibrate"):
            seen.append(first.stat().st_mtime_ns)

    quantize(tiny_llama, out, variant, look, calibration=made)
    assert set(seen) == {before}
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert not (out / ".calibrated").exists()


def test_broken_numbers_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny(tmp_path / "source", zoo("llama"), "float32")
    file = source / "model.safetensors"
    weights = load_file(file)
    made = calibration(tmp_path / "calibration")
    name = "model.layers.1.mlp.down_proj.weight"
    for key, value, match in (
        (name, float("nan"), rf"{name} has NaN"),
        ("model.layers.1.input_layernorm.weight", float("inf"), r"gives model.layers.1.self_attn.q_proj NaN"),
    ):
        broken = {**weights, key: torch.full_like(weights[key], value)}
        save_file(broken, file, metadata={"format": "pt"})
        with pytest.raises(TameError, match=match):
            quantize(source, tmp_path / key, calibrating(VARIANTS["nf4"]), calibration=made)


def test_a_layer_without_a_token_is_rounded_plainly_and_counted(tmp_path: Path) -> None:
    from tasks.calibrate.block_model import BlockModel
    from tasks.calibrate.streams import Streams
    from tasks.calibrate.walk import Walk

    model = BlockModel(tiny(tmp_path / "source", zoo("llama"), "float32"), "cpu", torch.float32)
    weight = "model.layers.0.unused.weight"
    model.blocks[0].unused = torch.nn.Linear(64, 64, bias=False)
    walk = Walk(model, Streams(model, torch.ones(2, 16, dtype=torch.long), 2, tmp_path), {weight: grid_of()}, Effort())
    with model.loaded(0) as module:
        module.unused = torch.nn.Linear(64, 64, bias=False)
        chosen = walk.block(0, module)
        assert walk.plain == [weight]
        expected = nearest(module.unused.weight.data, scales.largest(module.unused.weight.data, grid_of()), grid_of())
    assert torch.equal(chosen[weight].codes, expected.codes)


def sequences(tmp_path: Path, texts: dict[str, bytes], folder: Path, **asked: Any) -> tuple[list[int], torch.Tensor]:
    from safetensors.torch import load_file

    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
    spec = Calibrate(text=CalibrationSource(files=[str(tmp_path / name) for name in texts]), **asked)
    counts = make_sequences(load_texts(spec), spec, folder, False, tmp_path)
    return counts, load_file(tmp_path / "ids.safetensors")["ids"]


PROSE = load_text(CalibrationSource(builtin="python-library")).text.encode()


def test_texts_are_mixed_evenly_from_all_over_them(tmp_path: Path, tiny_llama: Path) -> None:
    texts = {"one.txt": PROSE[:60000], "two.txt": PROSE[100000:101000]}
    counts, ids = sequences(tmp_path, texts, tiny_llama, sequences=20, length=64)
    read = [tokenizer().decode(row) for row in ids]
    assert counts[0] == 20
    assert 0 < counts[1] < 20
    assert len(read) == sum(counts)
    found = [PROSE.decode().find(text[:40]) for text in read]
    assert [place < 60000 for place in found[:4]] == [True, False, True, False]
    places = [place for place in found if 0 <= place < 60000]
    assert places[-1] > 50000


def test_a_sequence_begins_as_the_tokenizer_begins_a_text(tmp_path: Path, tiny_llama: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tiny_llama)
    own._tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    own.save_pretrained(tmp_path / "model")
    _, ids = sequences(tmp_path, {"a.txt": PROSE[:9000]}, tmp_path / "model", sequences=4, length=32)
    assert ids.shape == (4, 32)
    assert (ids[:, 0] == 0).all()
    assert (ids[:, 1:] != 0).all()


def test_chats_go_through_the_template(tmp_path: Path, tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tiny_llama)
    own.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    own.save_pretrained(tmp_path / "model")
    chat = {"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A test. " * 40}]}
    rows = "\n".join(json.dumps(chat) for _ in range(5)).encode()
    _, ids = sequences(tmp_path, {"chats.jsonl": rows}, tmp_path / "model", sequences=2, length=64)
    assert tokenizer().decode(ids[0]).startswith("[user] What is it?\n[assistant] A test.")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "there is no text in it"),
        (b"a few words", "less than one sequence of 64; lower calibration.length"),
        (b"caf\xe9 " * 2000, "byte 0xe9 at offset 3 is not UTF-8"),
    ],
)
def test_a_bad_text_is_refused(content: bytes, match: str, tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(BadInputError, match=match):
        sequences(tmp_path, {"a.txt": content}, tiny_llama, length=64)


def test_what_is_judged_is_not_calibrated_on() -> None:
    evaluated = LoadedText(text=" ".join(f"word{i}" for i in range(5000)), name="test", digest="", revision=None)
    part = LoadedText(
        text="before " + " ".join(f"word{i}" for i in range(777, 877)), name="mine", digest="", revision=None
    )
    with pytest.raises(BadInputError, match=r"mine overlaps evaluate\.text test: both have “word"):
        check_apart([part], evaluated)
    check_apart([load_text(CalibrationSource(builtin="python-library"))], evaluated)


def test_names_and_keys() -> None:
    labels = [calibrating(VARIANTS["nf4-dq"], level).label for level in (False, "fast", True, "best")]
    assert labels == ["nf4-dq", "nf4-dq-cal-fast", "nf4-dq-cal", "nf4-dq-cal-best"]
    assert "calibrate" not in VARIANTS["nf4"].identity
    assert calibrating(VARIANTS["nf4"]).identity != calibrating(VARIANTS["nf4"], "best").identity
    with pytest.raises(ValueError, match="calibrate belongs to nf4, fp4 and w4a16, not to int8"):
        Variant(method="int8", calibrate=True)
