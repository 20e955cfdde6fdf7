"""What one thread does with one tensor."""

import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from xxhash import xxh3_64

from configs.errors import TameError
from configs.schema import Variant
from tasks.quantize.journal import Done, Journal
from tasks.quantize.layout import DTYPES, Job, method_of
from tasks.quantize.shards import Shard

WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 23}  # quantized at once by a thread
BYTES = {"cpu": 1 << 22, "cuda": 1 << 24}  # copied at once by a thread


class Sources:
    """The source's files, opened once for all threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, int] = {}
        self.lock = threading.Lock()

    def read(self, name: str, start: int, data: memoryview) -> None:
        """Fill `data` from byte `start` of a file."""
        with self.lock:
            if name not in self.files:
                self.files[name] = os.open(self.folder / name, os.O_RDONLY)
        while data:
            count = os.preadv(self.files[name], [data], start)
            if not count:
                raise TameError(f"{self.folder / name}: ends at byte {start}; it changed while it was read, run again")
            data, start = data[count:], start + count

    def close(self) -> None:
        """Close them."""
        for file in self.files.values():
            os.close(file)


class Worker:
    """One thread: a device, and buffers that are allocated once."""

    def __init__(
        self,
        sources: Sources,
        shards: dict[str, Shard],
        variant: Variant,
        device: str,
        journal: Journal,
        threads: int,
    ) -> None:
        self.sources, self.shards, self.variant, self.journal, self.threads = sources, shards, variant, journal, threads
        self.method = method_of(variant)
        self.device = torch.device(device)
        self.buffers: dict[str, tuple[torch.Tensor, memoryview]] = {}
        self.scales = torch.empty(0, device=self.device)
        torch.set_num_threads(1)

    def do(self, job: Job) -> bool:
        """Write what is to be written for one tensor, unless a killed run did. Returns whether it had to."""
        known = self.journal.done.get(job.key)
        if known is not None and self._written(job) == known.checksum:
            for name, text in known.late.items():
                self.shards[name].late[name] = text.encode()
            return False
        try:
            checksum = self._quantize(job) if job.quantized else self._copy(job)
        except torch.OutOfMemoryError as error:
            raise TameError(
                f"{self._where(job)}: {self.device} is out of memory; use fewer --workers, free some, or use --device cpu"
            ) from error
        late = {name: self.shards[name].late[name] for name in self._parts(job) if name in self.shards[name].late}
        self.journal.add(job.key, Done(checksum, {name: (text or b"").decode() for name, text in late.items()}))
        return True

    def _copy(self, job: Job) -> int:
        """Copy a tensor piece by piece, cast if it has to be. Returns the checksum of what was written."""
        name, source = job.parts[""], job.source
        stored = DTYPES[source.dtype]
        checksum, at = xxh3_64(), job.at
        several = BYTES[self.device.type]
        for start in range(source.start, source.end, several):
            piece = self._read(source.file, start, min(several, source.end - start))
            values = piece.view(stored)
            if stored.is_floating_point and not all(bool(torch.isfinite(end)) for end in torch.aminmax(values)):
                first = int((~torch.isfinite(values)).nonzero()[0])
                index = job.at // job.dtype.itemsize + (start - source.start) // stored.itemsize + first
                raise TameError(
                    f"{self._where(job)} has {values[first].item()} at element {index}; the checkpoint is broken, get it again"
                )
            data = _view(values.to(job.dtype))
            checksum.update(data)
            self.shards[name].write(name, at, data)
            at += len(data)
        return checksum.intdigest()

    def _quantize(self, job: Job) -> int:
        """Quantize a weight a few rows at a time, then write what belongs to it. Returns the checksum of what was written."""
        codes_name = job.parts[""]
        scale = self._scales(self.method.scales(job.shape))
        checksum, at, known = xxh3_64(), 0, 0
        for _, block in self._blocks(job):
            codes, some = self.method.rows(block, self.variant)
            scale[known : known + len(some)] = some
            known += len(some)
            data = self._host(codes)
            checksum.update(data)
            self.shards[codes_name].write(codes_name, at, data)
            at += len(data)
        self._check(job, scale)
        torch.set_num_threads(self.threads)  # the last bit of bitsandbytes' mean of the scales depends on it
        rest = self.method.finish(scale, job.shape, job.dtype, self.variant)
        torch.set_num_threads(1)
        suffixes = {name: suffix for suffix, name in job.parts.items()}
        for name in self._parts(job)[1:]:
            data = _view(rest[suffixes[name]].cpu())
            if name not in self.shards[name].late:
                checksum.update(data)
            self.shards[name].write(name, 0, data)
        return checksum.intdigest()

    def _blocks(self, job: Job) -> Iterator[tuple[int, torch.Tensor]]:
        """A weight's rows, a few at a time, on the device and in the job's dtype; with the number of the first."""
        source, (height, width) = job.source, job.shape
        stored = DTYPES[source.dtype]
        step = self.method.step(width)
        several = max(step, WEIGHTS[self.device.type] // width // step * step)
        if job.transposed:
            whole = self._read(source.file, source.start, source.end - source.start).view(stored).view(width, height).T
        for row in range(0, height, several):
            count = min(several, height - row)
            if job.transposed:
                block = whole[row : row + count].contiguous()
            else:
                row_bytes = width * stored.itemsize
                block = self._read(source.file, source.start + row * row_bytes, count * row_bytes)
                block = block.view(stored).view(count, width)
            yield row, block.to(self.device, non_blocking=True).to(job.dtype)

    def _check(self, job: Job, scales: torch.Tensor) -> None:
        """Refuse a weight whose scales say that it is broken, or that the format cannot hold it; then find where."""
        int8 = self.variant.method == "int8"
        least, most = (float(end) for end in torch.aminmax(scales))  # NaN, if one is
        if math.isfinite(most) and not (int8 and least == 0):
            return
        for row, block in self._blocks(job):
            bad = (~torch.isfinite(block)).nonzero()
            if len(bad):
                value = block[bad[0][0], bad[0][1]].item()
                at = [row + int(bad[0][0]), int(bad[0][1])]
                raise TameError(f"{self._where(job)} has {value} at {at}; the checkpoint is broken, get it again")
            scale = scales[row : row + len(block)]
            if int8 and len(lost := (~torch.isfinite(scale) | ((scale == 0) & (block != 0).any(1))).nonzero()):
                first = int(lost[0])
                raise TameError(
                    f"{self._where(job)}: row {row + first} has weights up to {block[first].abs().max().item():.3g}, which "
                    "float16, that int8 goes through, cannot hold; use nf4 or fp4, or name the module in skip_modules"
                )

    def _written(self, job: Job) -> int:
        """The checksum of what is in the output for a tensor."""
        checksum = xxh3_64()
        for name in self._parts(job):
            shard = self.shards[name]
            if name in shard.late:
                continue
            end = shard.tensors[name].nbytes
            if not job.quantized:
                count = (job.source.end - job.source.start) // DTYPES[job.source.dtype].itemsize
                end = job.at + count * job.dtype.itemsize
            several = BYTES[self.device.type]
            for start in range(job.at, end, several):
                checksum.update(os.pread(shard.file, min(several, end - start), shard.at[name] + start))
        return checksum.intdigest()

    def _parts(self, job: Job) -> list[str]:
        """The names of a job's outputs, the codes first."""
        return [job.parts[""], *(name for suffix, name in job.parts.items() if suffix)]

    def _where(self, job: Job) -> str:
        return f"{self.sources.folder / job.source.file}: {job.source.name}"

    def _read(self, file: str, start: int, size: int) -> torch.Tensor:
        """Bytes of a source file, U8 [size], in this thread's buffer: valid until the next call."""
        buffer, data = self._buffer("in", size)
        self.sources.read(file, start, data)
        return buffer

    def _host(self, tensor: torch.Tensor) -> memoryview:
        """A tensor's bytes on the host, valid until the next call."""
        if tensor.device.type == "cpu":
            return _view(tensor)
        buffer, data = self._buffer("out", tensor.nbytes)
        buffer.copy_(tensor.view(-1).view(torch.uint8), non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record(torch.cuda.current_stream(self.device))
        ready.synchronize()
        return data

    def _scales(self, count: int) -> torch.Tensor:
        """Room for the scales of a weight, F32 [count] on the device: valid until the next call."""
        if len(self.scales) < count:
            self.scales = torch.empty(count, device=self.device)
        return self.scales[:count]

    def _buffer(self, use: str, size: int) -> tuple[torch.Tensor, memoryview]:
        if use not in self.buffers or len(self.buffers[use][1]) < size:
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
            self.buffers[use] = buffer, _view(buffer)
        buffer, data = self.buffers[use]
        return buffer[:size], data[:size]


def _view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the host."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
