"""Formats for vLLM through the whole flow: quantized, evaluated, judged, described, and written into a folder."""

import re
from pathlib import Path

import pytest

from tests.models import tiny, zoo
from tests.test_flow import Place


@pytest.fixture
def place(tmp_path: Path, prefect_url: str) -> Place:
    return Place(tmp_path, prefect_url)


@pytest.mark.e2e
def test_a_mixture_of_experts_is_released_in_formats_for_vllm(place: Place) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny(place.folder / "model", zoo("qwen3-moe"), spread=True)
    variants = [{"method": "w4a16", "scale": "search"}, {"method": "fp8"}]
    measured = {"text": {"files": [str(place.folder / "text.txt")]}, "window": 64, "max_tokens": 128}
    recipe = place.recipe(
        model,
        variants=variants,
        evaluate={**measured, "speed": None, "samples": None},
        gate={"max_mean_kl": 50.0},
        publish={"to": "folder", "repo": "{model}-{variant}"},
    )
    code, result, output = place.run(recipe)
    assert code == 0, output
    assert not re.search(r"\dit/s|Compressing model|quantization config|Traceback", output)
    for found, bits in zip(result["variants"], (4, 8), strict=True):
        assert found["status"] == "published"
        assert found["metrics"]["quantized_share"] > 0.6
        assert bits < found["metrics"]["bits_per_weight"] < 16
        folder = Path(found["published"])
        card = (folder / "README.md").read_text()
        assert "vllm serve" in card
        assert "vLLM: `vllm serve" in card
        assert "tame has not tried it with these files" in card
        loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        assert loaded.config.quantization_config.quant_method == "compressed-tensors"
    searched, fp8 = ((Path(found["published"]) / "README.md").read_text() for found in result["variants"])
    assert "4-bit weights dequantized once" in searched
    assert "activations rounded to 8-bit floats" in fp8
