"""Reads, quantizes and writes one tensor at a time. Each thread of the engine has one `Worker`."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from xxhash import xxh3_64

from configs.errors import TameError
from configs.schema import Variant
from tasks.calibrate.finished import read_codes
from tasks.download.checkpoint import Stored
from tasks.quantize.journal import Done, Journal
from tasks.quantize.layout import DTYPES, Job
from tasks.quantize.packed import Packed, Reader
from tasks.quantize.protocols import CodedFormat, TensorFormat, WholeFormat
from tasks.quantize.shards import Shard

WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 23}  # quantized at once by a thread
BYTES = {"cpu": 1 << 22, "cuda": 1 << 24}  # copied at once by a thread


class Sources:
    """The source's files, opened once for all threads."""

    def __init__(self, folder: Path, packed: dict[str, Packed] | None = None) -> None:
        self.folder = folder
        self.packed = packed or {}
        self.reader = Reader(self.fill, self.packed)
        self.files: dict[str, int] = {}
        self.lock = threading.Lock()

    def read(self, source: Stored, start: int, data: memoryview) -> None:
        """Fill `data` from byte `start` of a tensor's file, or of the weight itself where that is packed."""
        if source.name in self.packed:
            self.reader.read(source.name, start, data)
        else:
            self.fill(source.file, start, data)

    def fill(self, name: str, start: int, data: memoryview) -> None:
        """Fill `data` from byte `start` of a file.

        Raises:
            TameError: the file ends before.
        """
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
        tensor_format: TensorFormat,
        variant: Variant,
        device: str,
    ) -> None:
        self.sources, self.shards = sources, shards
        self.tensor_format, self.variant = tensor_format, variant
        self.device = torch.device(device)
        self.buffers: dict[str, tuple[torch.Tensor, memoryview]] = {}
        self.scales = torch.empty(0, device=self.device)
        # Of this thread alone. A format's sums come out the same on every machine: torch would else split a long one over as
        # many threads as there are cores, and the last bit of double quantization's mean of the scales depends on that.
        torch.set_num_threads(1)

    def do(self, job: Job, journal: Journal) -> bool:
        """Write what is to be written for one tensor, unless a killed run did. Returns whether it had to."""
        recorded = journal.done.get(job.key)
        if recorded is not None and self._written(job) == recorded.checksum:
            for name, text in recorded.late.items():
                self.shards[name].late[name] = text.encode()
            return False
        checksum = self.write(job)
        late = {name: self.shards[name].late[name] for name in job.outputs if name in self.shards[name].late}
        journal.add(job.key, Done(checksum, {name: (text or b"").decode() for name, text in late.items()}))
        return True

    def write(self, job: Job) -> int:
        """Write what is to be written for one tensor. Returns the XXH3 checksum of it.

        Raises:
            TameError: NaN or infinite weights, weights that the format loses, a GPU out of memory; it names file and tensor.
        """
        try:
            return self._quantize(job) if job.quantized else self._copy(job)
        except torch.OutOfMemoryError as error:
            raise TameError(
                f"{self._where(job)}: {self.device} is out of memory; use fewer --workers, free some, or use --device cpu"
            ) from error

    def _variant(self, job: Job) -> Variant:
        """What a weight is quantized as."""
        return job.variant or self.variant

    def _copy(self, job: Job) -> int:
        """Copy a tensor piece by piece, cast if it has to be. Returns the checksum of what was written."""
        name, source = job.output, job.source
        stored = DTYPES[source.dtype]
        checksum, at = xxh3_64(), job.at
        several = BYTES[self.device.type]
        for start in range(source.start, source.end, several):
            piece = self._read(source, start, min(several, source.end - start))
            values = piece.view(stored)
            cast = values.to(job.dtype)
            if job.dtype.is_floating_point and not all(bool(torch.isfinite(end)) for end in torch.aminmax(cast)):
                first = int((~torch.isfinite(cast)).nonzero()[0])
                index = job.at // job.dtype.itemsize + (start - source.start) // stored.itemsize + first
                raise TameError(f"{self._where(job)} {_lost(values[first], f'element {index}', job.dtype)}")
            data = _view(cast)
            checksum.update(data)
            self.shards[name].write(name, at, data)
            at += len(data)
        return checksum.intdigest()

    def _quantize(self, job: Job) -> int:
        """Quantize a weight a few rows at a time, then write what belongs to it. Returns the checksum of what was written."""
        if job.taken:
            return self._take(job)
        if job.chosen is not None:
            return self._write_chosen(job, *job.chosen)
        tensor_format = self.tensor_format
        if isinstance(tensor_format, WholeFormat):
            tensor_format = tensor_format.knowing(self._largest(job))
        scale = self._scales(tensor_format.scale_count((job.shape[0], job.shape[1]), self._variant(job)))
        checksum, at, scales_done = xxh3_64(), 0, 0
        for _, block in self._blocks(job):
            codes, block_scales = tensor_format.quantize_rows(block, self._variant(job))
            scale[scales_done : scales_done + len(block_scales)] = block_scales
            scales_done += len(block_scales)
            data = self._host(codes)
            checksum.update(data)
            self.shards[job.output].write(job.output, at, data)
            at += len(data)
        self._check(job, scale)
        self._write_parts(job, scale, checksum, tensor_format)
        return checksum.intdigest()

    def _take(self, job: Job) -> int:
        """Copy the codes and scales of a weight from another checkpoint. Returns the checksum of what was written."""
        checksum = xxh3_64()
        for name, (file, stored) in job.taken.items():
            data = bytearray(stored.end - stored.start)
            with file.open("rb", buffering=0) as opened:
                opened.seek(stored.start)
                if opened.readinto(data) != len(data):
                    raise TameError(f"{file}: ends within {name}; it changed while it was read, run again")
            if name not in self.shards[name].late:
                checksum.update(data)
            self.shards[name].write(name, 0, memoryview(data))
        return checksum.intdigest()

    def _write_chosen(self, job: Job, file: Path, name: str) -> int:
        """Write the codes and scales of a weight that was calibrated. Returns the checksum of what was written."""
        assert isinstance(self.tensor_format, CodedFormat)
        made = read_codes(file, name)
        data = _view(self.tensor_format.pack_codes(made.codes))
        checksum = xxh3_64(data)
        self.shards[job.output].write(job.output, 0, data)
        scales = self.tensor_format.scales_to_pack(made.scales, self._variant(job))
        self._write_parts(job, scales, checksum, self.tensor_format)
        return checksum.intdigest()

    def _largest(self, job: Job) -> torch.Tensor:
        """The largest magnitude in a weight, and in those that share a scale with it, in the dtype that is quantized."""
        found = torch.zeros((), dtype=job.dtype)
        for source in job.known_with:
            several = BYTES[self.device.type]
            for start in range(source.start, source.end, several):
                piece = self._read(source, start, min(several, source.end - start)).view(DTYPES[source.dtype])
                found = torch.maximum(found, piece.abs().max().to(job.dtype))
        return found

    def _write_parts(self, job: Job, scale: torch.Tensor, checksum: xxh3_64, tensor_format: TensorFormat) -> None:
        """Write what belongs to the codes of a weight, made from its scales."""
        packed = tensor_format.pack(scale, (job.shape[0], job.shape[1]), job.dtype, self._variant(job))
        for part, name in job.parts.items():
            if name == job.output:
                continue
            data = _view(packed[part].cpu())
            if name not in self.shards[name].late:
                checksum.update(data)
            self.shards[name].write(name, 0, data)

    def _blocks(self, job: Job) -> Iterator[tuple[int, torch.Tensor]]:
        """A weight's rows, a few at a time, on the device and in the job's dtype; with the number of the first."""
        for row, block in self._stored_blocks(job):
            yield row, block.to(self.device, non_blocking=True).to(job.dtype)

    def _stored_blocks(self, job: Job) -> Iterator[tuple[int, torch.Tensor]]:
        """The same on the host, in the dtype that they have in the source; valid until the next one."""
        source, (height, width) = job.source, job.shape
        stored = DTYPES[source.dtype]
        step = self.tensor_format.row_multiple(width, self._variant(job))
        several = max(step, WEIGHTS[self.device.type] // width // step * step)
        if job.transposed:
            whole = self._read(source, source.start, source.end - source.start).view(stored).view(width, height).T
        for row in range(0, height, several):
            count = min(several, height - row)
            if job.transposed:
                block = whole[row : row + count].contiguous()
            else:
                row_bytes = width * stored.itemsize
                block = self._read(source, source.start + row * row_bytes, count * row_bytes)
                block = block.view(stored).view(count, width)
            yield row, block

    def _check(self, job: Job, scales: torch.Tensor) -> None:
        """Refuse a weight whose scales say that it is broken, or that the format cannot hold it; then find where."""
        if self.tensor_format.plausible(scales):
            return
        checked = 0
        for row, stored in self._stored_blocks(job):
            block = stored.to(self.device).to(job.dtype)
            bad = (~torch.isfinite(block)).nonzero()
            if len(bad):
                first, column = (int(index) for index in bad[0])
                raise TameError(f"{self._where(job)} {_lost(stored[first, column], [row + first, column], job.dtype)}")
            count = self.tensor_format.scale_count((block.shape[0], block.shape[1]), self._variant(job))
            if lost := self.tensor_format.fault(block, scales[checked : checked + count]):
                lost_row, why = lost
                raise TameError(f"{self._where(job)}: row {row + lost_row} {why}")
            checked += count

    def _written(self, job: Job) -> int:
        """The checksum of what is in the output for a tensor."""
        checksum = xxh3_64()
        for name in job.outputs:
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

    def _where(self, job: Job) -> str:
        return f"{self.sources.folder / job.source.file}: {job.source.name}"

    def _read(self, source: Stored, start: int, size: int) -> torch.Tensor:
        """Bytes of a source's tensor, U8 [size], in this thread's buffer: valid until the next call."""
        buffer, data = self._buffer("in", size)
        self.sources.read(source, start, data)
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


def _lost(value: torch.Tensor, at: object, dtype: torch.dtype) -> str:
    """What is wrong with a stored number, at `at`, that is not finite in `dtype`; goes on from the tensor's name."""
    if bool(torch.isfinite(value)):
        name, most = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
        return (
            f'has {value.item():.6g} at {at}, and {name}, the model\'s dtype, ends at {most:.6g}; write another "dtype" into '
            "config.json, such as bfloat16"
        )
    if value.dtype == torch.float16 and bool(torch.isinf(value)):
        return (
            f"has {value.item()} at {at}: a larger number was cast to float16, which ends at 65504; get the model in "
            "bfloat16 or float32"
        )
    return f"has {value.item()} at {at}; the checkpoint is broken, get it again"


def _view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the host."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
