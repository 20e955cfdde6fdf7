"""Perplexity of a text, and the divergence from the baseline at every position of it.

The baseline leaves its final hidden states, from which the output head makes the same logits again: for Qwen3-1.7B
1.2 GB for 300,000 tokens, where the logits would be 91 GB.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import BadInputError, TameError
from tasks.evaluate.load import Head, Loaded, body_of, head_of, load, out_of_memory, vocabulary
from tasks.evaluate.text import encode
from tasks.progress import Progress, silent

if TYPE_CHECKING:
    import torch

log = logging.getLogger("tame.evaluate")

HIDDEN_LIMIT = 16e9  # bytes that a baseline may keep
LOGITS_BYTES = {
    "cpu": 16e6,
    "cuda": 1e9,
}  # float32 logits at a time: what stays in a CPU's cache, what a GPU has to spare
FLOOR_TOKENS = 4096  # how much of the text the noise floor is measured on
HIDDEN, WINDOWS, TOKENS, RESULT = "hidden.bin", "windows.npz", "tokens.npy", "result.json"
Array = NDArray[Any]


@dataclass(frozen=True)
class Positions:
    """What was measured at every scored position, [windows, window − 1]. For a baseline kl is 0 and agree true."""

    loss: Array
    """Negative log-likelihood of the token that follows, nats, float32."""
    kl: Array
    """KL divergence of the variant's next-token distribution from the baseline's, nats, float32."""
    agree: Array
    """Whether both find the same token most likely, bool."""


def score_baseline(
    loaded: Loaded,
    text: str,
    window: int,
    max_tokens: int | None,
    batch_size: int,
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
    tokens = _windows(encode(text, loaded.tokenizer, max_tokens), window)
    np.save(folder / TOKENS, tokens)
    head, notes = _checked_head(loaded, tokens), list(loaded.notes)
    size = tokens.shape[0] * (window - 1) * head.weight.shape[1] * head.weight.element_size()
    if size > HIDDEN_LIMIT:
        raise BadInputError(
            f"evaluate.max_tokens {tokens.size}: the baseline's hidden states would take {size / 1e9:.0f} GB, more than "
            f"{HIDDEN_LIMIT / 1e9:.0f} GB; lower it to {int(tokens.size * HIDDEN_LIMIT / size)}"
        )
    log.info("the baseline keeps its final hidden states for %d tokens: %.2f GB", tokens.size, size / 1e9)

    def run(batch: int) -> Positions:
        with (folder / HIDDEN).open("wb") as file:
            return _score(loaded, head, tokens, batch, None, progress, file)

    positions, batch = _backing_off(run, batch_size, tokens.shape[0], window)
    few = tokens[: max(1, FLOOR_TOKENS // window)]
    reference = Reference(folder / HIDDEN, head, (len(few), window - 1, head.weight.shape[1]))
    other = 1 if batch > 1 else 2
    again = _score(loaded, head, np.repeat(few, other, 0), other, reference, silent, repeat=other)
    _write(
        folder,
        positions,
        {
            "protocol": _protocol(loaded, tokens, window, batch),
            "notes": notes,
            "floor": {
                "kl_mean": float(again.kl.mean()),
                "top1_agreement": float(again.agree.mean()),
                "batch_size": other,
            },
            "head": _digest(head),
            "width": head.weight.shape[1],
            "vocabulary": hashlib.sha256(vocabulary(loaded.tokenizer).encode()).hexdigest(),
        },
    )


def score_variant(
    loaded: Loaded, baseline: Path, baseline_model: Path, batch_size: int, folder: Path, progress: Progress = silent
) -> None:
    """Score the baseline's tokens with a variant, and compare both at every position.

    Args:
        loaded: The variant.
        baseline: The folder that `score_baseline` filled.
        baseline_model: The baseline's checkpoint, read only where the variant's head is another one.
        batch_size: Windows in a batch.
        folder: Gets windows.npz and result.json.
        progress: Told windows.

    Raises:
        BadInputError: the two do not share a vocabulary.
        TameError: logits that are not finite, or no memory for one window.
    """
    tokens = np.load(baseline / TOKENS)
    known = json.loads((baseline / RESULT).read_bytes())
    head = _checked_head(loaded, tokens)
    theirs = _same_vocabulary(loaded, head, known, baseline_model)
    shape = (tokens.shape[0], tokens.shape[1] - 1, known["width"])

    def run(batch: int) -> Positions:
        return _score(loaded, head, tokens, batch, Reference(baseline / HIDDEN, theirs, shape), progress)

    positions, batch = _backing_off(run, batch_size, tokens.shape[0], tokens.shape[1])
    _write(folder, positions, {"protocol": _protocol(loaded, tokens, tokens.shape[1], batch), "notes": loaded.notes})


class Reference:
    """The baseline's logits, made again from its hidden states on disk."""

    def __init__(self, path: Path, head: Head, shape: tuple[int, int, int]) -> None:
        import torch

        count = shape[0] * shape[1] * shape[2]
        self.head = head
        self.hidden = torch.from_file(str(path), shared=False, size=count, dtype=head.weight.dtype).view(shape)


def _score(
    loaded: Loaded,
    head: Head,
    tokens: Array,
    batch: int,
    reference: Reference | None,
    progress: Progress,
    file: Any = None,
    repeat: int = 1,
) -> Positions:
    """Run all windows, `batch` at a time; each window of the reference stands for `repeat` in a row of `tokens`."""
    import torch

    count, scored = tokens.shape[0], tokens.shape[1] - 1
    result = Positions(
        np.zeros((count, scored), np.float32), np.zeros((count, scored), np.float32), np.ones((count, scored), bool)
    )
    with torch.inference_mode(), body_of(loaded.model) as body:
        for start in range(0, count, batch):
            ids = torch.from_numpy(tokens[start : start + batch]).long().to(loaded.device)
            hidden = body(ids)[:, :-1]
            if file is not None:
                file.write(hidden.contiguous().cpu().view(torch.uint8).numpy().data)
            theirs = None
            if reference is not None:
                rows = range(start, start + len(ids))
                theirs = torch.stack([reference.hidden[row // repeat] for row in rows]).to(
                    loaded.device, non_blocking=True
                )
            for i in range(len(ids)):
                _window(
                    result,
                    start + i,
                    head,
                    hidden[i],
                    ids[i, 1:],
                    reference and reference.head,
                    None if theirs is None else theirs[i],
                )
            if not np.isfinite(result.loss[start : start + len(ids)]).all():
                raise _blame(loaded, head, tokens, result.loss)
            progress(f"windows of {tokens.shape[1]} tokens", min(start + batch, count), count)
    return result


def _window(
    result: Positions,
    index: int,
    head: Head,
    hidden: "torch.Tensor",
    targets: "torch.Tensor",
    their_head: Head | None,
    theirs: "torch.Tensor | None",
) -> None:
    """Score one window, its logits a few rows at a time."""
    import torch

    rows = max(16, int(LOGITS_BYTES[hidden.device.type] / 4 / head.weight.shape[0]))
    loss, kl, agree = [], [], []
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        ours = torch.log_softmax(head(hidden[part]), -1, dtype=torch.float32)
        loss.append(-ours.gather(-1, targets[part, None].to(ours.device))[:, 0])
        if theirs is not None and their_head is not None:
            reference = torch.log_softmax(their_head(theirs[part]), -1, dtype=torch.float32)
            agree.append(ours.argmax(-1) == reference.argmax(-1))
            ours.sub_(reference)
            kl.append(-torch.linalg.vecdot(reference.exp_(), ours))
    result.loss[index] = torch.cat(loss).cpu().numpy()
    if kl:
        result.kl[index] = torch.cat(kl).cpu().numpy()
        result.agree[index] = torch.cat(agree).cpu().numpy()


def _windows(ids: list[int], window: int) -> Array:
    count = len(ids) // window
    if count == 0:
        raise BadInputError(
            f"evaluate.text: {len(ids)} tokens, less than one window of {window}; give more text or a smaller window"
        )
    return np.array(ids[: count * window], np.int32).reshape(count, window)


def _backing_off(run: Any, batch_size: int, windows: int, window: int) -> tuple[Positions, int]:
    """Run with ever smaller batches until one fits. All windows share one size: int8 depends on what shares the batch."""
    import torch

    batch = min(batch_size, windows)
    while True:
        try:
            return run(batch), batch
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        if batch == 1:
            raise TameError(
                f"no memory for one window of {window} tokens; lower evaluate.window, or use a larger device"
            )
        batch = (batch + 1) // 2
        log.info("no memory for the batch; trying %d windows at a time", batch)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _checked_head(loaded: Loaded, tokens: Array) -> Head:
    """The head, once it has made the model's own logits again on the first tokens."""
    import torch

    head = head_of(loaded.model)
    if head is not None:
        ids = torch.from_numpy(tokens[:1, :64]).long().to(loaded.device)
        with torch.inference_mode():
            own = loaded.model(input_ids=ids, use_cache=False).logits[0].float()
            with body_of(loaded.model) as body:
                again = head(body(ids)[0]).float()
        tolerance = 1e-4 if loaded.dtype == "float32" else 0.02
        finite = own.isfinite().all()
        if not finite or torch.allclose(
            own, again.to(own.device), rtol=tolerance, atol=tolerance * float(own.abs().max())
        ):
            return head
    raise TameError(
        f"{loaded.model.config.model_type}: its output head is not one that tame can repeat from hidden states; tame cannot "
        "measure this architecture"
    )


def _same_vocabulary(loaded: Loaded, head: Head, known: dict[str, Any], baseline_model: Path) -> Head:
    """The baseline's head: the variant's own where they are equal, as bitsandbytes leaves it, else read again."""
    digest = hashlib.sha256(vocabulary(loaded.tokenizer).encode()).hexdigest()
    rows = known["head"]["vocabulary"]
    if digest != known["vocabulary"] or head.weight.shape[0] != rows:
        raise BadInputError(
            f"the baseline {baseline_model} has another vocabulary ({rows} logits, the model has {head.weight.shape[0]}); "
            "compare a model with the one it was made from"
        )
    if _digest(head) == known["head"]:
        return head
    loaded.notes.append("its output head differs from the baseline's")
    theirs = head_of(load(baseline_model, "cpu").model)
    assert theirs is not None
    theirs.weight = theirs.weight.detach().to(loaded.device)
    theirs.bias = None if theirs.bias is None else theirs.bias.detach().to(loaded.device)
    return theirs


def _digest(head: Head) -> dict[str, Any]:
    import torch

    digest = hashlib.sha256()
    for tensor in (head.weight, head.bias):
        if tensor is not None:
            digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data)
    return {"sha256": digest.hexdigest(), "vocabulary": head.weight.shape[0], "scale": head.scale, "softcap": head.softcap,
            "dtype": str(head.weight.dtype)}  # fmt: skip


def _blame(loaded: Loaded, head: Head, tokens: Array, loss: Array) -> TameError:
    """Which window and position are not finite, and the first module whose output is not."""
    import torch

    window, position = (int(i) for i in np.argwhere(~np.isfinite(loss))[0])
    first: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not first and isinstance(tensor, torch.Tensor) and not tensor.isfinite().all():
                first.append(name)

        return hook

    hooks = [m.register_forward_hook(watch(name)) for name, m in loaded.model.named_modules() if not list(m.children())]
    try:
        with torch.inference_mode():
            loaded.model(
                input_ids=torch.from_numpy(tokens[window : window + 1]).long().to(loaded.device), use_cache=False
            )
    finally:
        for hook in hooks:
            hook.remove()
    where = f"; the first output that is not finite is that of {first[0]}" if first else ""
    return TameError(
        f"the logits are not finite at window {window}, position {position}{where}; this model cannot be measured"
    )


def _protocol(loaded: Loaded, tokens: Array, window: int, batch: int) -> dict[str, Any]:
    special = sorted(set(loaded.tokenizer.all_special_ids) & set(tokens[0, :1].tolist()))
    return {
        "windows": tokens.shape[0],
        "window": window,
        "tokens_scored": tokens.shape[0] * (window - 1),
        "special_tokens": f"{loaded.tokenizer.decode(special)} once, before the text" if special else "none",
        "batch_size": batch,
        "dtype": loaded.dtype,
        "weights": loaded.weights,
    }


def _write(folder: Path, positions: Positions, result: dict[str, Any]) -> None:
    np.savez(folder / WINDOWS, loss=positions.loss, kl=positions.kl, agree=positions.agree)
    (folder / RESULT).write_text(json.dumps(result, indent=1))
