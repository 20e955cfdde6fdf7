"""The work itself: read a piece, quantize it, write it, with several tensors in flight; flat in memory, and restartable.

Every thread takes the next tensor and owns its buffers. Reading, copying to and from a GPU, and writing overlap because
threads do; on a GPU all kernels and copies share its default stream, which some formats' kernels insist on.
"""

import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import zip_longest

from tasks.quantize.file_digests import FileDigests, Span
from tasks.quantize.journal import Journal
from tasks.quantize.layout import Job
from tasks.quantize.packed import Packed
from tasks.quantize.protocols import Request, TensorFormat
from tasks.quantize.shards import Shard
from tasks.quantize.tensor import Sources, Worker
from tasks.runtime.device import cores
from tasks.runtime.progress import Progress

COPY = 1 << 26  # bytes that one thread copies at a time: large embeddings are shared
PER_GPU = 4  # threads: with more, they wait for each other


class Engine:
    """One run: a queue of jobs, the threads that do them, and what these share.

    A file is hashed as soon as it is complete, while others are made: its first bytes are scales that need the last
    weights. One that a single tensor fills, such as a large embedding, is hashed right behind the threads that write it.
    """

    def __init__(
        self,
        request: Request,
        tensor_format: TensorFormat,
        jobs: list[Job],
        shards: list[Shard],
        journal: Journal,
        progress: Progress,
        packed: dict[str, Packed] | None = None,
    ) -> None:
        self.request, self.tensor_format, self.journal, self.progress = request, tensor_format, journal, progress
        self.devices = _devices(request.device)
        self.threads = request.workers or _threads(self.devices)
        self.shards = shards
        self.shard_of = {name: shard for shard in shards for name in shard.tensors}
        self.jobs = [piece for job in jobs for piece in job.split(COPY)]
        self.queue: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in _order(self.jobs, self.shard_of, shards, self.threads):
            self.queue.put(job)
        self.unwritten = Counter(self.shard_of[name].path for job in self.jobs for name in job.outputs)
        self.written = {job.key: threading.Event() for job in self.jobs}
        self.bytes_total = sum(job.bytes_read for job in self.jobs)
        self.bytes_done = 0
        self.lock = threading.Lock()
        self.sources = Sources(request.source, packed)
        self.digests = FileDigests(journal)

    def run(self, when_written: Callable[[], None]) -> dict[str, str]:
        """Do all jobs. Returns each file's sha256, by its name.

        `when_written` is called when all files are complete, while the last one is hashed.

        Raises:
            TameError: NaN or infinite weights, weights that the format loses, a GPU out of memory; it names file and tensor.
            OSError: no space left.
        """
        try:
            for shard in self.shards:
                shard.open()
            with ThreadPoolExecutor(self.threads) as pool, self.digests:
                self._hash_behind_writers()
                threads = [pool.submit(self._work, number) for number in range(self.threads)]
                wait(threads, return_when=FIRST_EXCEPTION)
                for thread in threads:
                    thread.result()
                when_written()
                return self.digests.results()
        finally:
            self.sources.close()
            for shard in self.shards:
                shard.abandon()

    def _work(self, number: int) -> None:
        """What thread `number` does: job after job, until there is none, or one has failed."""
        device = self.devices[number % len(self.devices)]
        worker = Worker(self.sources, self.shard_of, self.tensor_format, self.request.variant, device)
        while not self.digests.stopped.is_set():
            try:
                job = self.queue.get_nowait()
            except queue.Empty:
                return
            try:
                self._finish(job, anew=worker.do(job, self.journal))
            except BaseException:
                self._stop()
                raise

    def _finish(self, job: Job, anew: bool) -> None:
        """Count a job as done, `anew` or by a killed run, and close and hash the files that are complete with it."""
        with self.lock:
            self.bytes_done += job.bytes_read
            self.progress(f"quantize {self.request.variant.label}", self.bytes_done, self.bytes_total)
            for name in job.outputs:
                shard = self.shard_of[name]
                self.unwritten[shard.path] -= 1
                if anew:
                    self.digests.forget(shard.path.name)
                if not self.unwritten[shard.path]:
                    shard.close()
                    self.digests.start(shard, [Span(shard.end, self.written[job.key])])
        self.written[job.key].set()

    def _stop(self) -> None:
        """Have all threads end, those too that wait for a job to be written."""
        self.digests.stop()
        for written in self.written.values():
            written.set()

    def _hash_behind_writers(self) -> None:
        """Start hashing the files that one tensor fills, each piece as soon as it is written."""
        for shard in _filled_by_one(self.shards):
            (name,) = shard.tensors
            pieces = sorted((job for job in self.jobs if name in job.outputs), key=lambda job: job.at)
            ends = [shard.data + job.at for job in pieces[1:]] + [shard.end]
            spans = [Span(end, self.written[job.key]) for end, job in zip(ends, pieces, strict=True)]
            self.digests.start(shard, spans)


def _devices(device: str) -> list[str]:
    """`cuda` means all GPUs that this process sees."""
    if device != "cuda":
        return [device]
    import torch

    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def _threads(devices: list[str]) -> int:
    return cores() if devices == ["cpu"] else min(cores(), PER_GPU * len(devices))


def _order(jobs: list[Job], shard_of: dict[str, Shard], shards: list[Shard], several: int) -> Iterator[Job]:
    """Tensors that fill a file alone first, a piece now and then, as they take longest to hash; beside them `several`
    files at a time, each with the largest tensors first: the kernel lets one thread write to a file at a time, and no
    thread should end alone.
    """
    of_file: dict[str, list[Job]] = {shard.path.name: [] for shard in shards}
    for job in sorted(jobs, key=lambda job: -job.bytes_read):
        of_file[shard_of[job.output].path.name].append(job)
    unshared = [
        job for shard in _filled_by_one(shards) for job in sorted(of_file.pop(shard.path.name), key=lambda job: job.at)
    ]
    queues = list(of_file.values())
    mixed = (
        job
        for i in range(0, len(queues), several)
        for row in zip_longest(*queues[i : i + several])
        for job in row
        if job is not None
    )
    for row in zip_longest(unshared, *[mixed] * several):
        yield from (job for job in row if job is not None)


def _filled_by_one(shards: list[Shard]) -> list[Shard]:
    """Files that one tensor fills."""
    return [shard for shard in shards if len(shard.tensors) == 1 and not shard.late]
