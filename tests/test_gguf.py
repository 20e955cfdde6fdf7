"""A .gguf becomes the checkpoint that it was made from, or is refused: nothing is made up, and nothing left out unsaid."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import BadInputError, TameError
from configs.schema import Source
from tasks.download.gguf import read_gguf
from tasks.download.inspection import inspect_source
from tasks.download.task import download
from tests.gguf_files import write
from tests.models import tiny, zoo


def logits(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.arange(1, 65)[None]).logits


def same_model(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same weights and compute the same."""
    import torch
    from safetensors.torch import load_file

    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    weights = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    return weights and torch.allclose(logits(one), logits(other), atol=1e-5)


@pytest.mark.parametrize(("name", "architecture"), [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3-tied", "qwen3")])
def test_a_gguf_becomes_the_model_it_was_made_from(
    tame_home: Path, tmp_path: Path, name: str, architecture: str
) -> None:
    model = tiny(tmp_path / "model", zoo(name), spread=True)
    snapshot = download(Source(model=str(write(tmp_path / "x.gguf", model, architecture=architecture))))
    assert same_model(Path(snapshot.path), model)


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ("token_embd.weight", "it has no token_embd.weight"),
        ("blk.1.", "it has no tensor of block 1 of 2"),
        ("blk.0.ffn_up.weight", "no tensor for model.layers.0.mlp.up_proj.weight of LlamaForCausalLM (1 are missing"),
        ("output_norm.weight", "no tensor for model.norm.weight"),
    ],
)
def test_a_gguf_that_lacks_a_tensor_is_refused(
    tame_home: Path, tiny_llama: Path, tmp_path: Path, without: str, said: str
) -> None:
    names = tuple(read_gguf(write(tmp_path / "whole.gguf", tiny_llama)).tensors)
    lacking = write(tmp_path / "x.gguf", tiny_llama, without=tuple(name for name in names if name.startswith(without)))
    with pytest.raises(TameError) as error:
        download(Source(model=str(lacking)))
    assert said in str(error.value)
    assert not list(tame_home.rglob("manifest.json"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "blk.0.attn_q.bias",
            "LlamaForCausalLM has no place for blk.0.attn_q.bias [64] and would leave it out (1 tensors",
        ),
        ("blk.2.attn_norm.weight", None),
        ("rope_factors_long.weight", "would leave out its rope_factors_long.weight"),
    ],
)
def test_a_tensor_that_transformers_has_no_place_for_is_said(
    tame_home: Path, tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, said: str | None
) -> None:
    path = write(tmp_path / "x.gguf", tiny_llama, tensors={name: np.ones(64, np.float32)})
    if said is None:  # a head for predicting a second token, which no transformers model has
        assert same_model(Path(download(Source(model=str(path))).path), tiny_llama)
        assert f"1 tensors of x.gguf, such as {name}, are no part of LlamaForCausalLM" in caplog.text
        return
    with pytest.raises(BadInputError) as error:
        download(Source(model=str(path)))
    assert said in str(error.value)


def llama3_factors(theta: float, size: int, factor: float, context: int) -> np.ndarray:
    """As llama.cpp's converter computes them, in its own words."""
    found = []
    for i in range(0, size, 2):
        wavelength = 2 * math.pi * theta ** (i / size)
        if wavelength < context / 4:
            found.append(1.0)
        elif wavelength > context:
            found.append(factor)
        else:
            smooth = (context / wavelength - 1) / 3
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def test_the_scaled_rotation_of_llama_3_is_kept(tame_home: Path, tmp_path: Path) -> None:
    config = zoo("llama")
    config.rope_parameters = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    model = tiny(tmp_path / "model", config)
    factors = llama3_factors(10000.0, 16, 8.0, 8192)
    path = write(tmp_path / "x.gguf", model, tensors={"rope_freqs.weight": factors})
    assert same_model(Path(download(Source(model=str(path))).path), model)
    other = write(tmp_path / "y.gguf", model, tensors={"rope_freqs.weight": factors * np.float32(1.5)})
    with pytest.raises(BadInputError, match=r"rope_freqs.weight is not Llama 3.1's scaling"):
        download(Source(model=str(other)))


def test_the_long_rotation_of_phi_3_is_kept(tame_home: Path, tmp_path: Path) -> None:
    long, short = [1.0 + i for i in range(6)], [1.0 + i / 8 for i in range(6)]
    config = zoo("phi3")
    config.original_max_position_embeddings = 128
    config.rope_parameters = {
        "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": long, "short_factor": short,
        "partial_rotary_factor": 0.75, "original_max_position_embeddings": 128,
    }  # fmt: skip
    model = tiny(tmp_path / "model", config)
    factors = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    path = write(
        tmp_path / "x.gguf",
        model,
        architecture="phi3",
        tensors={name: np.array(values, np.float32) for name, values in factors.items()},
        metadata={"phi3.rope.dimension_count": 12, "phi3.rope.scaling.original_context_length": 128},
    )
    made = Path(download(Source(model=str(path))).path)
    assert same_model(made, model)
    assert json.loads((made / "config.json").read_bytes())["rope_parameters"]["long_factor"] == long


SCALED = {
    "linear": ("llama", {"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
    "yarn": (
        "qwen2",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {"type": "yarn", "factor": 4.0, "original_context_length": 128},
    ),
}


@pytest.mark.parametrize("kind", SCALED)
def test_a_scaling_of_positions_that_transformers_does_not_read_is_kept(
    tame_home: Path, tmp_path: Path, kind: str
) -> None:
    name, parameters, metadata = SCALED[kind]
    config = zoo(name)
    config.rope_parameters = {"rope_theta": 10000.0, **parameters}
    model = tiny(tmp_path / "model", config)
    told = {f"{name}.rope.scaling.{key}": value for key, value in metadata.items()}
    path = write(tmp_path / "x.gguf", model, architecture=name, metadata=told)
    assert same_model(Path(download(Source(model=str(path))).path), model)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        (
            {"llama.feed_forward_length": 96},
            "mlp.down_proj.weight has the shape [64, 128], but its settings give LlamaForCausalLM [64, 96]",
        ),
        ({"llama.vocab_size": 1 << 30}, "its settings describe a model of"),
        ({"general.type": "adapter"}, "its general.type is 'adapter'"),
        ({"llama.pooling_type": 1}, "it makes embeddings, not text"),
        ({"tokenizer.ggml.tokens": None}, "it has no tokenizer"),
        ({"llama.rope.scaling.type": "dynamic"}, "rope.scaling.type is 'dynamic'"),
        (
            {"llama.attention.clamp_kqv": 8.0},
            "llama.attention.clamp_kqv is 8, which transformers' LlamaConfig has no name for",
        ),
        ({"llama.final_logit_softcapping": 30.0}, "llama.final_logit_softcapping is 30"),
    ],
)
def test_a_gguf_whose_settings_cannot_be_kept_is_refused(
    tame_home: Path, tiny_llama: Path, tmp_path: Path, metadata: dict[str, Any], said: str
) -> None:
    with pytest.raises(TameError) as error:
        download(Source(model=str(write(tmp_path / "x.gguf", tiny_llama, metadata=metadata))))
    assert said in str(error.value)


def test_a_truncated_gguf_is_refused_at_the_first_look(tiny_llama: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", tiny_llama)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(TameError, match="truncated"):
        inspect_source(Source(model=str(path)))


def test_all_parts_of_a_split_gguf_are_read(tame_home: Path, tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", zoo("llama"), spread=True)
    first = write(tmp_path / "x.gguf", model, per_part=8)
    assert len(list(tmp_path.glob("x-*-of-00003.gguf"))) == 3
    snapshot = download(Source(model=str(first)))
    assert snapshot.name == "x"
    assert same_model(Path(snapshot.path), model)
    assert not list(tame_home.rglob("*.gguf"))
    assert len(inspect_source(Source(model=str(first))).files) == 3
    second = tmp_path / "x-00002-of-00003.gguf"
    assert download(Source(model=str(second))).digest == snapshot.digest


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("missing", "x-00003-of-00003.gguf is missing, one of its 3 parts"),
        ("renamed", "its split.count says 3 parts, its name 1"),
        ("twice", "it does not say that it is part 2 of 3"),
        ("other model's", "split.tensors.count says 21"),
        ("truncated", "truncated"),
    ],
)
def test_a_split_gguf_that_is_not_whole_is_refused(tiny_llama: Path, tmp_path: Path, what: str, said: str) -> None:
    first = write(tmp_path / "x.gguf", tiny_llama, per_part=8)
    second, third = (tmp_path / f"x-0000{number}-of-00003.gguf" for number in (2, 3))
    if what == "missing":
        third.unlink()
    elif what == "renamed":
        first = first.rename(tmp_path / "y.gguf")
    elif what == "twice":
        shutil.copy(first, second)
    elif what == "other model's":
        write(tmp_path / "y.gguf", tiny_llama, per_part=8, without=("output.weight",))
        shutil.copy(tmp_path / "y-00003-of-00003.gguf", third)
    else:
        third.write_bytes(third.read_bytes()[:-40])
    with pytest.raises(TameError) as error:
        inspect_source(Source(model=str(first)))
    assert said in str(error.value)
