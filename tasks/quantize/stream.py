"""The work itself: read a piece, quantize it, write it, with several tensors in flight; flat in memory, and restartable.

Every thread takes the next tensor and owns its buffers. Reading, copying to and from a GPU, and writing overlap because
threads do; on a GPU all kernels and copies share its default stream, which bitsandbytes' 4-bit kernels insist on.
"""

import hashlib
import queue
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch

from configs.schema import Variant
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

    A file is hashed as soon as it is complete, while the next is made. Its first bytes are scales that need the last
    weights, so it cannot be hashed any earlier.

    Raises:
        TameError: NaN or infinite weights, weights lost in int8's float16, a GPU out of memory; it names file and tensor.
        OSError: no space left.
    """
    shards = {name: shard for shard in files for name in shard.tensors}
    jobs = [piece for job in jobs for piece in job.split(COPY)]
    waiting = Counter(shards[name].path for job in jobs for name in job.parts.values())
    number = {shard.path: i for i, shard in enumerate(files)}
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    # File after file, so that they are complete one by one; in each, the largest first, so that no thread ends alone.
    for job in sorted(jobs, key=lambda job: (number[shards[job.parts[""]].path], job.source.start - job.source.end)):
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
        with ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(1) as hashing:
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
