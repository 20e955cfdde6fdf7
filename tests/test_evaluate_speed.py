"""Speed and samples: what a model answers, and that every kind of model can be timed."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.errors import BadInputError
from configs.schema import Evaluate, Samples, Speed
from tasks.evaluate.model import Loaded, load
from tasks.evaluate.samples import answer_samples
from tasks.evaluate.speed import measure_speed
from tests.models import VOCABULARY, tiny

PROMPT, NEW = "The import statement", 8


def stateful() -> dict[str, Any]:
    """Models that keep another state than keys and values, or none at all."""
    import transformers as t

    small = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 128}
    return {
        "mamba": t.MambaConfig(**small),
        "mamba2": t.Mamba2Config(**small, num_heads=8, head_dim=16, state_size=16, n_groups=2),
        "falcon-mamba": t.FalconMambaConfig(**small),
        "rwkv": t.RwkvConfig(**small, attention_hidden_size=64, context_length=512),
        "recurrent-gemma": t.RecurrentGemmaConfig(
            **{**small, "num_hidden_layers": 3}, **heads, lru_width=64, attention_window_size=32
        ),
        "gpt, no cache": t.OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=512),
    }


def most_likely(loaded: Loaded, prompt: str, count: int) -> list[int]:
    """The tokens that a loop over all logits finds most likely to follow."""
    import torch

    ids = loaded.tokenizer(prompt)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        for _ in range(count):
            ids = [*ids, int(loaded.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return list(ids[start:])


def text_of(loaded: Loaded, ids: list[int]) -> str:
    """Tokens as text."""
    return str(loaded.tokenizer.decode(ids, skip_special_tokens=True))


def answer(loaded: Loaded, folder: Path) -> str:
    """What tame's samples say."""
    folder.mkdir()
    answer_samples(loaded, Samples(prompts=[PROMPT], new_tokens=NEW), folder)
    (text,) = json.loads((folder / "result.json").read_text())["answers"]
    return str(text)


@pytest.mark.parametrize("which", range(6))
def test_models_with_another_state_are_timed_and_answer_greedily(which: int, tmp_path: Path) -> None:
    loaded = load(tiny(tmp_path / "model", list(stateful().values())[which], "float32"), "cpu")
    loaded.model.generation_config.eos_token_id = None
    assert answer(loaded, tmp_path / "samples") == text_of(loaded, most_likely(loaded, PROMPT, NEW))
    (tmp_path / "speed").mkdir()
    measure_speed(loaded, Speed(prompt_tokens=16, new_tokens=4, repeats=2), tmp_path / "speed")
    result = json.loads((tmp_path / "speed" / "result.json").read_text())
    first, rest = sorted(result["times"]["first"]), sorted(result["times"]["rest"])
    metrics = result["metrics"]
    assert metrics["time_to_first_token_seconds"] == pytest.approx(sum(first) / 2)
    assert metrics["prefill_tokens_per_second"] == pytest.approx(16 / (sum(first) / 2))
    assert metrics["decode_tokens_per_second"] == pytest.approx(3 / (sum(rest) / 2))
    assert (metrics["time_to_first_token_seconds_low"], metrics["time_to_first_token_seconds_high"]) == tuple(first)
    assert metrics["prefill_tokens_per_second_low"] == pytest.approx(16 / first[1])
    assert metrics["decode_tokens_per_second_high"] == pytest.approx(3 / rest[0])


def test_beams_penalties_and_sampling_of_a_generation_config_do_not_apply(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model", dtype="float32", spread=True)
    plain = load(folder, "cpu")
    expected = text_of(plain, most_likely(plain, PROMPT, NEW))
    config = {
        "num_beams": 4, "repetition_penalty": 1.9, "no_repeat_ngram_size": 1, "do_sample": True, "temperature": 3.0,
        "length_penalty": 2.0, "max_length": 5, "bad_words_ids": [[3]], "eos_token_id": 511,
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(config))
    loaded = load(folder, "cpu")
    assert loaded.model.generation_config.num_beams == 4
    assert answer(loaded, tmp_path / "samples") == expected
    assert loaded.model.generation_config.num_beams == 4  # lm-evaluation-harness sees the model as it was


def test_an_answer_ends_where_the_model_ends_it(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model", dtype="float32", spread=True)
    loaded = load(folder, "cpu")
    ids = most_likely(loaded, PROMPT, NEW)
    loaded.model.generation_config.eos_token_id = [ids[2]]
    assert answer(loaded, tmp_path / "samples") == text_of(loaded, ids[: ids.index(ids[2]) + 1])


def test_a_tokenizer_that_is_larger_than_the_embedding_is_said_to_be(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    from tasks.evaluate.perplexity import score_baseline

    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    loaded = load(tiny(tmp_path / "model", config), "cpu")
    spec = Evaluate(window=16, max_tokens=None, batch_size=4)
    said = r"the tokenizer makes token \d+, but the model has embeddings for 300 tokens only, 0 to 299"
    with pytest.raises(BadInputError, match=said):
        answer(loaded, tmp_path / "samples")
    with pytest.raises(BadInputError, match=said):
        measure_speed(loaded, Speed(prompt_tokens=16, new_tokens=2, repeats=1), tmp_path)
    with pytest.raises(BadInputError, match=said):
        score_baseline(loaded, "The import statement " * 20, spec, tmp_path)
