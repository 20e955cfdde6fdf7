"""How fast a model answers and what memory it takes, as its users will run it; and what it answers."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from configs.schema import Samples, Speed
from tasks.download.text import CHARACTERS_PER_TOKEN
from tasks.evaluate.memory import synchronize
from tasks.evaluate.model import Loaded
from tasks.runtime.progress import Progress, silent

RESULT = "result.json"


def measure_speed(loaded: Loaded, spec: Speed, folder: Path, progress: Progress = silent) -> None:
    """Time one prompt and the tokens decoded after it, batch size 1; the medians of `spec.repeats` after a warm-up.

    Call it first in a fresh process: peak memory is that of the process since its start. Writes result.json:
    load_seconds, peak_memory_bytes (of the GPU where there is one, else of the process), peak_host_memory_bytes,
    time_to_first_token_seconds, prefill_tokens_per_second, decode_tokens_per_second, each with its range.
    """
    import torch

    prompt = _prompt(loaded, spec.prompt_tokens)
    firsts, rests = [], []
    for repeat in range(spec.repeats + 1):
        first, rest = _time(loaded, prompt, 2 if repeat == 0 else spec.new_tokens)
        if repeat:
            firsts.append(first)
            rests.append(rest)
        progress("speed", repeat, spec.repeats)
    host = _peak_host_memory()
    metrics = {
        "load_seconds": loaded.seconds,
        "peak_memory_bytes": float(_peak_device_memory() if loaded.device.startswith("cuda") else host),
        "peak_host_memory_bytes": float(host),
        **_repeated("time_to_first_token_seconds", firsts, lambda first: first),
        **_repeated("prefill_tokens_per_second", firsts, lambda first: spec.prompt_tokens / first),
        **_repeated("decode_tokens_per_second", rests, lambda rest: (spec.new_tokens - 1) / rest),
    }
    protocol = {**spec.model_dump(), "batch_size": 1, "threads": torch.get_num_threads(), "weights": loaded.weights}
    _write(
        folder,
        {"metrics": metrics, "protocol": protocol, "notes": loaded.notes, "times": {"first": firsts, "rest": rests}},
    )


def _repeated(name: str, times: list[float], metric: Callable[[float], float]) -> dict[str, float]:
    """The metric of the median of `times`, and, of several, its range as the ends of its interval."""
    ends = sorted((metric(min(times)), metric(max(times))))
    spread = {f"{name}_low": ends[0], f"{name}_high": ends[1]} if len(times) > 1 else {}
    return {name: metric(statistics.median(times)), **spread}


def answer_samples(loaded: Loaded, spec: Samples, folder: Path, progress: Progress = silent) -> None:
    """Continue every prompt greedily. Writes result.json: answers, one text for each prompt."""
    answers = []
    for index, prompt in enumerate(spec.prompts):
        ids = _tokens(loaded, prompt)
        output = _continue(loaded, ids, spec.new_tokens, stop=True)
        answers.append(loaded.tokenizer.decode(output[ids.shape[1] :], skip_special_tokens=True))
        progress("samples", index + 1, len(spec.prompts))
    _write(folder, {"answers": answers})


def _tokens(loaded: Loaded, text: str) -> Any:
    """The tokens of `text` [1, tokens] on the model's device; at least one."""
    import torch

    ids = loaded.tokenizer(text)["input_ids"] or [loaded.tokenizer.eos_token_id or 0]
    loaded.check_tokens(ids)
    return torch.tensor([ids], device=loaded.device)


def _continue(loaded: Loaded, ids: Any, new_tokens: int, stop: bool, streamer: Any = None) -> Any:
    """`ids` [1, tokens] and the tokens that the model finds most likely after them, by transformers' own `generate`.

    A model's generation_config.json may ask for beams, penalties or sampling. None of it applies here: greedy is greedy.

    Args:
        loaded: The model.
        ids: The prompt.
        new_tokens: How many tokens to generate.
        stop: Whether to stop earlier, at the model's end-of-text token.
        streamer: Told every token as it is made.
    """
    import torch
    from transformers import GenerationConfig

    model = loaded.model
    ends = getattr(model.generation_config, "eos_token_id", None)
    pad = loaded.tokenizer.pad_token_id or loaded.tokenizer.eos_token_id or 0
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=ends if stop else None, pad_token_id=pad
    )
    own, model.generation_config = model.generation_config, greedy
    try:
        with torch.inference_mode():
            return model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer)[0]
    finally:
        model.generation_config = own


class Clock:
    """A streamer for `generate` that keeps the time at which each token was there, the prompt's first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _tokens: Any) -> None:
        """Take tokens. They are on the CPU, so a GPU has finished them."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """There are no more tokens."""


def _prompt(loaded: Loaded, count: int) -> Any:
    """The first `count` tokens of the prose inside CPython, repeated if it is shorter."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[key] for key in sorted(topics))[: count * CHARACTERS_PER_TOKEN]
    ids = _tokens(loaded, text)
    return ids.repeat(1, count // ids.shape[1] + 1)[:, :count]


def _time(loaded: Loaded, prompt: Any, new_tokens: int) -> tuple[float, float]:
    """Seconds until the first token, and for the `new_tokens` - 1 after it."""
    clock = Clock()
    synchronize(loaded.device)
    started = time.perf_counter()
    _continue(loaded, prompt, new_tokens, stop=False, streamer=clock)
    _, first, *_, last = clock.times
    return first - started, last - first


def _peak_device_memory() -> int:
    import torch

    return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))


def _peak_host_memory() -> int:
    """Bytes, the most this process had. Not ru_maxrss: a process starts with that of its parent."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    except (OSError, StopIteration):
        return int(psutil.Process().memory_info().rss)


def _write(folder: Path, result: dict[str, Any]) -> None:
    (folder / RESULT).write_text(json.dumps(result, indent=1))
