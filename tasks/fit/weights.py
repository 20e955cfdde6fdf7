"""The weights that a quantized checkpoint stands for, one by one, by the names that the source's model has for them."""

from pathlib import Path
from typing import TYPE_CHECKING

from configs.schema import Variant
from tasks.download.checkpoint import read_tensors, written_tensors
from tasks.quantize.layout import Job, lay_out
from tasks.quantize.methods import method_of

if TYPE_CHECKING:
    import torch

PIECE = 1 << 22  # weights restored at once


class Restorer:
    """Reads the checkpoint in `folder`, which was made as `variant` from the model in `source`."""

    def __init__(self, source: Path, folder: Path | None, variant: Variant, trust_remote_code: bool = False) -> None:
        """Raises BadInputError, TameError: as `lay_out`. Without a folder, it tells sizes alone."""
        self.source, self.folder, self.method, self.variant = source, folder, method_of(variant), variant
        layout = lay_out(source, self.method, variant, read_tensors(source), trust_remote_code)
        self.jobs: dict[str, Job] = {job.weight: job for job in layout.jobs if job.quantized}
        """The quantized weights, by the model's names."""
        self.stored = {
            job.weight: sum(layout.outputs[name].nbytes for name in job.outputs) for job in layout.jobs if job.quantized
        }
        """What each takes in the checkpoint, in bytes, without the file's header."""
        self.written = written_tensors(folder) if folder else {}

    def plain_bytes(self, weight: str) -> int:
        """What a weight takes where it is not quantized."""
        job = self.jobs[weight]
        return job.shape[0] * job.shape[1] * job.dtype.itemsize

    def squared_error(self, name: str) -> float:
        """How far a weight is from the source's: the sum of the squares of the differences."""
        from safetensors import safe_open

        job = self.jobs[name]
        with safe_open(self.source / job.source.file, framework="pt") as file:
            original = file.get_tensor(job.source.name).float()
        difference = self.weight(name, "cpu").sub_(original.T if job.transposed else original)
        return float(difference.square_().sum())

    def weight(self, name: str, device: str) -> "torch.Tensor":
        """A weight, F32 [out, in]."""
        import torch
        from safetensors import safe_open

        assert self.folder is not None
        job, parts = self.jobs[name], {}
        for part, output in job.parts.items():
            with safe_open(self.folder / self.written[output].file, framework="pt") as file:
                parts[part] = file.get_tensor(output)
        restored = self.method.restore(parts, (job.shape[0], job.shape[1]), device)
        count = job.shape[0] * job.shape[1]
        several = max(1, PIECE // restored.multiple) * restored.multiple
        pieces = [restored.piece(start, min(several, count - start)) for start in range(0, count, several)]
        return torch.cat(pieces).view(job.shape[0], job.shape[1])
