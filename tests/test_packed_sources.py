"""Sources that are quantized already are read as what they stand for: the same bytes as from the dequantized model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import BadInputError
from configs.schema import Variant
from tasks.download.checkpoint import check_source, quantization_of
from tasks.quantize.preview import preview
from tests.models import quantize, tiny, zoo
from tests.test_calibrate_integers import calibration
from tests.test_compressed_tensors import dequantized as by_compressed_tensors
from tests.test_compressed_tensors import loaded, tensors
from tests.test_finegrained_fp8 import dequantized as by_transformers
from tests.test_finegrained_fp8 import source_of

SOURCES: dict[str, dict[str, Any]] = {
    "fp8-block": {"method": "fp8-block"},
    "w4a16": {"method": "w4a16"},
    "w8a8": {"method": "w8a8"},
    "mxfp4": {"method": "mxfp4"},
    "nvfp4": {"method": "nvfp4"},
}


def both(kind: str, folder: Path) -> tuple[Path, Path]:
    """A checkpoint in a format, and the one that its owner's library makes of it in bfloat16."""
    if kind == "fp8-block":
        whole, read = source_of("deepseek-v3", folder), by_transformers
    else:
        whole, read = tiny(folder / "whole", zoo("qwen3"), spread=True), by_compressed_tensors
    quantize(whole, folder / "shipped", Variant(**SOURCES[kind]))
    read(whole, folder / "shipped")
    return folder / "shipped", folder / "shipped-dense"


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
    assert quantization_of(tmp_path / "fp8-shipped")["quant_method"] != "fp8"
    loaded(tmp_path / "w4a16-shipped")
    (seen,) = preview(shipped, [Variant(method="fp8")])
    assert seen["weight_bytes"] == sum(one.nbytes for one in tensors(tmp_path / "fp8-shipped").values())


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
