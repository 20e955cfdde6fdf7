"""How fast a model answers and what memory it takes, as its users will run it."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from configs.schema import Speed
from tasks.download.text import CHARACTERS_PER_TOKEN
from tasks.evaluate.generate import generate
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
    ids = loaded.tokens(text)
    return ids.repeat(1, count // ids.shape[1] + 1)[:, :count]


def _time(loaded: Loaded, prompt: Any, new_tokens: int) -> tuple[float, float]:
    """Seconds until the first token, and for the `new_tokens` - 1 after it."""
    clock = Clock()
    synchronize(loaded.device)
    started = time.perf_counter()
    generate(loaded, prompt, new_tokens, stop=False, streamer=clock)
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
