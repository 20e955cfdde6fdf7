"""The error of each layer: against models that transformers loads, for formats and architectures that store weights differently."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.schema import Variant
from tasks.evaluate import evidence
from tasks.evaluate.weight_error import comparable, layer_errors
from tests.models import quantize, tiny, zoo


def quantized(source: Path, out: Path, variant: Variant) -> Path:
    quantize(source, out, variant, workers=1)
    return out


def errors(source: Path, made: Path, folder: Path) -> dict[str, float]:
    folder.mkdir()
    layer_errors(source, made, "cpu", folder)
    found = json.loads((folder / "result.json").read_text())
    assert found["notes"] == []
    return {layer["module"]: layer["error"] for layer in found["layers"]}


def errors_of_models(source: Path, made: Path) -> dict[str, float]:
    """The same from the two models, loaded whole."""
    import bitsandbytes as bnb
    import torch
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    found = {}
    for name, module in AutoModelForCausalLM.from_pretrained(made).named_modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            restored = module.weight.data.float() * module.weight.SCB.view(-1, 1) / 127
        elif isinstance(module, bnb.nn.Linear4bit):
            module.weight.quant_state.dtype = torch.float32
            restored = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        else:
            continue
        before: Any = original.get_submodule(name).weight.detach()
        before = before.T if type(original.get_submodule(name)).__name__ == "Conv1D" else before
        found[name] = float((restored - before).norm() / before.norm())
    return found


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        ("llama", {"method": "nf4"}),
        ("llama", {"method": "int8", "skip_modules": ["model.layers.0"]}),
        ("odd", {"method": "fp4", "double_quant": True}),
        ("gpt2", {"method": "nf4", "double_quant": True}),
        ("gpt2", {"method": "int8"}),
        ("qwen3-moe", {"method": "nf4"}),
        ("phi3", {"method": "fp4"}),
    ],
    ids=str,
)
def test_errors_are_those_of_the_models(kind: str, variant: dict[str, Any], tmp_path: Path) -> None:
    source = tiny(tmp_path / "source", zoo(kind))
    made = quantized(source, tmp_path / "made", Variant.model_validate(variant))
    found = errors(source, made, tmp_path / "errors")
    assert found == pytest.approx(errors_of_models(source, made), rel=1e-4)
    assert all(0.001 < error < 0.2 for error in found.values())


@pytest.mark.cuda
@pytest.mark.parametrize("variant", [{"method": "int8"}, {"method": "nf4", "double_quant": True}], ids=str)
def test_a_gpu_finds_the_same_errors(variant: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    made = quantized(tiny_llama, tmp_path / "made", Variant.model_validate(variant))
    (tmp_path / "gpu").mkdir()
    layer_errors(tiny_llama, made, "cuda:0", tmp_path / "gpu")
    found = json.loads((tmp_path / "gpu" / "result.json").read_text())["layers"]
    plain = errors(tiny_llama, made, tmp_path / "cpu")
    assert {layer["module"]: layer["error"] for layer in found} == pytest.approx(plain, rel=1e-4)


def test_shards_of_either_side_and_float32_sources(tmp_path: Path) -> None:
    one = tiny(tmp_path / "one", dtype="float32")
    many = tiny(tmp_path / "many", dtype="float32", max_shard_size="100KB")
    variant = Variant(method="nf4")
    plain = errors(one, quantized(one, tmp_path / "made", variant), tmp_path / "a")
    quantize(many, tmp_path / "sharded", variant, max_shard_size=100_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert errors(many, tmp_path / "sharded", tmp_path / "b") == pytest.approx(plain, rel=1e-6)


def test_what_does_not_belong_together_is_a_note(tiny_llama: Path, tmp_path: Path) -> None:
    made = quantized(tiny_llama, tmp_path / "made", Variant(method="nf4"))
    other = tiny(tmp_path / "other", zoo("odd"))
    assert comparable(tiny_llama, made)
    assert not comparable(made, tiny_llama)
    assert not comparable(made, made)
    layer_errors(other, made, "cpu", tmp_path)
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["layers"] == []
    assert "is not as in a checkpoint made from" in found["notes"][0]


def test_names_are_shortened_to_where_they_differ(tmp_path: Path) -> None:
    names = ["model.layers.11.mlp.experts.3.up_proj", "model.layers.0.mlp.gate", "model.vision.2.mlp.gate"]
    rows = [{"module": name, "error": 0.1, "parameters": 4} for name in names]
    (tmp_path / "layers.json").write_text(json.dumps(rows))
    found = evidence.layers(str(tmp_path))
    assert [layer.kind for layer in found] == [
        "layers.*.mlp.experts.*.up_proj",
        "layers.*.mlp.gate",
        "vision.*.mlp.gate",
    ]
    assert [layer.depth for layer in found] == [11, 0, 2]
    (tmp_path / "layers.json").write_text(json.dumps(rows[:1]))
    assert evidence.layers(str(tmp_path))[0].kind == "model.layers.*.mlp.experts.*.up_proj"
    assert evidence.layers(None) == []
