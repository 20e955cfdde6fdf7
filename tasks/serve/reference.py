"""What transformers computes of a checkpoint, for a runtime to be compared with."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from configs.errors import TameError

if TYPE_CHECKING:
    from tasks.evaluate.model import Loaded

PROMPTS = (
    "The capital of France is",
    "Explain in two sentences why the sky is blue.",
    "def fibonacci(n):\n    ",
    "In 1969, Neil Armstrong",
)
"""Prose, an instruction, a program and a fact: what a runtime is asked, as plain text without a template."""
NEW_TOKENS = 16
KNOWN = 50
"""How many of the most likely tokens are kept at each position, to see how near a tie another choice was."""


class Reference(NamedTuple):
    """Of each prompt: its tokens, the greedy answer, and log-probabilities in nats."""

    prompts: list[list[int]]
    continuations: list[list[int]]
    logprobs: list[list[float]]
    """Of each token of prompt + continuation but the first."""
    likely: list[list[dict[int, float]]]
    """The KNOWN most likely tokens at each position of the continuation."""
    exact: bool = False
    """Whether it was computed in float32, rather than with the roundings of 16 bits."""


def reference(path: str, device: str, trust_remote_code: bool) -> Reference:
    """Answer PROMPTS greedily, and score every token of prompts and answers, with the weights that are stored.

    Where memory allows, they are multiplied in float32: in bfloat16 logits of 16 to 32 are rounded to eighths, so that
    transformers is as far from the exact numbers as a runtime is (SmolLM2: 0.050 nats, vLLM 0.040).

    Raises:
        BadInputError, TameError: as `tasks.evaluate.model.load`. TameError: the checkpoint computes NaN or infinite numbers.
    """
    import torch

    from tasks.evaluate.generate import generate
    from tasks.evaluate.model import load

    loaded = load(Path(path), device, trust_remote_code)
    made = Reference([], [], [], [], _in_float32(loaded))
    for text in PROMPTS:
        prompt = loaded.tokens(text)
        continuation = generate(loaded, prompt, NEW_TOKENS, stop=False)
        whole = torch.cat([prompt, torch.tensor([continuation], device=prompt.device)], 1)
        with torch.inference_mode():
            scores = torch.log_softmax(loaded.model(whole).logits[0, :-1].float(), -1)
        if not bool(scores.gather(1, whole[0, 1:, None]).isfinite().all()):
            raise TameError(
                f"{path}: transformers computes NaN or infinite logits, so there is nothing to compare with"
            )
        values, tokens = scores[prompt.shape[1] - 1 :].topk(min(KNOWN, scores.shape[1]))
        made.prompts.append(prompt[0].tolist())
        made.continuations.append(continuation)
        made.logprobs.append(scores.gather(1, whole[0, 1:, None])[:, 0].tolist())
        made.likely.append([dict(zip(*row, strict=True)) for row in zip(tokens.tolist(), values.tolist(), strict=True)])
    return made


def _in_float32(loaded: "Loaded") -> bool:
    """Have the model compute in float32, if it has plain weights, or can be given them, and there is memory for it."""
    import torch

    from tasks.evaluate.memory import free_memory
    from tasks.evaluate.model import dequantize

    dequantize(loaded)
    tensors = list(itertools.chain(loaded.model.parameters(), loaded.model.buffers()))
    stored = any(tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool for tensor in tensors)
    devices = {tensor.device for tensor in tensors}
    needed = sum(4 * tensor.numel() for tensor in tensors)
    if stored or len(devices) > 1 or needed > 0.8 * free_memory(loaded.device):
        return False
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return True
