"""Somebody else's checkpoint as a variant: measured in the same table, never published."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from configs.errors import BadInputError
from configs.schema import Recipe, Variant
from tasks.describe import describe
from tasks.plan import preflight
from tasks.quantize.methods import described_by
from tasks.quantize.methods.compressed_tensors_schemes import SCHEMES
from tests.models import tiny, zoo
from tests.test_download import change
from tests.test_flow import Place, place

__all__ = ["place"]

EVALUATE = {
    "text": {"builtin": "python-docs"}, "window": 64, "max_tokens": 512, "batch_size": 4, "speed": None, "samples": None,
}  # fmt: skip


def recipe_of(source: Path, *variants: dict[str, Any], **more: Any) -> Recipe:
    asked = {
        "name": "theirs",
        "source": {"model": str(source)},
        "variants": list(variants),
        "evaluate": EVALUATE,
        **more,
    }
    return Recipe.model_validate(asked)


def by_transformers(source: Path, folder: Path) -> Path:
    """nf4 by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype="auto")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.mark.e2e
def test_equal_bytes_have_equal_numbers_and_are_not_published(tiny_llama: Path, place: Place) -> None:
    theirs = by_transformers(tiny_llama, place.folder / "somebody-nf4")
    variants = [{"method": "nf4", "compute_dtype": "bfloat16"}, {"checkpoint": str(theirs)}]
    recipe = place.recipe(
        tiny_llama,
        variants=variants,
        evaluate=EVALUATE,
        gate={"max_mean_kl": 1e-9},
        publish={"to": "folder", "repo": "made"},
    )
    code, result, told = place.run(recipe)
    assert code == 3, told
    ours, same = result["variants"]
    assert [variant["status"] for variant in result["variants"]] == ["rejected", "measured"], told
    for name in ("perplexity", "kl_mean", "top1_agreement", "weight_error_mean"):
        assert same["metrics"][name] == ours["metrics"][name]
    assert (same["gate"], same["published"]) == (None, None)
    assert "somebody-nf4" in (place.folder / "out" / "report.html").read_text()
    assert not list((place.folder / "out").glob("published/*"))


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ({}, "give exactly one of method"),
        ({"method": "nf4", "checkpoint": "me/x"}, "give exactly one of method"),
        ({"checkpoint": "me/x", "double_quant": True}, "double_quant says how to quantize"),
        ({"checkpoint": "me/x", "skip_modules": ["model"]}, "skip_modules says how to quantize"),
    ],
)
def test_a_variant_is_a_method_or_a_checkpoint(variant: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Variant.model_validate(variant)
    assert Variant(checkpoint="somebody/Qwen3-1.7B-AWQ").label == "Qwen3-1.7B-AWQ"


def test_a_checkpoint_of_another_model_is_refused_in_the_plan(
    tiny_llama: Path, tmp_path: Path, tame_home: Path
) -> None:
    other = tiny(tmp_path / "gpt2", zoo("gpt2"))
    recipe = recipe_of(tiny_llama, {"method": "nf4"}, {"checkpoint": str(other)})
    same = recipe_of(tiny_llama, {"method": "nf4"}, {"checkpoint": str(tiny_llama)})
    told = dict(describe(same, tmp_path / "out"))
    assert "on this disk, is measured and not published" in told[tiny_llama.name]
    assert "1 model to quantize and 3 models to measure" in told["time"]
    with pytest.raises(BadInputError, match=r"variants gpt2: .* is a gpt2 of 512 tokens, the source a llama of 512"):
        preflight(recipe, tmp_path / "out")
    bare = Path(shutil.copytree(tiny_llama, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    with pytest.raises(BadInputError, match=r"variants bare: .* it has no tokenizer"):
        preflight(recipe_of(tiny_llama, {"checkpoint": str(bare)}), tmp_path / "out")


def static(source: Path, folder: Path) -> Path:
    """FP8 as llm-compressor's scheme of that name has it: a scale for each tensor, and one for what each layer is given."""
    import torch
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    made = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            made[name] = weight
            continue
        scale = weight.float().abs().max() / 448
        made[name] = (weight / scale).to(torch.float8_e4m3fn)
        made[f"{name}_scale"] = scale.bfloat16().view(1)
        made[f"{name.removesuffix('weight')}input_scale"] = torch.tensor([0.0005], dtype=torch.bfloat16)
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    scheme = preset_name_to_scheme("FP8", ["Linear"])
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="float-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=["lm_head"],
    )
    change(folder / "config.json", quantization_config=config.model_dump(mode="json"))
    return folder


def test_scales_that_were_chosen_beforehand_are_measured_as_they_are(
    tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tasks.evaluate.model import dequantize, load

    theirs, ids = static(tiny_llama, tmp_path / "static"), torch.arange(5, 60)[None]
    mine = load(theirs, "cpu")
    dequantize(mine)
    assert "it/s" not in capfd.readouterr().err
    plain = AutoModelForCausalLM.from_pretrained(theirs, dtype="auto")
    original = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto")
    with torch.no_grad():
        seen, wanted, exact = (model(ids).logits.float() for model in (mine.model, plain, original))
    assert seen.equal(wanted)
    assert float((wanted - exact).abs().max()) > 0.05  # these scales are far too small, which is what has to be seen
    with pytest.raises(BadInputError, match="a scheme of compressed-tensors that tame does not read"):
        preflight(recipe_of(theirs, {"method": "nf4"}), tmp_path / "out")


@pytest.mark.parametrize("preset", ["FP8", "FP8_BLOCK", "W4A16_ASYM", "NVFP4", "W4AFP8", "MXFP4", "MXFP8"])
def test_schemes_that_tame_does_not_write_are_nobodys(preset: str) -> None:
    from compressed_tensors.quantization import preset_name_to_scheme

    group = preset_name_to_scheme(preset, ["Linear"]).model_dump(mode="json")
    for scheme in SCHEMES.values():
        config = {"quant_method": "compressed-tensors", "format": scheme.stored, "config_groups": {"group_0": group}}
        assert described_by(config) is None
