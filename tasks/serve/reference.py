"""What transformers computes of a checkpoint, for a runtime to be compared with."""

import itertools
import operator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from configs.errors import TameError

if TYPE_CHECKING:
    import torch

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
    rounding: list[list[float]] | None = None
    """By how much each log-probability differs where transformers computes in 16 bits; None where these were computed so."""


def reference(path: str, device: str, trust_remote_code: bool) -> Reference:
    """Answer PROMPTS greedily, and score every token of prompts and answers, with the weights that are stored.

    Where memory allows, the model computes in float32, and then once more in the 16 bits that it has: in bfloat16 logits of 16 to
    32 are rounded to eighths, and activations that are quantized to 8 bits fall to one side or the other, so that transformers is
    as far from the exact numbers as a runtime is (SmolLM2: nf4 0.050 nats, vLLM 0.040; w8a8 0.159, vLLM 0.192).

    Raises:
        BadInputError, TameError: as `tasks.evaluate.model.load`. TameError: the checkpoint computes NaN or infinite numbers.
    """
    import torch

    from tasks.evaluate.generate import generate
    from tasks.evaluate.model import load

    loaded = load(Path(path), device, trust_remote_code)
    made = Reference([], [], [], [])
    before = _in_float32(loaded)

    def scored(whole: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return torch.log_softmax(loaded.model(whole).logits[0, :-1].float(), -1)

    for text in PROMPTS:
        prompt = loaded.tokens(text)
        continuation = generate(loaded, prompt, NEW_TOKENS, stop=False)
        whole = torch.cat([prompt, torch.tensor([continuation], device=prompt.device)], 1)
        scores = scored(whole)
        if not bool(scores.gather(1, whole[0, 1:, None]).isfinite().all()):
            raise TameError(
                f"{path}: transformers computes NaN or infinite logits, so there is nothing to compare with"
            )
        values, tokens = scores[prompt.shape[1] - 1 :].topk(min(KNOWN, scores.shape[1]))
        made.prompts.append(prompt[0].tolist())
        made.continuations.append(continuation)
        made.logprobs.append(scores.gather(1, whole[0, 1:, None])[:, 0].tolist())
        made.likely.append([dict(zip(*row, strict=True)) for row in zip(tokens.tolist(), values.tolist(), strict=True)])
    if not before:
        return made
    for tensor, dtype in before:
        tensor.data = tensor.data.to(dtype)
    rounding = []
    for ids, exact in zip(map(operator.add, made.prompts, made.continuations), made.logprobs, strict=True):
        whole = torch.tensor([ids], device=loaded.model.device)
        rounded = scored(whole).gather(1, whole[0, 1:, None])[:, 0]
        rounding.append((rounded - torch.tensor(exact, device=rounded.device)).abs().tolist())
    return made._replace(rounding=rounding)


def _in_float32(loaded: "Loaded") -> "list[tuple[torch.Tensor, torch.dtype]]":
    """Have the model compute in float32, with layers that are stored in 16 bits, or can be; none if there is no memory for it.

    Returns what was widened, and from which dtype.
    """
    import torch

    from tasks.evaluate.memory import free_memory
    from tasks.evaluate.model import dequantize

    dequantize(loaded)
    tensors = list(itertools.chain(loaded.model.parameters(), loaded.model.buffers()))
    narrow = [tensor for tensor in tensors if tensor.dtype in (torch.bfloat16, torch.float16)]
    needed = sum(4 * tensor.numel() for tensor in narrow)
    if len({tensor.device for tensor in tensors}) > 1 or needed > 0.8 * free_memory(loaded.device):
        return []
    before = [(tensor, tensor.dtype) for tensor in narrow]
    for tensor in narrow:
        tensor.data = tensor.data.float()
    return before
