"""The formats of compressed-tensors: its own bytes, loaded by transformers with nothing missing, experts included."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import BadInputError
from configs.schema import Variant
from tasks.download.checkpoint import quantization_of
from tasks.quantize.methods import described_by, method_of
from tasks.quantize.protocols import WholeFormat
from tests.models import quantize, tiny, zoo

VARIANTS: tuple[dict[str, Any], ...] = (
    {"method": "w4a16"}, {"method": "w4a16", "group_size": 32}, {"method": "w4a16", "group_size": -1}, {"method": "w8a16"},
    {"method": "w8a16", "group_size": -1}, {"method": "w8a8"}, {"method": "fp8"}, {"method": "mxfp4"}, {"method": "nvfp4"},
)  # fmt: skip
ARCHITECTURES = (
    "qwen3",
    "qwen3-tied",
    "llama",
    "qwen3-moe",
    "mixtral",
    "deepseek-v3",
    "gpt-oss",
    "granite-moe",
    "glm4-moe",
)
DTYPES = ("bfloat16", "float16", "float32")
SPLIT = ("qwen3-moe", "mixtral", "deepseek-v3", "glm4-moe")
"""Architectures whose experts transformers loads from tensors of their own."""

CELLS = [
    pytest.param(
        name,
        options,
        id=f"{name}-{Variant(**options).label}",
        marks=() if (row + column) % 3 == 0 else pytest.mark.e2e,
    )
    for row, name in enumerate(ARCHITECTURES)
    for column, options in enumerate(VARIANTS)
]
"""Every architecture in every variant. A third of them, in which each architecture and each variant comes three times, is fast
enough for every run of the tests."""


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def scheme_of(folder: Path) -> Any:
    """The scheme that config.json tells a reader, as the package understands it."""
    from compressed_tensors.quantization import QuantizationConfig

    return QuantizationConfig.model_validate(quantization_of(folder)).config_groups["group_0"]


def by_the_package(weight: torch.Tensor, scheme: Any, together: list[torch.Tensor] | None = None) -> dict[str, Any]:
    """What compressed-tensors' own functions make of a whole weight, which is fused with those in `together`."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    grouped = weight.view(len(weight), -1, scheme.weights.group_size or weight.shape[1])
    state, whole = {"weight": weight}, None
    if scheme.weights.strategy == "tensor_group":
        every = torch.cat([one.view(-1) for one in together or [weight]])
        state["weight_global_scale"] = whole = generate_gparam(every.amin(), every.amax())
    scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights, whole)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    made: dict[str, Any] = compressor.compress({**state, "weight_scale": scale}, scheme)
    return made


FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))


def fused(tensor: str, whole: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The weights of a checkpoint that a kernel multiplies together with the one of this name."""
    before, own, _ = tensor.rsplit(".", 2)
    names = next((names for names in FUSED if own in names), (own,))
    return [whole[f"{before}.{name}.weight"] for name in names if f"{before}.{name}.weight" in whole]


def dequantized(source: Path, made: Path) -> Any:
    """The source's model with the weights that the package says a checkpoint stands for."""
    from compressed_tensors.compressors import BaseCompressor
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    scheme, stored = scheme_of(made), tensors(made)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    folder = made.with_name(f"{made.name}-dense")
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    dense = {}
    for name, weight in tensors(source).items():
        module = name.removesuffix("weight")
        if f"{module}weight_scale" in stored:
            parts = {
                key.removeprefix(module): part
                for key, part in stored.items()
                if re.match(f"{re.escape(module)}weight", key)
            }
            weight = compressor.decompress(parts, scheme)["weight"].to(weight.dtype)
        dense[name] = weight
    save_file(dense, folder / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(torch.arange(7, 71).view(2, 32)).logits.float()
    return found


@functools.cache
def source_of(name: str, folder: Path, dtype: str = "bfloat16") -> Path:
    return tiny(folder / f"{name}-{dtype}", zoo(name), dtype, spread=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return functools.partial(source_of, folder=tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize(("name", "options"), CELLS)
def test_the_bytes_are_the_packages_own_and_transformers_loads_them(
    name: str, options: dict[str, Any], sources: Any, tmp_path: Path
) -> None:
    source, variant = sources(name), Variant(**options)
    if variant.method in ("w8a8", "nvfp4") and name in SPLIT:
        with pytest.raises(BadInputError, match=r"no mixture of experts in this format.*use fp8"):
            quantize(source, tmp_path / "refused", variant)
        return
    made = quantize(source, tmp_path / "made", variant)
    stored, scheme, whole = tensors(tmp_path / "made"), scheme_of(tmp_path / "made"), tensors(source)
    counted = 0
    for tensor, weight in whole.items():
        module = tensor.removesuffix("weight")
        if f"{module}weight_scale" not in stored:
            assert stored.pop(tensor).equal(weight)
            continue
        counted += weight.numel()
        for part, expected in by_the_package(weight, scheme, fused(tensor, whole)).items():
            found = stored.pop(f"{module}{part}")
            assert found.dtype == expected.dtype
            assert found.view(torch.uint8).equal(expected.contiguous().view(torch.uint8)), (tensor, part)
    assert not stored
    assert counted == made.quantized
    if name in SPLIT:
        assert {entry.reason for entry in made.left} <= {
            "output head", "embedding", "norm or other vector", "not a linear layer", "bias",
        }  # fmt: skip
    model = loaded(tmp_path / "made")
    plain = logits(dequantized(source, tmp_path / "made"))
    if variant.method in ("w8a8", "fp8"):
        assert (logits(model) - plain).norm() / plain.norm() < 0.15  # activations are rounded
    else:
        assert logits(model).equal(plain)
    again = loaded(tmp_path / "made")
    assert method_of(variant).densify(again, 0)
    assert not any(hasattr(module, "quantization_scheme") for module in again.modules())
    assert (logits(again) - logits(model)).norm() <= (
        0 if name not in SPLIT or variant.method != "fp8" else 0.1
    ) * plain.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: Variant(**options).label)
def test_weights_of_every_dtype_and_magnitude(options: dict[str, Any], dtype: str) -> None:
    """Subnormal and huge weights, rows and groups of zeros, and both zeros."""
    from compressed_tensors.quantization import QuantizationConfig

    from tasks.quantize.methods import compressed_tensors_format as tensor_format

    variant = Variant(**{"group_size": 64, **options} if options["method"] in ("w4a16", "w8a16") else options)
    spread = torch.logspace(-9, 3.5 if dtype == "float16" else 20, 300)[:, None]
    weight = (torch.randn(300, 256, generator=torch.Generator().manual_seed(0)) * spread).to(getattr(torch, dtype))
    weight[0] = 0
    weight[1, :64] = -0.0
    weight[2, 3::7] = 0
    scheme = QuantizationConfig.model_validate(tensor_format._config(variant, [])).config_groups["group_0"]
    rows = method_of(variant).tensor_format()
    assert rows is not None
    if isinstance(rows, WholeFormat):
        rows = rows.knowing(weight.abs().max())
    codes, scales = rows.quantize_rows(weight, variant)
    packed = rows.pack(scales, (300, 256), weight.dtype, variant)
    first, *others = rows.outputs((300, 256), weight.dtype, variant)
    expected = by_the_package(weight, scheme)
    assert codes.view(torch.uint8).equal(expected[first].view(torch.uint8))
    for part in others:
        assert packed[part].contiguous().view(torch.uint8).equal(expected[part].contiguous().view(torch.uint8))
    parts = {first: expected[first], **{part: expected[part] for part in others}}
    restored = method_of(variant).restore(parts, (300, 256), "cpu")
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    whole = compressor.decompress(parts, scheme)["weight"].float()
    pieces = torch.cat([restored.piece(start, 100 * 256) for start in range(0, 300 * 256, 100 * 256)])
    assert pieces.equal(whole.view(-1))


def test_a_checkpoint_says_which_variant_it_is(sources: Any, tmp_path: Path) -> None:
    for number, options in enumerate(VARIANTS):
        quantize(sources("qwen3"), tmp_path / str(number), Variant(**options))
        described = described_by(quantization_of(tmp_path / str(number)))
        assert described is not None
        wanted = {**options, "group_size": 64} if options["method"] in ("w4a16", "w8a16") else options
        wanted = {**wanted, **options, "skip_modules": ["lm_head"]}
        assert described[1] == Variant(**wanted)
        assert described[0] is method_of(Variant(**options))


def test_a_group_size_that_divides_no_row_is_refused_and_the_largest_that_does_is_taken(
    sources: Any, tmp_path: Path
) -> None:
    with pytest.raises(BadInputError, match=r"group_size 128: \S+ has rows of 64 weights.*use 64 or 32 or -1"):
        quantize(sources("qwen3"), tmp_path / "refused", Variant(method="w4a16", group_size=128))
    quantize(sources("odd"), tmp_path / "odd", Variant(method="w4a16"))
    assert scheme_of(tmp_path / "odd").weights.strategy == "channel"
    with pytest.raises(BadInputError, match="rows of 36, no multiple of the 32 weights"):
        quantize(sources("odd"), tmp_path / "refused", Variant(method="mxfp4"))


def test_modules_that_stay_are_named_as_the_model_and_as_the_checkpoint_call_them(sources: Any, tmp_path: Path) -> None:
    quantize(sources("mixtral"), tmp_path / "made", Variant(method="fp8", skip_modules=["model.layers.1.self_attn"]))
    ignored = quantization_of(tmp_path / "made")["ignore"]
    assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate"} <= set(ignored)
    assert "model.layers.1.self_attn.q_proj" in ignored
    assert "model.layers.0.self_attn.q_proj" not in ignored
    loaded(tmp_path / "made")


QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16", "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936,
    "tie_word_embeddings": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


@pytest.mark.e2e
def test_what_a_mixture_of_experts_will_weigh(tmp_path: Path) -> None:
    """Qwen3-30B-A3B, of 61 GB, from its config.json alone."""
    from tasks.quantize.preview import preview

    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    found = preview(tmp_path, [Variant(method="w4a16"), Variant(method="fp8"), Variant(method="nf4")])
    sizes = [round(one["weight_bytes"] / 1e9, 1) for one in found]
    assert found[0]["parameters"] * 2 / 1e9 == pytest.approx(61, abs=0.2)
    assert sizes == pytest.approx([16.7, 31.2, 59.8], abs=0.1)


def test_a_forward_before_layers_are_made_plain_asks_for_the_model_again(sources: Any, tmp_path: Path) -> None:
    """compressed-tensors dequantizes in the first forward, and wraps the layers while it is at it."""
    variant = Variant(method="w8a8")
    quantize(sources("qwen3"), tmp_path / "made", variant)
    model = loaded(tmp_path / "made")
    assert not method_of(variant).altered(model)
    logits(model)
    assert method_of(variant).altered(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: Variant(**options).label)
def test_a_searched_scale_is_the_best_of_those_that_were_tried(options: dict[str, Any], dtype: str) -> None:
    """Against all of them, each group's weights quantized and dequantized by the package."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    variant = Variant(**{"group_size": 64, **options} if options["method"] in ("w4a16", "w8a16") else options)
    variant = variant.model_copy(update={"scale": "search"})
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype)) ** 3
    rows = method_of(variant).tensor_format()
    assert rows is not None
    whole = None
    if isinstance(rows, WholeFormat):
        rows, whole = rows.knowing(weight.abs().max()), generate_gparam(weight.amin(), weight.amax())
    from tasks.quantize.methods.compressed_tensors_codes import FACTORS, scheme_for

    scheme = scheme_for(variant)
    scales = rows.quantize_rows(weight, variant)[1]
    grouped = weight.view(96, -1, scheme.weights.group_size or 256)
    errors, tried = [], []
    for factor in FACTORS:
        scale = calculate_qparams(grouped.amin(-1) * factor, grouped.amax(-1) * factor, scheme.weights, whole)[0]
        read = fake_quantize(
            weight.float(), scale.float(), torch.zeros_like(scale.float()), scheme.weights, global_scale=whole
        )
        errors.append((read.view(grouped.shape).float() - grouped.float()).square().sum(-1))
        tried.append(scale.float())
    found = torch.stack([scales.view(grouped.shape[:2]).eq(scale) for scale in tried])
    least = torch.stack(errors)
    assert found.any(0).all()
    taken = torch.where(found, least, torch.inf).amin(0)
    assert (taken <= least.amin(0) * 1.02 + 1e-12).all()  # the codes of 16-bit weights are those of rounded quotients
    assert taken.sum() <= least[0].sum()
    if options["method"] not in ("w8a8", "fp8", "w8a16", "mxfp4"):
        assert taken.sum() < 0.95 * least[0].sum()


def test_a_plain_scale_is_not_searched_and_the_variants_have_names_of_their_own(sources: Any, tmp_path: Path) -> None:
    plain, searched = Variant(method="w4a16"), Variant(method="w4a16", scale="search")
    assert (plain.label, searched.label) == ("w4a16", "w4a16-search")
    assert "scale" not in plain.identity
    for variant in (plain, searched):
        quantize(sources("qwen3"), tmp_path / variant.label, variant)
    first, second = (tensors(tmp_path / variant.label) for variant in (plain, searched))
    assert first.keys() == second.keys()
    assert not all(first[name].equal(second[name]) for name in first)
    loaded(tmp_path / "w4a16-search")


def test_no_progress_bar_is_drawn(sources: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quantize(sources("qwen3"), tmp_path / "made", Variant(method="w8a8"))
    loaded(tmp_path / "made")
    said = capfd.readouterr()
    assert not re.search("quantization config|Compressing", said.out + said.err)


@pytest.mark.parametrize("how", ["one name an expert", "fused"])
@pytest.mark.parametrize("name", ["gpt-oss", "granite-moe"])
def test_transformers_makes_up_experts_that_it_has_no_conversion_for(name: str, how: str, tmp_path: Path) -> None:
    """Why they stay in 16 bits (docs/formats.md). Where this fails, transformers has learnt to load one of them: write it."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    made = tmp_path / "made"
    quantize(tiny(tmp_path / "whole", zoo(name)), made, Variant(method="w4a16", group_size=32))
    stored, scheme = tensors(made), scheme_of(made)
    for tensor in [tensor for tensor, weight in stored.items() if weight.ndim == 3]:
        weight = stored.pop(tensor)
        weight = (weight.mT if name == "gpt-oss" else weight).contiguous()
        parts = [by_the_package(one, scheme) for one in weight]
        layer, kind = tensor.split(".experts" if name == "gpt-oss" else ".input" if "input" in tensor else ".output")
        for part in ("weight_packed", "weight_scale"):
            if how == "fused":
                stored[f"{tensor.removesuffix('.weight')}.{part}"] = torch.stack([one[part] for one in parts])
                continue
            for number, one in enumerate(parts):  # gate and up as one, which the names alone would not allow either
                own = "down_proj" if "down" in kind or ".output" in tensor else "gate_proj"
                stored[f"{layer}.experts.{number}.{own}.{part}"] = one[part]
    save_file(stored, made / "model.safetensors", {"format": "pt"})
    config = json.loads((made / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    config["quantization_config"]["ignore"] = [module for module in ignored if "expert" not in module]
    (made / "config.json").write_text(json.dumps(config))
    _, told = AutoModelForCausalLM.from_pretrained(made, output_loading_info=True)
    missing = {re.sub(r".*experts\.", "", one) for one in told["missing_keys"]}
    assert missing == {"gate_up_proj", "down_proj"}
    assert any("weight_packed" in one or "_packed" in one for one in told["unexpected_keys"])
