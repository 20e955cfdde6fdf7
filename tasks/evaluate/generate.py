"""Text by a model, greedily, by transformers' own `generate`."""

from collections.abc import Callable
from typing import Any

from tasks.evaluate.model import Loaded

SENTINEL = "tame ends here"


def generate(
    loaded: Loaded,
    ids: Any,
    new_tokens: int,
    stop: bool,
    streamer: Any = None,
    until: Callable[..., bool] | None = None,
) -> list[int]:
    """The tokens that the model finds most likely after `ids` [1, tokens].

    A model's generation_config.json may ask for beams, penalties or sampling. None of it applies here: greedy is greedy.
    What it says of where an answer ends does: its end-of-text tokens, its stop strings.

    Args:
        loaded: The model.
        ids: The prompt.
        new_tokens: How many tokens to generate.
        stop: Whether to stop earlier, where the model ends.
        streamer: Told every token as it is made.
        until: Told all tokens, and the scores of the last, after each: whether to stop there.
    """
    import torch
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    class Until(StoppingCriteria):  # type: ignore[misc,unused-ignore]
        def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
            over = until is not None and until(input_ids, scores, **options)
            return torch.full((input_ids.shape[0],), over, device=input_ids.device, dtype=torch.bool)

    model, tokenizer = loaded.model, loaded.tokenizer
    own = model.generation_config
    strings = getattr(own, "stop_strings", None) if stop else None
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=_ends(loaded) if stop else None,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        stop_strings=strings,
    )
    more: dict[str, Any] = {"tokenizer": tokenizer} if strings else {}
    if until is not None:
        more["stopping_criteria"] = StoppingCriteriaList([Until()])
    model.generation_config = greedy
    try:
        with torch.inference_mode():
            made = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **more)[0]
    finally:
        model.generation_config = own
    return list(made[ids.shape[1] :].tolist())


def _ends(loaded: Loaded) -> list[int] | int | None:
    """The tokens that end an answer: those that the model names, and what its chat template puts after one.

    Many chat models name their end of text alone, and end each turn with another token, after which they would go on with
    the user's. Where a model names several tokens, or writes in channels, what it names is all.
    """
    named: list[int] | int | None = getattr(loaded.model.generation_config, "eos_token_id", None)
    template = loaded.tokenizer.chat_template
    if isinstance(named, list) and len(named) > 1:
        return named
    if not template or "<|channel|>" in template:
        return named
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": SENTINEL}]
    try:
        after = str(loaded.tokenizer.apply_chat_template(messages, tokenize=False)).rpartition(SENTINEL)[2]
    except Exception:  # a template may refuse any conversation, for reasons of its own
        return named
    ids = loaded.tokenizer(after, add_special_tokens=False)["input_ids"]
    ends = {ids[0]} & set(loaded.tokenizer.all_special_ids) if ids else set()
    return sorted({*(named if isinstance(named, list) else [] if named is None else [named]), *ends}) or None
