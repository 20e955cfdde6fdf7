"""Checkpoints of compressed-tensors with 4-, 8- and 16-bit modules beside each other: config groups that every reader matches."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.errors import BadInputError
from configs.schema import Variant
from tasks.download.checkpoint import quantization_of
from tasks.evaluate.weight_error import layer_errors
from tasks.quantize.methods import described_by, method_of
from tests.models import quantize, tiny, zoo
from tests.test_calibrate_integers import calibrated, calibration, source_of
from tests.test_compressed_tensors import by_the_package, loaded, logits, tensors

EIGHT = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj",
         "model.layers.1.self_attn.v_proj"]  # fmt: skip
SIXTEEN = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {}), ("qwen3-tied", {"group_size": 32}), ("gemma2", {"group_size": -1}), ("llama", {"scale": "search"})],
)
def test_a_mix_is_the_packages_bytes_and_loads_everywhere(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    source = tiny(tmp_path / "model", zoo(name), spread=True)
    variant = Variant(method="w4a16", eight_bit_modules=EIGHT, skip_modules=SIXTEEN, **options)
    quantize(source, tmp_path / "made", variant)
    config = quantization_of(tmp_path / "made")
    groups = QuantizationConfig.model_validate(config).config_groups
    assert {group.weights.num_bits: len(group.targets) for group in groups.values()} == {4: 8, 8: 4}
    assert set(SIXTEEN) <= set(config["ignore"])
    described = described_by(config)
    assert described is not None
    assert described[0] is method_of(variant)
    assert set(described[1].eight_bit_modules) == set(EIGHT)
    assert described[1].group_size == options.get("group_size", 64)

    stored, dense = tensors(tmp_path / "made"), {}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for tensor, weight in tensors(source).items():
        module = tensor.removesuffix(".weight")
        dense[tensor] = weight
        scheme = next((group for group in groups.values() if module in group.targets), None)
        assert (scheme is not None) == (f"{module}.weight_packed" in stored)
        if scheme is None:
            continue
        assert scheme.weights.num_bits == (8 if module in EIGHT else 4)
        parts = {part: stored[f"{module}.{part}"] for part in ("weight_packed", "weight_scale", "weight_shape")}
        if not variant.scale:
            expected = by_the_package(weight, scheme)
            assert all(part.equal(expected[key]) for key, part in parts.items())
        dense[tensor] = compressor.decompress(parts, scheme)["weight"]
        restored = method_of(variant).restore(parts, tuple(weight.shape), "cpu").piece(0, weight.numel())
        assert restored.equal(dense[tensor].float().view(-1))
    model, plain = loaded(tmp_path / "made"), loaded(source)
    for tensor, weight in dense.items():
        plain.get_parameter(tensor).data = weight
    wanted = logits(plain)
    assert logits(model).equal(wanted)
    again = loaded(tmp_path / "made")
    told = method_of(variant).densify(again, 0)
    assert "4-bit and 8-bit weights dequantized once" in str(told)
    assert logits(again).equal(wanted)

    (tmp_path / "errors").mkdir()
    layer_errors(source, tmp_path / "made", "cpu", tmp_path / "errors")
    found = json.loads((tmp_path / "errors" / "result.json").read_text())
    assert found["notes"] == []
    errors = {entry["module"]: entry["error"] for entry in found["layers"]}
    assert len(errors) == 12
    assert max(errors[name] for name in EIGHT) < 0.02 < 0.05 < min(errors[name] for name in errors.keys() - set(EIGHT))


@pytest.mark.parametrize("skip", [[], SIXTEEN])
def test_an_output_head_of_its_own_can_be_in_8_bits(skip: list[str], tmp_path: Path) -> None:
    source, variant = (
        tiny(tmp_path / "model"),
        Variant(method="w4a16", eight_bit_modules=["lm_head"], skip_modules=skip),
    )
    made = quantize(source, tmp_path / "made", variant)
    assert "output head" not in {entry.reason for entry in made.left}
    stored, config = tensors(tmp_path / "made"), quantization_of(tmp_path / "made")
    assert "lm_head.weight" not in stored
    assert "lm_head" not in config["ignore"]
    described = described_by(config)
    assert described is not None
    assert described[1].eight_bit_modules == ["lm_head"]
    model, plain = loaded(tmp_path / "made"), loaded(source)
    parts = {part.removeprefix("lm_head."): tensor for part, tensor in stored.items() if part.startswith("lm_head.")}
    head = method_of(variant).restore(parts, tuple(plain.lm_head.weight.shape), "cpu")
    count = plain.lm_head.weight.numel()
    assert logits(model).isfinite().all()
    assert model.lm_head.weight.float().equal(head.piece(0, count).view(plain.lm_head.weight.shape))


def test_what_no_reader_would_open_is_refused(tmp_path: Path) -> None:
    source = tiny(tmp_path / "model", zoo("qwen3-tied"))
    with pytest.raises(BadInputError, match=r"eight_bit_modules: lm_head is the embedding under another name"):
        quantize(source, tmp_path / "made", Variant(method="w4a16", eight_bit_modules=["lm_head"]))
    with pytest.raises(BadInputError, match=r"eight_bit_modules: 'model.norm' matches no module that is quantized"):
        quantize(source, tmp_path / "other", Variant(method="w4a16", eight_bit_modules=["model.norm"]))
    mixture = tiny(tmp_path / "mixture", zoo("qwen3-moe"))
    with pytest.raises(BadInputError, match=r"are for models without experts"):
        quantize(mixture, tmp_path / "mixed", Variant(method="w4a16", eight_bit_modules=EIGHT[1:]))
    with pytest.raises(ValueError, match="eight_bit_modules belongs to w4a16, not to nf4"):
        Variant(method="nf4", eight_bit_modules=EIGHT)


def test_only_a_mix_that_tame_writes_is_read_as_one(tmp_path: Path) -> None:
    source = tiny(tmp_path / "model")
    quantize(source, tmp_path / "made", Variant(method="w4a16", eight_bit_modules=EIGHT))
    config = quantization_of(tmp_path / "made")
    first, second = config["config_groups"].values()
    others = [
        {**second, "weights": {**second["weights"], "symmetric": False}},
        {**second, "weights": {**second["weights"], "group_size": 32}},
        {**second, "input_activations": second["weights"]},
    ]
    for other in others:
        assert described_by({**config, "config_groups": {"a": first, "b": other}}) is None
    three = {"a": first, "b": second, "c": {**second, "targets": ["x"]}}
    assert described_by({**config, "config_groups": three}) is None
    alone = described_by({**config, "config_groups": {"b": second}})
    assert alone is not None
    assert alone[1].method == "w8a16"


def test_calibrated_codes_are_those_of_the_modules_in_4_bits(tmp_path: Path) -> None:
    """Modules in 8 bits are rounded, whether codes are chosen now or taken from a checkpoint that has all in 4 bits."""
    source, texts = source_of("qwen3", tmp_path), calibration(tmp_path / "texts")
    eight = ["model.layers.0.mlp.down_proj"]
    whole, mixed = calibrated("fast"), calibrated("fast", eight_bit_modules=eight)
    quantize(source, tmp_path / "whole", whole, calibration=texts)
    quantize(source, tmp_path / "plain", Variant(method="w8a16", group_size=32))
    quantize(source, tmp_path / "made", mixed, calibration=texts)
    quantize(source, tmp_path / "taken", mixed, calibration=texts, codes=tmp_path / "whole")
    codes, plain, made, taken = (tensors(tmp_path / name) for name in ("whole", "plain", "made", "taken"))
    assert made.keys() == taken.keys()
    for name, tensor in taken.items():
        assert tensor.equal((plain if name.startswith(eight[0]) else codes)[name])
    assert all(made[name].equal(plain[name]) for name in made if name.startswith(eight[0]))
    assert not all(made[name].equal(plain[name]) for name in made if name in plain)
    loaded(tmp_path / "taken")


def test_each_weight_can_be_computed_again_alone(tmp_path: Path) -> None:
    """As `tame publish --check --rederive` does it."""
    from tasks.download.checkpoint import read_tensors, written_tensors
    from tasks.quantize.layout import lay_out
    from tasks.quantize.single import SingleTensors

    source, variant = tiny(tmp_path / "model"), Variant(method="w4a16", eight_bit_modules=EIGHT, skip_modules=SIXTEEN)
    quantize(source, tmp_path / "made", variant)
    layout = lay_out(source, method_of(variant), variant, read_tensors(source))
    computing = SingleTensors(
        "source", lambda file, start, count: (source / file).read_bytes()[start : start + count], layout.variant, "cpu"
    )
    there = written_tensors(tmp_path / "made")
    assert sum(job.variant is not None for job in layout.jobs) == len(EIGHT)
    for job in layout.jobs:
        for name, data in computing.outputs(job).items():
            stored = there[name]
            assert data == (tmp_path / "made" / stored.file).read_bytes()[stored.start : stored.end]
