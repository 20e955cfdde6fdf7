"""A method that tame does not have goes all the way, from one file that answers its two protocols."""

import json
from pathlib import Path

import pytest
import yaml

from configs import method_names
from tasks.quantize import methods
from tests.test_flow import Place

WITH_IT = "import sys; from tests import second_method; second_method.release(*sys.argv[1:])"


@pytest.fixture
def place(tmp_path: Path, prefect_url: str) -> Place:
    return Place(tmp_path, prefect_url)


def test_every_name_of_a_method_has_a_method() -> None:
    assert method_names.METHODS.keys() == methods.METHODS.keys()


def test_a_method_of_one_file_is_quantized_measured_judged_described_and_published(
    place: Place, tiny_llama: Path
) -> None:
    from safetensors.torch import load_file

    recipe = place.recipe(
        tiny_llama, variants=[{"method": "bits16"}], gate={"max_mean_kl": 1e-6, "min_top1_agreement": 0.999}
    )
    code, output, errors = place.tame(recipe, place.folder / "out", code=("-c", WITH_IT))
    assert code == 0, output + errors
    (variant,) = json.loads((place.folder / "out" / "result.json").read_text())["variants"]
    assert (variant["name"], variant["status"]) == ("bits16", "published")
    metrics = variant["metrics"]
    assert (metrics["weight_error_max"], metrics["top1_agreement"]) == (0, 1)
    assert metrics["kl_mean"] == pytest.approx(0, abs=1e-9)
    assert 0.5 < metrics["quantized_share"] < 0.9
    assert "integers read as bfloat16" in variant["protocol"].values()
    published = Path(variant["published"])
    card = (published / "README.md").read_text()
    assert "quantized to 16-bit integers by tame" in card
    assert "pip install transformers accelerate bits16-kernels" in card
    assert "Nothing but tame's tests reads it." in card
    assert "16-bit" in yaml.safe_load(card.split("---\n")[1])["tags"]
    stored, source = (load_file(folder / "model.safetensors") for folder in (published, tiny_llama))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert name not in stored
    assert stored[f"{name}_codes"].view(source[name].dtype).equal(source[name])
    assert stored[f"{name}_shape"].tolist() == list(source[name].shape)
