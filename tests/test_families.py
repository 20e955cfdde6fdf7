"""Families of models: each goes from its plan to its numbers, or is refused in the plan in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import BadInputError
from configs.schema import Evaluate, Source, TextSource, Variant
from tasks.download.text import load_text
from tasks.evaluate.model import dequantize, load
from tasks.evaluate.perplexity import score_baseline, score_variant
from tasks.plan import look_at
from tests.models import VOCABULARY, quantize, tiny, zoo

TEXT = load_text(TextSource(builtin="python-docs")).text[:20_000]
SPEC = Evaluate(window=32, max_tokens=32 * 4, batch_size=4)
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 0}


def config_of(name: str) -> Any:
    import transformers as t

    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
        "patch_size": 16,
    }  # fmt: skip
    made = {
        "mamba2": lambda: t.Mamba2Config(**SMALL, num_heads=8, head_dim=16, state_size=16, n_groups=2),
        "mistral3": lambda: t.Mistral3Config(
            vision_config={**vision, "model_type": "pixtral", "head_dim": 16},
            text_config={
                **SMALL, "model_type": "mistral", "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
                "head_dim": 16,
            },
            image_token_index=5,
        ),
    }  # fmt: skip
    return made[name]() if name in made else zoo(name)


@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "gemma3-vision", "mistral3", "mamba", "mamba2", "qwen3-next"])
def test_a_family_goes_from_plan_to_numbers(name: str, tmp_path: Path) -> None:
    import torch

    source = tiny(tmp_path / "source", config_of(name), "float32")
    look_at(Source(model=str(source)))
    quantize(source, tmp_path / "nf4", Variant(method="nf4"))
    (tmp_path / "base").mkdir()
    (tmp_path / "variant").mkdir()
    loaded = load(source, "cpu")
    score_baseline(loaded, TEXT, SPEC, tmp_path / "base")
    variant = load(tmp_path / "nf4", "cpu")
    dequantize(variant)
    score_variant(variant, tmp_path / "base", source, 4, tmp_path / "variant")
    ids = torch.from_numpy(np.load(tmp_path / "base" / "tokens.npy")).long()
    with torch.no_grad():
        logits = loaded.model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    expected = float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))
    assert np.load(tmp_path / "base" / "windows.npz")["loss"].mean() == pytest.approx(expected, rel=1e-4)
    assert np.load(tmp_path / "variant" / "windows.npz")["kl"].mean() > 0
    notes = json.loads((tmp_path / "base" / "result.json").read_text())["notes"]
    if name in ("llava", "qwen2-vl", "gemma3-vision", "mistral3"):
        assert any("only its language model was measured" in note for note in notes)


@pytest.mark.parametrize(
    ("kind", "architecture", "said"),
    [
        ("t5", "T5ForConditionalGeneration", "an encoder-decoder"),
        ("whisper", "WhisperForConditionalGeneration", "turns speech into text"),
        ("llama", "LlamaForSequenceClassification", "gives scores, as reward models do"),
        ("qwen3", "Qwen3Model", "has no output head, as embedding models have none"),
    ],
)
def test_others_are_refused_in_the_plan_in_one_line(
    kind: str, architecture: str, said: str, tiny_llama: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": kind, "architectures": [architecture]}))
    with pytest.raises(BadInputError, match=said) as refused:
        look_at(Source(model=str(source)))
    assert "\n" not in str(refused.value)


def test_without_bfloat16_a_model_is_measured_in_float16(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.evaluate import float16, task
    from tasks.evaluate.run import Work

    def key() -> Any:
        work = Work(model=str(tiny_llama), label="m", device="cpu", trust_remote_code=False, spec=SPEC, role="alone")
        return task._common(work, "digest")

    own = key()
    for module in (float16, task):
        monkeypatch.setattr(module, "instead_of_bfloat16", lambda device: "float16")
    assert key() == {**own, "instead_of_bfloat16": "float16"}
    loaded = load(tiny_llama, "cpu")
    assert loaded.dtype == "float16"
    score_baseline(loaded, TEXT, SPEC, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["protocol"]["dtype"] == "float16"
    assert result["notes"] == ["the device has no bfloat16, so that this model was measured in float16"]
    quantize(tiny_llama, tmp_path / "nf4", Variant(method="nf4", compute_dtype="bfloat16"))
    kinds = {str(getattr(m, "compute_dtype", None)) for m in load(tmp_path / "nf4", "cpu").model.modules()} - {"None"}
    assert kinds == {"torch.float16"}
    assert load(tiny(tmp_path / "float32", dtype="float32"), "cpu").dtype == "float32"
    for parameter in loaded.model.model.layers[1].mlp.parameters():
        parameter.data.mul_(1e4)
    from configs.errors import TameError

    with pytest.raises(TameError, match=r"that of model.layers.1.mlp.* leave float16's range: measure it on a device"):
        score_baseline(loaded, TEXT, SPEC, tmp_path)
