"""How fast a model answers and what memory it takes, as its users will run it; and what it answers."""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import psutil

from configs.schema import Samples, Speed
from tasks.evaluate.model import Loaded, synchronize
from tasks.runtime.progress import Progress, silent

RESULT = "result.json"


def measure_speed(loaded: Loaded, spec: Speed, folder: Path, progress: Progress = silent) -> None:
    """Time one prompt and the tokens decoded after it, batch size 1; the medians of `spec.repeats` after a warm-up.

    Call it first in a fresh process: peak memory is that of the process since its start. Writes result.json:
    load_seconds, peak_memory_bytes (of the GPU where there is one, else of the process), peak_host_memory_bytes,
    time_to_first_token_seconds, prefill_tokens_per_second, decode_tokens_per_second.
    """
    import torch

    prompt = _prompt(loaded, spec.prompt_tokens)
    firsts, rests = [], []
    for repeat in range(spec.repeats + 1):
        first, rest = _answer(loaded, prompt, 2 if repeat == 0 else spec.new_tokens)
        if repeat:
            firsts.append(first)
            rests.append(rest)
        progress("speed", repeat, spec.repeats)
    first, rest = statistics.median(firsts), statistics.median(rests)
    host = _peak_host_memory()
    metrics = {
        "load_seconds": loaded.seconds,
        "peak_memory_bytes": float(_peak_device_memory() if loaded.device.startswith("cuda") else host),
        "peak_host_memory_bytes": float(host),
        "time_to_first_token_seconds": first,
        "prefill_tokens_per_second": spec.prompt_tokens / first,
        "decode_tokens_per_second": (spec.new_tokens - 1) / rest,
    }
    protocol = {**spec.model_dump(), "batch_size": 1, "threads": torch.get_num_threads(), "weights": loaded.weights}
    _write(
        folder,
        {"metrics": metrics, "protocol": protocol, "notes": loaded.notes, "times": {"first": firsts, "rest": rests}},
    )


def answer_samples(loaded: Loaded, spec: Samples, folder: Path, progress: Progress = silent) -> None:
    """Continue every prompt greedily. Writes result.json: answers, one text for each prompt."""
    import torch

    answers = []
    for index, prompt in enumerate(spec.prompts):
        ids = torch.tensor(
            [loaded.tokenizer(prompt)["input_ids"] or [loaded.tokenizer.eos_token_id or 0]], device=loaded.device
        )
        with torch.inference_mode():
            output = loaded.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=spec.new_tokens,
                pad_token_id=loaded.tokenizer.pad_token_id or loaded.tokenizer.eos_token_id or 0,
            )
        answers.append(loaded.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
        progress("samples", index + 1, len(spec.prompts))
    _write(folder, {"answers": answers})


def _prompt(loaded: Loaded, count: int) -> Any:
    """The first `count` tokens of the prose inside CPython, over again where it is shorter."""
    from pydoc_data.topics import topics

    import torch

    text = "\n\n".join(topics[key] for key in sorted(topics))[: count * 32]
    ids = loaded.tokenizer(text)["input_ids"] or [0]
    return torch.tensor([(ids * (count // len(ids) + 1))[:count]], device=loaded.device)


def _answer(loaded: Loaded, prompt: Any, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and for the `new_tokens` - 1 after it."""
    import inspect

    import torch

    model = loaded.model
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.inference_mode():
        synchronize(loaded.device)
        started = time.perf_counter()
        output = model(input_ids=prompt, use_cache=True, **last)
        token = output.logits[:, -1:].argmax(-1)
        synchronize(loaded.device)
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            output = model(
                input_ids=token.to(loaded.device), past_key_values=output.past_key_values, use_cache=True, **last
            )
            token = output.logits[:, -1:].argmax(-1)
        synchronize(loaded.device)
    return first - started, time.perf_counter() - first


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
