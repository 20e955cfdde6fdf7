"""Sources that are quantized already are read as what they stand for: the same bytes as from the dequantized model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import BadInputError
from configs.schema import Variant
from tasks.download.checkpoint import check_source, quantization_of
from tasks.quantize.preview import preview
from tests.models import quantize, tiny, tokenizer, zoo
from tests.test_calibrate_integers import calibration
from tests.test_compressed_tensors import dequantized as by_compressed_tensors
from tests.test_compressed_tensors import loaded, tensors
from tests.test_families import TEXT
from tests.test_finegrained_fp8 import dequantized as by_transformers
from tests.test_finegrained_fp8 import source_of

SOURCES: dict[str, dict[str, Any]] = {
    "fp8-block": {"method": "fp8-block"},
    "w4a16": {"method": "w4a16"},
    "w8a8": {"method": "w8a8"},
    "mxfp4": {"method": "mxfp4"},
    "nvfp4": {"method": "nvfp4"},
    "gpt-oss": {},
}


def gpt_oss(folder: Path) -> tuple[Path, Path]:
    """A tiny gpt-oss as its authors ship theirs, in MXFP4, and what transformers dequantizes it to."""
    import transformers
    from safetensors.torch import load_file, save_file

    shipped = tiny(folder / "shipped", zoo("gpt-oss"), spread=True)
    stored = load_file(shipped / "model.safetensors")
    drawn = torch.Generator().manual_seed(0)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inside, out = stored.pop(name).shape
        stored[f"{name}_blocks"] = torch.randint(0, 256, (experts, out, inside // 32, 16), generator=drawn).to(
            torch.uint8
        )
        stored[f"{name}_scales"] = torch.randint(118, 124, (experts, out, inside // 32), generator=drawn).to(
            torch.uint8
        )
    save_file(stored, shipped / "model.safetensors", {"format": "pt"})
    config = json.loads((shipped / "config.json").read_text())
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    (shipped / "config.json").write_text(json.dumps(config))
    dequantized = transformers.Mxfp4Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        shipped, quantization_config=dequantized, dtype="bfloat16"
    )
    model.save_pretrained(shipped.with_name("shipped-dense"))
    return shipped, shipped.with_name("shipped-dense")


def both(kind: str, folder: Path) -> tuple[Path, Path]:
    """A checkpoint in a format, and the one that its owner's library makes of it in bfloat16."""
    if kind == "gpt-oss":
        return gpt_oss(folder)
    if kind == "fp8-block":
        whole, read = source_of("deepseek-v3", folder), by_transformers
    else:
        whole, read = tiny(folder / "whole", zoo("qwen3"), spread=True), by_compressed_tensors
    quantize(whole, folder / "shipped", Variant(**SOURCES[kind]))
    read(whole, folder / "shipped")
    return folder / "shipped", folder / "shipped-dense"


def released_again(source: Path, release: Path, variant: Variant) -> None:
    """Every tensor of a release is computed again from its source, a part of a file at a time."""
    from tasks.publish.rederive import _rederive
    from tasks.runtime.progress import silent

    told = {"source": {"model": str(source), "commit": None}, "variant": {"spec": variant.model_dump(mode="json")}}
    (release / "tame.json").write_text(json.dumps(told))
    found = _rederive(str(release), 10_000, str(source), silent)
    assert found.problems == []
    assert len(found.checked) == found.of


@pytest.mark.parametrize("kind", SOURCES)
def test_released_again_as_from_the_dequantized_model(kind: str, tmp_path: Path) -> None:
    shipped, dense = both(kind, tmp_path)
    check_source(shipped)
    for method in ("nf4", "w4a16", "fp8"):
        for source, name in ((shipped, f"{method}-shipped"), (dense, f"{method}-dense")):
            quantize(source, tmp_path / name, Variant(method=method))
        mine, wanted = (tensors(tmp_path / f"{method}-{name}") for name in ("shipped", "dense"))
        assert mine.keys() == wanted.keys()
        for tensor, made in mine.items():
            assert made.dtype == wanted[tensor].dtype
            assert made.view(torch.uint8).equal(wanted[tensor].view(torch.uint8)), tensor
        released_again(shipped, tmp_path / f"{method}-shipped", Variant(method=method))
    assert quantization_of(tmp_path / "fp8-shipped")["quant_method"] != "fp8"
    loaded(tmp_path / "w4a16-shipped")
    (seen,) = preview(shipped, [Variant(method="fp8")])
    assert seen["weight_bytes"] == sum(one.nbytes for one in tensors(tmp_path / "fp8-shipped").values())


@pytest.mark.parametrize(
    ("kind", "said"), [("gpt-oss", "MXFP4 experts as shipped"), ("fp8-block", "activations rounded")]
)
def test_the_baseline_is_the_source_as_its_authors_ship_it(kind: str, said: str, tmp_path: Path) -> None:
    from configs.schema import Evaluate, Source
    from tasks.evaluate.model import dequantize, load
    from tasks.evaluate.perplexity import score_alone
    from tasks.plan import look_at
    from tasks.quantize.preview import parameters_of

    shipped, dense = both(kind, tmp_path)
    tokenizer().save_pretrained(shipped)
    tokenizer().save_pretrained(dense)
    losses = []
    for folder in (shipped, dense):
        look_at(Source(model=str(folder)))
        loaded = load(folder, "cpu")
        dequantize(loaded)
        out = tmp_path / f"{folder.name}-scores"
        out.mkdir()
        score_alone(loaded, TEXT, Evaluate(window=32, max_tokens=128), out)
        losses.append(np.load(out / "windows.npz")["loss"])
    protocol = json.loads((tmp_path / "shipped-scores" / "result.json").read_text())["protocol"]
    assert said in protocol["weights"]
    assert (losses[0] == losses[1]).all() == (kind == "gpt-oss")  # or activations are rounded, too
    assert losses[0] == pytest.approx(losses[1], rel=0.2)
    assert parameters_of(shipped) == pytest.approx(parameters_of(dense), rel=0.001)


def test_what_is_not_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    shipped, _ = both("w4a16", tmp_path)
    config = json.loads((shipped / "config.json").read_text())
    texts, variant = calibration(tmp_path / "texts"), Variant(method="nf4", calibrate=True)
    with pytest.raises(BadInputError, match="calibrates on sources in 16 or 32 bits alone"):
        quantize(shipped, tmp_path / "calibrated", variant, calibration=texts)
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False
    (shipped / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInputError, match="does not read"):
        quantize(shipped, tmp_path / "asymmetric", Variant(method="nf4"))
    for name in ("gptq", "awq", "bitsandbytes"):
        config["quantization_config"] = {"quant_method": name}
        (shipped / "config.json").write_text(json.dumps(config))
        with pytest.raises(BadInputError, match="already quantized"):
            check_source(shipped)
