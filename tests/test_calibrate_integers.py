"""w4a16 with codes that are chosen on a text: the same format and size, a smaller error, experts by the tokens that reach them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import BadInputError
from configs.schema import Variant
from tasks.values import Calibration, CalibrationText
from tests.models import ZOO, quantize, tiny, tokenizer, zoo
from tests.test_compressed_tensors import loaded, tensors


def calibration(folder: Path, rows: int = 48, length: int = 32) -> Calibration:
    """Sequences of Python's documentation, in the tests' own tokens."""
    from pydoc_data.topics import topics

    from safetensors.torch import save_file

    text = "".join(topics.values())[: rows * length * 4]
    ids = torch.tensor(tokenizer()(text)["input_ids"][: rows * length], dtype=torch.int32).view(rows, length)
    folder.mkdir()
    save_file({"ids": ids}, folder / "ids.safetensors")
    texts = [CalibrationText(name="docs", sha256="0" * 64, characters=len(text), sequences=rows)]
    return Calibration(path=str(folder), digest="0" * 64, texts=texts, sequences=rows, length=length)


PLAIN = Variant(method="w4a16", group_size=32)


def calibrated(level: Any = True, **rest: Any) -> Variant:
    return Variant(method="w4a16", **{"group_size": 32, **rest}, calibrate=level)


@torch.no_grad()
def error(source: Path, made: Path, texts: Calibration) -> float:
    """How far the logits of a checkpoint are from its source's, on what it was calibrated on."""
    from safetensors.torch import load_file

    ids = load_file(Path(texts.path) / "ids.safetensors")["ids"].long()
    wanted = loaded(source)(ids).logits.float()
    found: torch.Tensor = loaded(made)(ids).logits.float()
    return float((found - wanted).norm() / wanted.norm())


def source_of(name: str, folder: Path) -> Path:
    """A model of one block: a second one would cost the tests' time, and try nothing new."""
    import transformers

    kind, values = ZOO[name]
    one = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    values = {**values, **{key: value for key, value in one.items() if key in values}}
    return tiny(folder / "source", getattr(transformers, kind)(**values), spread=True)


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe", "mixtral"])
def test_the_same_tensors_with_less_error(name: str, tmp_path: Path) -> None:
    source = source_of(name, tmp_path)
    texts = calibration(tmp_path / "texts")
    quantize(source, tmp_path / "plain", PLAIN)
    written = quantize(source, tmp_path / "made", calibrated(), calibration=texts)
    plain, made = tensors(tmp_path / "plain"), tensors(tmp_path / "made")
    assert {key: (one.shape, one.dtype) for key, one in plain.items()} == {
        key: (one.shape, one.dtype) for key, one in made.items()
    }
    packed = [key for key in plain if key.endswith("weight_packed")]
    changed = [key for key in packed if not made[key].equal(plain[key])]
    assert len(changed) == len(packed), set(packed) - set(changed)
    assert all(made[key].equal(plain[key]) for key in plain if key.endswith(("norm.weight", "weight_shape")))
    assert not [note for note in written.notes if "rounded plainly" in note]
    assert error(source, tmp_path / "made", texts) < 0.95 * error(source, tmp_path / "plain", texts)


def test_an_expert_that_few_tokens_reach_is_rounded_and_counted(tmp_path: Path) -> None:
    source = source_of("qwen3-moe", tmp_path)
    texts = calibration(tmp_path / "texts", rows=3)
    quantize(source, tmp_path / "plain", PLAIN)
    written = quantize(source, tmp_path / "made", calibrated(), calibration=texts)
    (note,) = [note for note in written.notes if "rounded plainly" in note]
    assert "of 16 quantized weights" in note
    assert ".experts." in note
    plain, made = tensors(tmp_path / "plain"), tensors(tmp_path / "made")
    same = [key for key in plain if key.endswith("weight_packed") and made[key].equal(plain[key])]
    assert not any("self_attn" in key for key in same)


def test_scales_alone_are_searched_by_what_each_expert_is_given(tmp_path: Path) -> None:
    source = source_of("qwen3-moe", tmp_path)
    texts = calibration(tmp_path / "texts")
    quantize(source, tmp_path / "plain", PLAIN)
    quantize(source, tmp_path / "made", calibrated("fast"), calibration=texts)
    assert error(source, tmp_path / "made", texts) < error(source, tmp_path / "plain", texts)


def test_rows_without_groups_are_refused_and_so_are_two_searches(tmp_path: Path) -> None:
    source = source_of("llama", tmp_path)
    with pytest.raises(BadInputError, match="give group_size 32, 64 or 128"):
        quantize(source, tmp_path / "made", calibrated(group_size=-1), calibration=calibration(tmp_path / "texts"))
    with pytest.raises(ValueError, match="leave one out"):
        Variant(method="w4a16", calibrate=True, scale="search")


def test_split_experts_compute_what_the_fused_ones_do() -> None:
    from transformers import AutoModelForCausalLM

    from tasks.calibrate.experts import SplitExperts, splits

    for name in ("qwen3-moe", "mixtral", "deepseek-v3"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(zoo(name), dtype=torch.float32).eval()
        experts = next(module for module in model.modules() if splits(module))
        hidden, index = torch.randn(20, 64), torch.randint(0, 4, (20, 2))
        index[:, 1] = (index[:, 0] + 1) % 4
        share = torch.rand(20, 2)
        with torch.no_grad():
            assert torch.allclose(experts(hidden, index, share), SplitExperts(experts)(hidden, index, share), atol=1e-6)
