"""FP8 in blocks of 128 x 128: transformers' own bytes, and what transformers loads of them."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.schema import Variant
from tasks.download.checkpoint import quantization_of
from tasks.quantize.methods import described_by, method_of, opened_on
from tests.models import ZOO, quantize, tiny
from tests.test_compressed_tensors import loaded, logits, tensors

ARCHITECTURES = ("qwen3", "qwen3-tied", "llama", "qwen3-moe", "mixtral", "deepseek-v3")
WIDE = {
    "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "head_dim": 64, "num_key_value_heads": 4,
    "q_lora_rank": 128, "kv_lora_rank": 128, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
}  # fmt: skip
VARIANT = Variant(method="fp8-block")


@functools.cache
def source_of(name: str, folder: Path) -> Path:
    import transformers

    kind, values = ZOO[name]
    wide = {key: value for key, value in WIDE.items() if key in values or key == "hidden_size"}
    return tiny(folder / name, getattr(transformers, kind)(**{**values, **wide}), spread=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return functools.partial(source_of, folder=tmp_path_factory.mktemp("sources"))


def by_transformers(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float")
    made = Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"weight": weight})
    found: dict[str, torch.Tensor] = made
    return found


def dequantized(source: Path, made: Path) -> Any:
    """The source's model with the weights that transformers says a checkpoint stands for."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    stored, folder = tensors(made), made.with_name(f"{made.name}-dense")
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    dense = {}
    for name, weight in tensors(source).items():
        parts = {"weight": stored[name]}
        if (scale := stored.get(f"{name}_scale_inv")) is not None:
            parts["weight_scale_inv"] = scale
            weight = Fp8Dequantize(None).convert(parts)["weight"].to(weight.dtype)
        dense[name] = weight
    save_file(dense, folder / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_bytes_are_transformers_own_and_it_loads_them(name: str, sources: Any, tmp_path: Path) -> None:
    source = sources(name)
    made = quantize(source, tmp_path / "made", VARIANT)
    stored, counted = tensors(tmp_path / "made"), 0
    for tensor, weight in tensors(source).items():
        if f"{tensor}_scale_inv" not in stored:
            assert stored.pop(tensor).equal(weight)
            continue
        counted += weight.numel()
        for part, expected in by_transformers(weight).items():
            found = stored.pop(tensor.removesuffix("weight") + part)
            assert found.dtype == expected.dtype
            assert found.view(torch.uint8).equal(expected.contiguous().view(torch.uint8)), (tensor, part)
    assert not stored
    assert counted == made.quantized
    model = loaded(tmp_path / "made")
    plain = logits(dequantized(source, tmp_path / "made"))
    assert logits(model).equal(plain)
    dense = method_of(VARIANT).densify(model, 0)
    assert "activations rounded" in getattr(dense, "weights", "")
    assert 0 < (logits(model) - plain).norm() < 0.15 * plain.norm()
    described = described_by(quantization_of(tmp_path / "made"))
    assert described is not None
    assert described[1].method == "fp8-block"


def test_a_layer_that_is_no_multiple_of_a_block_stays(sources: Any, tmp_path: Path) -> None:
    made = quantize(sources("deepseek-v3"), tmp_path / "made", VARIANT)
    (left,) = [entry for entry in made.left if "kv_a_proj" in entry.module]
    assert left.reason == "a weight [160, 256], no multiple of the 128 × 128 that share a scale"
    (fused,) = [entry for entry in made.left if "q_a_proj" in entry.module]  # or vLLM would not open it
    assert fused.reason == "vLLM computes it as one with kv_a_proj_with_mqa, which is not quantized"
    config = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    assert {"lm_head", "model.layers.0.self_attn.kv_a_proj_with_mqa"} <= set(config["modules_to_not_convert"])


def test_searched_scales_lose_less_and_pieces_are_restored_as_the_whole(sources: Any) -> None:
    tensor_format = method_of(VARIANT).tensor_format()
    assert tensor_format is not None
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)).bfloat16() ** 3
    weight[:128, :128] = 0
    lost = []
    for variant in (VARIANT, Variant(method="fp8-block", scale="search")):
        codes, scales = tensor_format.quantize_rows(weight, variant)
        parts = {"weight": codes, **tensor_format.pack(scales, (256, 384), weight.dtype, variant)}
        restored = method_of(variant).restore(parts, (256, 384), "cpu")
        whole = restored.piece(0, weight.numel())
        pieces = [restored.piece(start * 384, 50 * 384) for start in range(0, 250, 50)]
        assert torch.cat([*pieces, restored.piece(250 * 384, 6 * 384)]).equal(whole)
        lost.append((whole.view(weight.shape) - weight.float()).square().sum())
    assert lost[1] < lost[0]


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_without_kernels_it_is_opened_dequantized(device: str) -> None:
    """With a GPU in the machine, transformers alone goes by the GPU, and fails in the first forward pass."""
    shipped = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert opened_on(device, shipped) == {**shipped, "dequantize": True}
    other = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert opened_on(device, other) is other
    assert opened_on(device, None) is None
