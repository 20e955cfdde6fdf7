"""The comparison of two rows of logits in one pass over them, for CUDA.

Written with torch operations it reads and writes the logits more than ten times, which for a vocabulary of 150,000 takes as
long as the head's matrix product itself. torch.compile fuses it as well, but takes longer to do so than it saves.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch

BLOCK = 2048
LOWEST = tl.constexpr(-1e30)  # finite, so that the difference of two of them is not NaN


# Triton resolves annotations on the device's side, where there is no `Any`.
@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _kernel(  # type: ignore[no-untyped-def,unused-ignore]  # noqa: ANN202
    # a kernel gets each tensor that it reads or writes by itself
    logits,  # noqa: ANN001
    targets,  # noqa: ANN001
    reference,  # noqa: ANN001
    reference_log_sum,  # noqa: ANN001
    loss,  # noqa: ANN001
    kl,  # noqa: ANN001
    top,  # noqa: ANN001
    log_sum,  # noqa: ANN001
    vocabulary,  # noqa: ANN001
    paired: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, block)
    high = tl.full([block], LOWEST, tl.float32)
    total = tl.zeros([block], tl.float32)
    cross = tl.zeros([block], tl.float32)
    where = tl.zeros([block], tl.int32)
    if paired:
        theirs_log_sum = tl.load(reference_log_sum + row)
    for start in range(0, vocabulary, block):
        columns = start + lanes
        inside = columns < vocabulary
        ours = tl.load(logits + row * vocabulary + columns, mask=inside, other=LOWEST).to(tl.float32)
        where = tl.where(ours > high, columns, where)
        higher = tl.maximum(high, ours)
        total = total * tl.exp(high - higher) + tl.exp(ours - higher)
        high = higher
        if paired:
            theirs = tl.load(reference + row * vocabulary + columns, mask=inside, other=LOWEST).to(tl.float32)
            theirs -= theirs_log_sum
            chance = tl.exp(theirs)
            cross += tl.where(chance > 0, chance * (theirs - ours), 0.0)
    peak = tl.max(high, 0)
    norm = peak + tl.log(tl.sum(total * tl.exp(high - peak), 0))
    tl.store(log_sum + row, norm)
    tl.store(top + row, tl.min(tl.where(high == peak, where, vocabulary), 0))
    tl.store(loss + row, norm - tl.load(logits + row * vocabulary + tl.load(targets + row)).to(tl.float32))
    tl.store(kl + row, tl.sum(cross, 0) + norm if paired else 0.0)


def compare(
    logits: "torch.Tensor",
    targets: "torch.Tensor",
    reference: "torch.Tensor | None" = None,
    reference_log_sum: "torch.Tensor | None" = None,
) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]":
    """What `tasks.evaluate.scoring.compare` returns, for logits on a GPU."""
    import torch

    rows, vocabulary = logits.shape
    loss, kl, log_sum = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    top = torch.empty(rows, dtype=torch.int32, device=logits.device)
    theirs = logits if reference is None else reference.contiguous()
    sums = loss if reference_log_sum is None else reference_log_sum.contiguous()
    arguments = (logits.contiguous(), targets.contiguous(), theirs, sums, loss, kl, top, log_sum, vocabulary)
    with torch.cuda.device(logits.device):
        _kernel[(rows,)](*arguments, paired=reference is not None, block=BLOCK, num_warps=8)
    return loss, kl, top, log_sum
