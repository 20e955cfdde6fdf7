"""Forward passes over windows of tokens: losses, and the divergence from a reference, with few logits at a time."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from configs.errors import TameError, line
from tasks.evaluate.memory import out_of_memory
from tasks.evaluate.model import Loaded
from tasks.evaluate.output_head import Head, backbone_of
from tasks.runtime.progress import Progress

if TYPE_CHECKING:
    import torch

log = logging.getLogger("tame.evaluate")

LOGITS_BYTES = {
    "cpu": 24e6,
    "cuda": 1.3e9,
}  # float32 logits at a time: what stays in a CPU's cache, what a GPU can spare
Array = NDArray[Any]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Positions:
    """What was measured at every scored position, [windows, window − 1]. For a baseline kl is 0 and agree true."""

    loss: Array
    """Negative log-likelihood of the token that follows, nats, float32."""
    kl: Array
    """KL divergence of the variant's next-token distribution from the baseline's, nats, float32."""
    agree: Array
    """Whether both find the same token most likely, bool."""
    top: Array
    """The most likely token, int32."""
    log_sum: Array
    """Log of the sum of the exponentials of the logits, float32: log-probabilities are logits minus this."""


class Reference:
    """The baseline's logits, made again from its hidden states on disk, and what was kept of them."""

    def __init__(self, path: Path, head: Head, log_sum: Array, top: Array, width: int) -> None:
        import torch

        shape = (*log_sum.shape, width)
        size = shape[0] * shape[1] * shape[2]
        hidden = torch.from_file(str(path), shared=False, size=size, dtype=head.weight.dtype)
        self.head, self.hidden = head, hidden.view(shape)
        self.log_sum, self.top = torch.from_numpy(log_sum), top

    def of(self, windows: "slice | list[int]", device: str) -> "list[torch.Tensor]":
        """Hidden states and log-sums of some windows, on their way to `device`."""
        found = [self.hidden[windows], self.log_sum[windows]]
        if device.startswith("cuda"):  # pinned, so that the copy does not wait for what the GPU is doing
            found = [tensor.pin_memory().to(device, non_blocking=True) for tensor in found]
        return found


def score(
    loaded: Loaded,
    tokens: Array,
    batch: int,
    reference: Reference | None,
    progress: Progress,
    keep: "Kept | None" = None,
    repeat: int = 1,
) -> Positions:
    """Run all windows, `batch` at a time; each window of the reference stands for `repeat` in a row of `tokens`."""
    import torch

    count, head = len(tokens), loaded.head
    comparison = _comparison(loaded.device)
    measured: list[list[torch.Tensor]] = []
    with torch.inference_mode(), backbone_of(loaded.model) as backbone:
        every = torch.from_numpy(tokens).to(loaded.device)
        for start in range(0, count, batch):
            ids = every[start : start + batch].long()
            hidden = backbone(ids)[:, :-1]
            theirs = None
            if reference is not None:
                end = start + len(ids)
                rows = slice(start, end) if repeat == 1 else [row // repeat for row in range(start, end)]
                theirs = reference.of(rows, loaded.device)
            for i in range(len(ids)):
                part = None if theirs is None else [tensor[i] for tensor in theirs]
                measured.append(
                    _window(comparison, head, hidden[i], ids[i, 1:], reference.head if reference else None, part)
                )
            if start == 0 and not all(row[0].isfinite().all() for row in measured):
                break  # rather than at the end of a long text
            if keep is not None:
                keep.add(hidden)
            progress(f"windows of {tokens.shape[1]} tokens", min(start + batch, count), count)
        if keep is not None:
            keep.flush()
    loss, kl, top, log_sum = (torch.stack(column).cpu().numpy() for column in zip(*measured, strict=True))
    if not np.isfinite(loss).all():
        raise _blame(loaded, tokens, loss)
    agree = np.ones_like(loss, bool) if reference is None else top == np.repeat(reference.top, repeat, 0)[:count]
    return Positions(loss, kl, agree, top, log_sum)


def _window(
    comparison: Any, head: Head, hidden: "torch.Tensor", targets: "torch.Tensor", their_head: Head | None, theirs: Any
) -> "list[torch.Tensor]":
    """Score one window, its logits some rows at a time: loss, KL, most likely token and log-sum of each position."""
    import torch

    rows = max(16, int(LOGITS_BYTES[hidden.device.type] / 4 / head.weight.shape[0]))
    parts = []
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        logits = head(hidden[part])
        if theirs is None or their_head is None:
            parts.append(comparison(logits, targets[part].to(logits.device)))
        else:
            states, log_sum = (tensor[part] for tensor in theirs)
            log_sum = log_sum.to(logits.device)
            parts.append(comparison(logits, targets[part].to(logits.device), their_head(states), log_sum))
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def compare(
    logits: "torch.Tensor",
    targets: "torch.Tensor",
    reference: "torch.Tensor | None" = None,
    reference_log_sum: "torch.Tensor | None" = None,
) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]":
    """Compare each row of `logits`, [rows, vocabulary], with its target token and with the baseline's logits.

    Args:
        logits: Of the model that is measured.
        targets: The token that follows each row in the text, [rows].
        reference: The baseline's logits of the same shape; None while the baseline itself is measured.
        reference_log_sum: The log-sum-exp of each row of `reference`, [rows].

    Returns:
        Four tensors of [rows]: cross-entropy loss in nats, KL divergence from the baseline in nats (zeros without one), most
        likely token (argmax), log-sum-exp.
    """
    logits = logits.float()
    ours = logits.log_softmax(-1)
    loss = -ours.gather(-1, targets[:, None])[:, 0]
    log_sum = logits.gather(-1, targets[:, None])[:, 0] + loss
    top = logits.argmax(-1).int()
    if reference is None or reference_log_sum is None:
        return loss, loss * 0, top, log_sum
    theirs = reference.float() - reference_log_sum[:, None]
    kl = theirs.exp().mul_(theirs.sub_(ours)).sum(-1)
    return loss, kl, top, log_sum


def _comparison(device: str) -> Any:
    """`compare`, fused on a GPU; plain where Triton is missing, or finds no C compiler."""
    if not device.startswith("cuda"):
        return compare
    try:
        from tasks.evaluate import kl_triton
    except ImportError:
        return compare
    works = True

    def either(*arguments: Any) -> Any:
        nonlocal works
        if works:
            try:
                return kl_triton.compare(*arguments)
            except Exception as error:
                if out_of_memory(error):
                    raise
                works = False
                log.info("Triton does not work here (%s: %s); comparing unfused", type(error).__name__, line(error))
        return compare(*arguments)

    return either


class Kept:
    """A file of hidden states, written while the device computes the next batch."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.waiting: Any = None

    def add(self, hidden: "torch.Tensor") -> None:
        """Take [windows, positions, width]; what was taken before is written."""
        import torch

        self.flush()
        if hidden.device.type != "cuda":
            self.waiting = (hidden.contiguous(), None)
            return
        host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
        host.copy_(hidden, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        self.waiting = (host, copied)

    def flush(self) -> None:
        """Write what was taken last."""
        import torch

        if self.waiting is not None:
            host, copied = self.waiting
            if copied is not None:
                copied.synchronize()
            self.file.write(host.view(torch.uint8).numpy().data)
            self.waiting = None


def backing_off(
    run: Callable[[int], Result], batch_size: int, unit: str, remedy: str = "use a larger device"
) -> tuple[Result, int]:
    """Call `run(batch size)` with ever smaller batches until one fits in memory: its result, and the size that fitted.

    All of a run shares one size, because an int8 layer's output depends on what else is in the batch.

    Args:
        run: Does all the work anew, in batches of the size that it is given.
        batch_size: The size to begin with.
        unit: What a batch consists of, in the singular, for the log and the error: `window of 64 tokens`.
        remedy: What the error advises when not even a batch of one fits.

    Raises:
        TameError: memory does not suffice for a batch of one.
    """
    import torch

    batch = batch_size
    while True:
        try:
            return run(batch), batch
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        if batch == 1:
            raise TameError(f"no memory for one {unit}; {remedy}")
        batch = (batch + 1) // 2
        log.info("no memory for the batch; trying %d at a time (%s)", batch, unit)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _blame(loaded: Loaded, tokens: Array, loss: Array) -> TameError:
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
    why = "this model cannot be measured"
    if loaded.dtype == "float16":
        why = "its activations leave float16's range: measure it on a device with bfloat16, or with --device cpu"
    return TameError(f"the logits are not finite at window {window}, position {position}{where}; {why}")
