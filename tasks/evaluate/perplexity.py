"""Perplexity of a text, and the divergence from the baseline at every position of it.

The baseline leaves its final hidden states, from which the output head makes the same logits again: for Qwen3-1.7B
1.2 GB for 300,000 tokens, where the logits would be 91 GB.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.errors import BadInputError
from configs.schema import Evaluate
from tasks.download.text import CHARACTERS_PER_TOKEN
from tasks.evaluate.model import Loaded, load, vocabulary
from tasks.evaluate.output_head import Head
from tasks.evaluate.scoring import Array, Kept, Positions, Reference, backing_off, score
from tasks.runtime.progress import Progress, silent

log = logging.getLogger("tame.evaluate")

HIDDEN_LIMIT = 16e9  # bytes that a baseline may keep
FLOOR_TOKENS = 4096  # how much of the text the noise floor is measured on, at most
FLOOR_SHARE = 10  # and at most one part in so many, as it is work that nobody waits for
HIDDEN, REFERENCE, WINDOWS = "hidden.bin", "reference.npz", "windows.npz"
TOKENS, RESULT = "tokens.npy", "result.json"


def score_alone(
    loaded: Loaded,
    text: str,
    spec: Evaluate,
    folder: Path,
    progress: Progress = silent,
) -> None:
    """Score `text` with a model that nothing is compared with: windows.npz and result.json, as `score_baseline`.

    Raises:
        BadInputError: less than one window of text.
        TameError: as `score_baseline`.
    """
    cut = _tokens(loaded, text, spec)
    positions, batch = _backing_off(lambda size: score(loaded, cut.tokens, size, None, progress), spec.batch_size, cut)
    _write(folder, positions, {"protocol": _protocol(loaded, cut, batch), "notes": loaded.notes})


def score_baseline(
    loaded: Loaded,
    text: str,
    spec: Evaluate,
    folder: Path,
    progress: Progress = silent,
) -> None:
    """Score `text` with a baseline, and leave in `folder` what variants are compared with.

    Writes tokens.npy (int32 [windows, window]), hidden.bin (final hidden states [windows, window − 1, width], the model's
    dtype), windows.npz (`Positions`) and, last, result.json.

    Raises:
        BadInputError: less than one window of text, or a text whose hidden states would not fit.
        TameError: logits that are not finite, or no memory for one window.
    """
    cut = _tokens(loaded, text, spec)
    tokens = cut.tokens
    np.save(folder / TOKENS, tokens)
    head, notes = loaded.head, list(loaded.notes)
    size = tokens.shape[0] * (tokens.shape[1] - 1) * head.weight.shape[1] * head.weight.element_size()
    if size > HIDDEN_LIMIT:
        raise BadInputError(
            f"evaluate.max_tokens {tokens.size}: the baseline's hidden states would take {size / 1e9:.0f} GB, more than "
            f"{HIDDEN_LIMIT / 1e9:.0f} GB; lower it to {int(tokens.size * HIDDEN_LIMIT / size)}"
        )
    log.info("the baseline keeps its final hidden states for %d tokens: %.2f GB", tokens.size, size / 1e9)

    def run(batch: int) -> Positions:
        with (folder / HIDDEN).open("wb") as file:
            return score(loaded, tokens, batch, None, progress, Kept(file))

    positions, batch = _backing_off(run, spec.batch_size, cut)
    np.savez(folder / REFERENCE, log_sum=positions.log_sum, top=positions.top)
    reference = Reference(folder / HIDDEN, head, positions.log_sum, positions.top, head.weight.shape[1])
    _write(
        folder,
        positions,
        {
            "protocol": _protocol(loaded, cut, batch),
            "notes": notes,
            "floor": _floor(loaded, tokens, batch, reference),
            "head": _digest(head),
            "width": head.weight.shape[1],
            "vocabulary": hashlib.sha256(vocabulary(loaded.tokenizer).encode()).hexdigest(),
        },
    )


def score_variant(
    loaded: Loaded,
    baseline: Path,
    baseline_model: Path,
    batch_size: int,
    folder: Path,
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> None:
    """Score the baseline's tokens with a variant, and compare both at every position.

    Args:
        loaded: The variant.
        baseline: The folder that `score_baseline` filled.
        baseline_model: The baseline's checkpoint, read only where the variant's head is another one.
        batch_size: Windows in a batch.
        folder: Gets windows.npz and result.json.
        progress: Told windows.
        trust_remote_code: Whether the baseline may run code of its own, should its head be read.

    Raises:
        BadInputError: the two do not share a vocabulary.
        TameError: logits that are not finite, or no memory for one window.
    """
    known = json.loads((baseline / RESULT).read_bytes())
    tokens = np.load(baseline / TOKENS)
    cut = Cut(tokens, known["protocol"]["special_tokens"])
    loaded.check_tokens(tokens)
    head = loaded.head
    theirs = _same_vocabulary(loaded, head, known, baseline_model, trust_remote_code)
    kept = np.load(baseline / REFERENCE)

    def run(batch: int) -> Positions:
        reference = Reference(baseline / HIDDEN, theirs, kept["log_sum"], kept["top"], known["width"])
        return score(loaded, tokens, batch, reference, progress)

    positions, batch = _backing_off(run, batch_size, cut)
    _write(folder, positions, {"protocol": _protocol(loaded, cut, batch), "notes": loaded.notes})


def _floor(loaded: Loaded, tokens: Array, batch: int, reference: Reference) -> dict[str, float]:
    """What a baseline differs from itself in another batch shape: on a tenth of the text, but on one window at least."""
    count, window = tokens.shape
    other = 1 if batch > 1 else 2
    few = tokens[: max(1, min(FLOOR_TOKENS // window, count // FLOOR_SHARE // other))]
    again = score(loaded, np.repeat(few, other, 0), other, reference, silent, repeat=other)
    return {
        "kl_mean": float(again.kl.mean()),
        "top1_agreement": float(again.agree.mean()),
        "batch_size": other,
        "windows": len(few),
    }


class Cut(NamedTuple):
    """A text in windows, all of whose tokens the model knows."""

    tokens: Array
    """int32 [windows, window]."""
    special: str
    """Which special tokens are among them, and where, for the protocol."""


def _tokens(loaded: Loaded, text: str, spec: Evaluate) -> Cut:
    window = spec.window
    positions = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if positions and 0 < positions < window:  # of a .gguf, it is not known before
        raise BadInputError(f"evaluate.window {window}: the model takes {positions} tokens at most; lower it")
    cut = cut_text(text, loaded.tokenizer, spec)
    loaded.check_tokens(cut.tokens)
    return cut


def _backing_off(run: Callable[[int], Positions], batch_size: int, cut: Cut) -> tuple[Positions, int]:
    windows, window = cut.tokens.shape
    remedy = "lower evaluate.window, or use a larger device"
    return backing_off(run, min(batch_size, windows), f"window of {window} tokens", remedy)


def cut_text(text: str, tokenizer: Any, spec: Evaluate) -> Cut:
    """`text` in windows that begin as `spec.bos` says. What begins a window is one of its tokens.

    Raises:
        BadInputError: less than one window of text, or no BOS token where there must be one.
    """
    before = beginning(tokenizer)
    if spec.bos == "always" and not before:
        if tokenizer.bos_token_id is None:
            raise BadInputError("evaluate.bos always: the model's tokenizer has no BOS token; say auto")
        before = [tokenizer.bos_token_id]
    if spec.bos == "once" or not before:
        tokens = _windows(encode(text, tokenizer, spec.max_tokens, special=spec.bos != "never"), spec.window)
        first = sorted(set(tokenizer.all_special_ids) & set(tokens[0, :1].tolist()))
        return Cut(tokens, f"{tokenizer.decode(first)} once, before the text" if first else "none")
    if spec.bos == "never":
        return Cut(_windows(encode(text, tokenizer, spec.max_tokens, special=False), spec.window), "none")
    room = spec.window - len(before)
    if room < 1:
        raise BadInputError(f"evaluate.window {spec.window}: {len(before)} tokens begin each window; raise it")
    limit = None if spec.max_tokens is None else spec.max_tokens // spec.window * room
    texts = _windows(encode(text, tokenizer, limit, special=False), room)
    start = np.tile(np.array(before, np.int32), (len(texts), 1))
    return Cut(np.concatenate([start, texts], axis=1), f"{tokenizer.decode(before)} before each window")


def beginning(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts before a text by itself."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    starts = range(len(whole) - len(bare) + 1)
    start = next((i for i in starts if bare and list(whole[i : i + len(bare)]) == list(bare)), 0)
    return list(whole[:start])


def encode(text: str, tokenizer: Any, limit: int | None, special: bool = True) -> list[int]:
    """Token ids of `text`, the first `limit` of them; `special`: with the special tokens that the tokenizer adds by itself.

    Of a long text only a start that certainly holds `limit` tokens is tokenized: characters are cut far behind the last
    token that is used, so that the cut does not change it.
    """
    if limit is not None and len(text) > limit * CHARACTERS_PER_TOKEN:
        ids = tokenizer(text[: limit * CHARACTERS_PER_TOKEN], add_special_tokens=special)["input_ids"]
        if len(ids) > limit + 1000:
            return list(ids[:limit])
    return list(tokenizer(text, add_special_tokens=special)["input_ids"][:limit])


def _windows(ids: list[int], window: int) -> Array:
    count = len(ids) // window
    if count == 0:
        raise BadInputError(
            f"evaluate.text: {len(ids)} tokens, less than one window of {window}; give more text or a smaller window"
        )
    return np.array(ids[: count * window], np.int32).reshape(count, window)


def _same_vocabulary(
    loaded: Loaded, head: Head, reference: dict[str, Any], baseline_model: Path, trust_remote_code: bool
) -> Head:
    """The baseline's head: the variant's own where they are equal, as most methods leave it, else read again."""
    digest = hashlib.sha256(vocabulary(loaded.tokenizer).encode()).hexdigest()
    rows = reference["head"]["vocabulary"]
    if digest != reference["vocabulary"] or head.weight.shape[0] != rows:
        raise BadInputError(
            f"the baseline {baseline_model} has another vocabulary ({rows} logits, the model has {head.weight.shape[0]}); "
            "compare a model with the one it was made from"
        )
    if _digest(head) == reference["head"]:
        return head
    loaded.notes.append("its output head differs from the baseline's")
    return load(baseline_model, "cpu", trust_remote_code).head.to(loaded.device)


def _digest(head: Head) -> dict[str, Any]:
    import torch

    digest = hashlib.sha256()
    for tensor in (head.weight, head.bias):
        if tensor is not None:
            digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data)
    return {"sha256": digest.hexdigest(), "vocabulary": head.weight.shape[0], "scale": head.scale, "softcap": head.softcap,
            "dtype": str(head.weight.dtype)}  # fmt: skip


def _protocol(loaded: Loaded, cut: Cut, batch: int) -> dict[str, Any]:
    windows, window = cut.tokens.shape
    return {
        "windows": windows,
        "window": window,
        "tokens_scored": windows * (window - 1),
        "special_tokens": cut.special,
        "batch_size": batch,
        "dtype": loaded.dtype,
        "weights": loaded.weights,
    }


def _write(folder: Path, positions: Positions, result: dict[str, Any]) -> None:
    np.savez(folder / WINDOWS, loss=positions.loss, kl=positions.kl, agree=positions.agree)
    (folder / RESULT).write_text(json.dumps(result, indent=1))
