"""The work itself: read a piece, quantize it, write it, with several tensors in flight; flat in memory, and restartable.

Every thread takes the next tensor, largest first, and owns its buffers. Reading, copying to and from a GPU, and writing
overlap because threads do. What is finished is noted in a journal, so that a killed run is taken up where it was.
"""

import contextlib
import hashlib
import json
import os
import queue
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from configs.errors import TameError
from configs.schema import Variant
from tasks.progress import Progress
from tasks.quantize.layout import DTYPES, Job, method_of
from tasks.quantize.output import Shard

JOURNAL = ".journal"
PIECE = {"cpu": 1 << 20, "cuda": 1 << 23}  # weights in flight for each thread
COPY = 1 << 24  # bytes


class Journal:
    """Which tensors of an output are finished, by the checksums of what was written for them; survives a kill."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.path = folder / JOURNAL
        self.done: dict[str, int] = {}
        with contextlib.suppress(OSError, ValueError):
            lines = self.path.read_text(encoding="utf-8").splitlines()
            if lines and lines[0] == identity:
                for line in lines[1:]:
                    name, crc = json.loads(line)
                    self.done[name] = crc
        if not self.done:
            self.path.write_text(identity + "\n", encoding="utf-8")
        self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def add(self, name: str, crc: int) -> None:
        """Note a tensor as finished."""
        os.write(self.file, (json.dumps([name, crc]) + "\n").encode())

    def remove(self) -> None:
        """The output is complete."""
        os.close(self.file)
        self.path.unlink()


def stream(
    folder: Path,
    jobs: list[Job],
    files: list[Shard],
    variant: Variant,
    devices: list[str],
    workers: int,
    journal: Journal,
    progress: Progress,
) -> dict[str, str]:
    """Do all `jobs`, reading from `folder`, and write all `files`. Returns each file's sha256, by its name.

    Raises:
        TameError: NaN or infinite weights, weights lost in int8's float16, a GPU out of memory; it names file and tensor.
        OSError: no space left.
    """
    for shard in files:
        shard.open()
    where = {name: shard for shard in files for name in shard.tensors}
    left = {shard.path.name: 0 for shard in files}
    for job in jobs:
        for name in job.parts.values():
            left[where[name].path.name] += 1
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in sorted(jobs, key=lambda job: job.source.start - job.source.end):
        todo.put(job)
    total = sum(job.source.end - job.source.start for job in jobs)
    done = 0
    lock = threading.Lock()
    stopped = threading.Event()
    digests: dict[str, Future[str]] = {}
    what = f"quantize {variant.label}"
    threads = torch.get_num_threads()

    def work(number: int) -> None:
        nonlocal done
        worker = Worker(folder, variant, devices[number % len(devices)], where, journal, threads)
        try:
            while not stopped.is_set():
                try:
                    job = todo.get_nowait()
                except queue.Empty:
                    return
                worker.do(job)
                with lock:
                    done += job.source.end - job.source.start
                    progress(what, done, total)
                    for name in job.parts.values():
                        shard = where[name]
                        left[shard.path.name] -= 1
                        if not left[shard.path.name]:
                            shard.close()
                            digests[shard.path.name] = hashing.submit(_sha256, shard.path)
        except BaseException:
            stopped.set()
            raise
        finally:
            worker.close()

    with ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(1) as hashing:
        running = [pool.submit(work, number) for number in range(workers)]
        for finished in wait(running, return_when=FIRST_EXCEPTION).done:
            finished.result()
        for future in running:
            future.result()
        return {name: future.result() for name, future in sorted(digests.items())}


class Worker:
    """One thread's way of doing jobs: open files, and buffers that are allocated once."""

    def __init__(
        self, folder: Path, variant: Variant, device: str, where: dict[str, Shard], journal: Journal, threads: int
    ) -> None:
        self.folder, self.variant, self.where, self.journal, self.threads = folder, variant, where, journal, threads
        self.method = method_of(variant)
        self.device = torch.device(device)
        self.open: dict[str, int] = {}
        self.buffer = torch.empty(0, dtype=torch.uint8)
        torch.set_num_threads(1)

    def close(self) -> None:
        """Close what was opened."""
        for file in self.open.values():
            os.close(file)

    def do(self, job: Job) -> None:
        """Write what is to be written for one tensor, unless a killed run did."""
        name = job.parts[""]
        known = self.journal.done.get(name)
        if known is not None and self._checksum(job) == known:
            return
        try:
            crc = self._quantize(job) if job.quantized else self._copy(job, name)
        except torch.OutOfMemoryError as error:
            raise TameError(
                f"{self.folder / job.source.file}: {job.source.name}: {self.device} is out of memory; use fewer --workers, "
                "free some, or use --device cpu"
            ) from error
        if not any(name in self.where[name].late for name in job.parts.values()):
            self.journal.add(name, crc)

    def _checksum(self, job: Job) -> int:
        crc = 0
        for name in _codes_first(job):
            shard = self.where[name]
            size = shard.tensors[name].nbytes
            for start in range(0, size, COPY):
                piece = os.pread(shard.file, min(COPY, size - start), shard.at[name] + start)
                crc = zlib.crc32(piece, crc)
        return crc

    def _copy(self, job: Job, name: str) -> int:
        """Copy a tensor, in pieces, cast if it has to be."""
        source, target = job.source, self.where[name]
        dtype = DTYPES[source.dtype]
        crc = at = 0
        for start in range(source.start, source.end, COPY):
            piece = self._read(source.file, start, min(COPY, source.end - start))
            if dtype != job.dtype:
                piece = piece.view(dtype).to(job.dtype).view(torch.uint8)
            data = memoryview(piece.numpy())
            crc = zlib.crc32(data, crc)
            target.write(name, at, data)
            at += len(data)
        return crc

    def _quantize(self, job: Job) -> int:
        """Quantize a weight a few rows at a time, then write its scales."""
        source = job.source
        dtype = DTYPES[source.dtype]
        height, width = job.shape
        codes_name = job.parts[""]
        whole = None
        if job.transposed:
            whole = self._read(source.file, source.start, source.end - source.start).view(dtype).view(width, height).T
        step = self.method.step(width)
        several = max(step, PIECE[self.device.type] // width // step * step)
        row_bytes = width * dtype.itemsize
        scales = []
        crc = at = 0
        for row in range(0, height, several):
            count = min(several, height - row)
            if whole is None:
                block = self._read(source.file, source.start + row * row_bytes, count * row_bytes)
                block = block.view(dtype).view(count, width)
            else:
                block = whole[row : row + count].contiguous()
            block = block.to(self.device, non_blocking=True).to(job.dtype)
            codes, scale = self.method.rows(block, self.variant)
            self._check(job, block, scale, row)
            scales.append(scale)
            data = _bytes(codes)
            crc = zlib.crc32(data, crc)
            self.where[codes_name].write(codes_name, at, data)
            at += len(data)
        torch.set_num_threads(self.threads)  # bitsandbytes' mean of the scales depends on the number of threads
        rest = self.method.finish(torch.cat(scales), job.shape, job.dtype, self.variant)
        torch.set_num_threads(1)
        for suffix, name in job.parts.items():
            if not suffix:
                continue
            data = _bytes(rest[suffix])
            crc = zlib.crc32(data, crc)
            self.where[name].write(name, 0, data)
        return crc

    def _check(self, job: Job, block: torch.Tensor, scale: torch.Tensor, row: int) -> None:
        if bool(torch.isfinite(scale).all()) and (self.variant.method != "int8" or bool(scale.all())):
            return
        where = f"{self.folder / job.source.file}: {job.source.name}"
        bad = (~torch.isfinite(block)).nonzero()
        if len(bad):
            at = [row + int(bad[0][0]), int(bad[0][1])]
            value = block[bad[0][0], bad[0][1]].item()
            raise TameError(f"{where} is {value} at {at}; a broken checkpoint cannot be quantized, download it again")
        if self.variant.method != "int8":
            raise TameError(f"{where}: a scale is not finite; a broken checkpoint cannot be quantized")
        lost = (~torch.isfinite(scale) | ((scale == 0) & (block != 0).any(1))).nonzero()
        if len(lost):
            first = int(lost[0])
            largest = block[first].abs().max().item()
            raise TameError(
                f"{where}: row {row + first} has magnitudes up to {largest:.3g}, which float16, that int8 goes through, "
                "cannot hold; use nf4 or fp4, or skip_modules"
            )

    def _read(self, file: str, start: int, size: int) -> torch.Tensor:
        """Bytes of a source file, U8 [size], in this worker's buffer: valid until the next call."""
        if len(self.buffer) < size:
            self.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        if file not in self.open:
            self.open[file] = os.open(self.folder / file, os.O_RDONLY)
        data = memoryview(self.buffer.numpy())[:size]
        got = 0
        while got < size:
            count = os.preadv(self.open[file], [data[got:]], start + got)
            if not count:
                raise TameError(f"{self.folder / file}: ends at byte {start + got}; it changed while it was read")
            got += count
        return self.buffer[:size]


def _codes_first(job: Job) -> list[str]:
    return sorted(job.parts.values(), key=lambda name: name != job.parts[""])


def _bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes, on the host."""
    return memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity_of(parts: Any) -> str:
    """One line that says what an output is made from: equal lines, equal output."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


__all__ = ["Callable", "Journal", "identity_of", "stream"]
