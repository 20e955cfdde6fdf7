"""The work itself: read a piece, quantize it, write it, with several tensors in flight; flat in memory, and restartable.

Every thread takes the next tensor and owns its buffers. Reading, copying to and from a GPU, and writing overlap because
threads do; on a GPU all kernels and copies share its default stream, which bitsandbytes' 4-bit kernels insist on.
"""

import hashlib
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from itertools import zip_longest
from pathlib import Path

import torch

from configs.schema import Variant
from tasks.device import cores
from tasks.progress import Progress
from tasks.quantize.journal import Journal
from tasks.quantize.layout import Job
from tasks.quantize.output import Shard
from tasks.quantize.worker import Sources, Worker

COPY = 1 << 26  # bytes that one thread copies at a time: large embeddings are shared


def stream(
    folder: Path,
    jobs: list[Job],
    files: list[Shard],
    variant: Variant,
    devices: list[str],
    workers: int,
    journal: Journal,
    meanwhile: Callable[[], None],
    progress: Progress,
) -> dict[str, str]:
    """Do all `jobs`, reading from `folder`, and write all `files`. Returns each file's sha256, by its name.

    `meanwhile` is called when all files are complete, while the last one is hashed.

    A file is hashed as soon as it is complete, while others are made. Its first bytes are scales that need the last
    weights, so it cannot be hashed any earlier.

    Raises:
        TameError: NaN or infinite weights, weights lost in int8's float16, a GPU out of memory; it names file and tensor.
        OSError: no space left.
    """
    shards = {name: shard for shard in files for name in shard.tensors}
    jobs = [piece for job in jobs for piece in job.split(COPY)]
    waiting = Counter(shards[name].path for job in jobs for name in job.parts.values())
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in _order(jobs, shards, files, workers):
        todo.put(job)
    total = sum(job.source.end - job.source.start for job in jobs)
    sofar = 0
    lock = threading.Lock()
    stopped = threading.Event()
    digests: dict[str, Future[str]] = {}
    threads = torch.get_num_threads()
    sources = Sources(folder)

    def finish(job: Job) -> None:
        nonlocal sofar
        with lock:
            sofar += job.source.end - job.source.start
            progress(f"quantize {variant.label}", sofar, total)
            for name in job.parts.values():
                shard = shards[name]
                waiting[shard.path] -= 1
                if not waiting[shard.path]:
                    shard.close()
                    digests[shard.path.name] = hashing.submit(_sha256, shard.path)

    def work(number: int) -> None:
        worker = Worker(sources, shards, variant, devices[number % len(devices)], journal, threads)
        while not stopped.is_set():
            try:
                job = todo.get_nowait()
            except queue.Empty:
                return
            try:
                worker.do(job)
                finish(job)
            except BaseException:
                stopped.set()
                raise

    try:
        for shard in files:
            shard.open()
        with ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(max(1, min(8, cores() // 2))) as hashing:
            running = [pool.submit(work, number) for number in range(workers)]
            wait(running, return_when=FIRST_EXCEPTION)
            for future in running:
                future.result()
            meanwhile()
            return {name: future.result() for name, future in sorted(digests.items())}
    finally:
        sources.close()
        for shard in files:
            shard.abandon()


def _order(jobs: list[Job], shards: dict[str, Shard], files: list[Shard], several: int) -> Iterator[Job]:
    """First tensors that fill a file alone, as they take longest to hash; then `several` files at a time, each with the
    largest tensors first: the kernel lets one thread write to a file at a time, and no thread should end alone.
    """
    of_file: dict[Path, list[Job]] = {shard.path: [] for shard in files}
    for job in sorted(jobs, key=lambda job: job.source.start - job.source.end):
        of_file[shards[job.parts[""]].path].append(job)
    alone = [shard.path for shard in files if len(shard.tensors) == 1]
    rest = [shard.path for shard in files if len(shard.tensors) > 1]
    groups = [*([path] for path in alone), *(rest[i : i + several] for i in range(0, len(rest), several))]
    for group in groups:
        for row in zip_longest(*(of_file[path] for path in group)):
            yield from (job for job in row if job is not None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
