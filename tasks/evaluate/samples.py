"""What a model answers to a few prompts, greedily: through its chat template where it has one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from configs.schema import Samples
from tasks.download.tokenizer_files import thinks
from tasks.evaluate.generate import generate
from tasks.evaluate.model import Loaded
from tasks.runtime.progress import Progress, silent

RESULT = "result.json"
STAGE = 2  # raise it when what is asked, or how, changes
TEXTS: list[str | list[str]] = [
    "The capital of France is",
    "Explain in two sentences why the sky is blue.",
    "def fibonacci(n):",
]
CONVERSATIONS: list[str | list[str]] = [
    "Why is the sky blue? Answer in one sentence.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Translate into French: The library opens at nine on Saturdays.",
    [
        "I have three apples and buy two more. How many do I have?",
        "You have five apples.",
        "I give one of them to a friend. How many are left?",
    ],
]
THOUGHTS = ("</think>", "</thinking>", "[/THINK]", "</seed:think>", "<|END_THINKING|>", "<|channel|>final<|message|>")
"""What stands between a thought and the answer, by model family."""
BEGINNINGS = (
    "<think>",
    "<thinking>",
    "[THINK]",
    "<seed:think>",
    "<|START_THINKING|>",
    "<|channel|>analysis<|message|>",
)


class Answer(NamedTuple):
    """What was answered, and what was thought before; `thought` is None where nothing was."""

    text: str
    thought: str | None


def answer_samples(loaded: Loaded, spec: Samples, folder: Path, progress: Progress = silent) -> None:
    """Answer every prompt greedily, as one turn of a conversation where the tokenizer has a chat template.

    Writes result.json: prompts, answers, thoughts (None where a model thought nothing), one for each prompt; protocol.
    """
    template = loaded.tokenizer.chat_template
    prompts = spec.prompts if spec.prompts is not None else CONVERSATIONS if template else TEXTS
    answers = []
    for index, prompt in enumerate(prompts):
        turns = [prompt] if isinstance(prompt, str) else prompt
        ids = _conversation(loaded, turns) if template else loaded.tokens("\n\n".join(turns))
        answers.append(_answer(loaded, spec, ids, thinks(template)))
        progress("samples", index + 1, len(prompts))
    result = {
        "prompts": [_shown(prompt) for prompt in prompts],
        "answers": [answer.text for answer in answers],
        "thoughts": [answer.thought for answer in answers],
        "protocol": {"chat_template": "the model's" if template else "none", **spec.model_dump(exclude={"prompts"})},
    }
    (folder / RESULT).write_text(json.dumps(result))


def _shown(prompt: str | list[str]) -> str:
    """A prompt as people read it."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{'Assistant' if i % 2 else 'User'}: {turn}" for i, turn in enumerate(prompt))


def _conversation(loaded: Loaded, turns: Sequence[str]) -> Any:
    """The tokens of a conversation [1, tokens], up to where the model is to answer."""
    messages = [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
    text = loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return loaded.tokens(str(text), special=False)  # a template has written its own


def _answer(loaded: Loaded, spec: Samples, ids: Any, thinking: bool) -> Answer:
    if not thinking:
        found = generate(loaded, ids, spec.new_tokens, stop=True)
        return Answer(loaded.tokenizer.decode(found, skip_special_tokens=True), None)
    found = generate(loaded, ids, spec.thinking_tokens + spec.new_tokens, stop=True, until=_Answered(loaded, ids, spec))
    return _apart(loaded, found, _said(loaded, ids[0].tolist()[-8:]))


def _apart(loaded: Loaded, ids: list[int], before: str) -> Answer:
    """An answer apart from its thought: by what stands between them, wherever in the tokens that is complete.

    Args:
        loaded: The model.
        ids: What was generated.
        before: The end of the prompt: a template may begin the thought itself.
    """
    said = _said(loaded, ids)
    decode = loaded.tokenizer.decode
    if any(mark in said for mark in THOUGHTS):
        end = next(i for i in range(1, len(ids) + 1) if any(mark in _said(loaded, ids[:i]) for mark in THOUGHTS))
        thought, text = _said(loaded, ids[:end]), decode(ids[end:], skip_special_tokens=True)
    elif any(mark in before.rstrip()[-40:] or said.lstrip().startswith(mark) for mark in BEGINNINGS):
        thought, text = said, ""  # there was no room to end it
    else:
        return Answer(decode(ids, skip_special_tokens=True), None)
    for mark in (*THOUGHTS, *BEGINNINGS, *loaded.tokenizer.all_special_tokens):
        thought = thought.replace(mark, "")
    return Answer(text.strip(), thought.strip())


def _said(loaded: Loaded, ids: list[int]) -> str:
    return str(loaded.tokenizer.decode(ids, skip_special_tokens=False))


class _Answered:
    """When to stop: a thought is over, and the answer after it has as many tokens as it may have."""

    def __init__(self, loaded: Loaded, prompt: Any, spec: Samples) -> None:
        self.loaded, self.start, self.spec = loaded, prompt.shape[1], spec
        self.ended: int | None = None

    def __call__(self, ids: Any, _scores: Any, **_options: Any) -> bool:
        count = ids.shape[1] - self.start
        if self.ended is None:
            last = _said(self.loaded, ids[0, self.start :].tolist()[-12:])
            self.ended = count if any(mark in last for mark in THOUGHTS) else None
        return self.ended is not None and count - self.ended >= self.spec.new_tokens
