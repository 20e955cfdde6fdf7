"""The work itself: read a piece, quantize it, write it, with several tensors in flight; flat in memory, and restartable.

Every thread takes the next tensor and owns its buffers. Reading, copying to and from a GPU, and writing overlap because
threads do; on a GPU all kernels and copies share its default stream, which some formats' kernels insist on.
"""

import hashlib
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from itertools import zip_longest
from pathlib import Path

from configs.errors import TameError
from configs.schema import Variant
from tasks.quantize.journal import Journal
from tasks.quantize.layout import Job
from tasks.quantize.protocols import TensorFormat
from tasks.quantize.shards import Shard
from tasks.quantize.tensor import Sources, Worker
from tasks.runtime.device import cores
from tasks.runtime.progress import Progress

COPY = 1 << 26  # bytes that one thread copies at a time: large embeddings are shared
PIECE = 1 << 23  # bytes hashed at once: threads that hash should not ask for Python's lock often


def stream(
    folder: Path,
    jobs: list[Job],
    files: list[Shard],
    tensor_format: TensorFormat,
    variant: Variant,
    devices: list[str],
    workers: int,
    journal: Journal,
    meanwhile: Callable[[], None],
    progress: Progress,
) -> dict[str, str]:
    """Do all `jobs`, reading from `folder`, and write all `files`. Returns each file's sha256, by its name.

    `meanwhile` is called when all files are complete, while the last one is hashed.

    A file is hashed as soon as it is complete, while others are made: its first bytes are scales that need the last
    weights. One that a single tensor fills, such as a large embedding, is hashed right behind the threads that write it,
    and one that a killed run hashed, and of which no tensor is lost, not again.

    Raises:
        TameError: NaN or infinite weights, weights lost in int8's float16, a GPU out of memory; it names file and tensor.
        OSError: no space left.
    """
    shards = {name: shard for shard in files for name in shard.tensors}
    jobs = [piece for job in jobs for piece in job.split(COPY)]
    waiting = Counter(shards[name].path for job in jobs for name in job.outputs)
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in _order(jobs, shards, files, workers):
        todo.put(job)
    total = sum(job.source.end - job.source.start for job in jobs)
    sofar = 0
    lock = threading.Lock()
    stopped = threading.Event()
    written = {job.key: threading.Event() for job in jobs}
    digests: dict[str, Future[str]] = {}
    known = dict(journal.digests)
    sources = Sources(folder)

    def sha256(shard: Shard, spans: list[tuple[int, threading.Event]]) -> str:
        digest = _sha256(shard, spans, stopped)
        if not stopped.is_set():
            journal.add_file(shard.path.name, digest)
        return digest

    def finish(job: Job, anew: bool) -> None:
        nonlocal sofar
        with lock:
            sofar += job.source.end - job.source.start
            progress(f"quantize {variant.label}", sofar, total)
            for name in job.outputs:
                shard = shards[name]
                waiting[shard.path] -= 1
                if anew:
                    known.pop(shard.path.name, None)
                if not waiting[shard.path]:
                    shard.close()
                    if shard.path.name not in digests and shard.path.name not in known:
                        digests[shard.path.name] = hashing.submit(sha256, shard, [(shard.end, written[job.key])])
        written[job.key].set()

    def work(number: int) -> None:
        worker = Worker(sources, shards, tensor_format, variant, devices[number % len(devices)], journal)
        while not stopped.is_set():
            try:
                job = todo.get_nowait()
            except queue.Empty:
                return
            try:
                finish(job, worker.do(job))
            except BaseException:
                stopped.set()
                for event in written.values():
                    event.set()  # whoever hashes behind this waits no more
                raise

    try:
        for shard in files:
            shard.open()
        with ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(max(1, min(8, cores() // 2))) as hashing:
            for shard in _alone(files):
                if shard.path.name in known:
                    continue
                (name,) = shard.tensors
                pieces = sorted((job for job in jobs if name in job.outputs), key=lambda job: job.at)
                ends = [shard.data + job.at for job in pieces[1:]] + [shard.end]
                spans = [(end, written[job.key]) for end, job in zip(ends, pieces, strict=True)]
                digests[shard.path.name] = hashing.submit(sha256, shard, spans)
            running = [pool.submit(work, number) for number in range(workers)]
            wait(running, return_when=FIRST_EXCEPTION)
            for future in running:
                future.result()
            meanwhile()
            return dict(sorted({**known, **{name: future.result() for name, future in digests.items()}}.items()))
    finally:
        sources.close()
        for shard in files:
            shard.abandon()


def _order(jobs: list[Job], shards: dict[str, Shard], files: list[Shard], several: int) -> Iterator[Job]:
    """Tensors that fill a file alone first, a piece now and then, as they take longest to hash; beside them `several`
    files at a time, each with the largest tensors first: the kernel lets one thread write to a file at a time, and no
    thread should end alone.
    """
    of_file: dict[Path, list[Job]] = {shard.path: [] for shard in files}
    for job in sorted(jobs, key=lambda job: job.source.start - job.source.end):
        of_file[shards[job.output].path].append(job)
    alone = [job for shard in _alone(files) for job in sorted(of_file.pop(shard.path), key=lambda job: job.at)]
    queues = list(of_file.values())
    mixed = (
        job
        for i in range(0, len(queues), several)
        for row in zip_longest(*queues[i : i + several])
        for job in row
        if job is not None
    )
    for row in zip_longest(alone, *[mixed] * several):
        yield from (job for job in row if job is not None)


def _alone(files: list[Shard]) -> list[Shard]:
    """Files that one tensor fills."""
    return [shard for shard in files if len(shard.tensors) == 1 and not shard.late]


def _sha256(shard: Shard, spans: list[tuple[int, threading.Event]], stopped: threading.Event) -> str:
    """The digest of a file, of which each of `spans` is an end, and what is set when all before it is written."""
    digest = hashlib.sha256(shard.header())
    at, piece = shard.data, memoryview(bytearray(PIECE))
    with shard.path.open("rb", buffering=0) as file:
        file.seek(at)
        for end, written in spans:
            written.wait()
            while at < end and not stopped.is_set():
                count = file.readinto(piece[: end - at])
                if not count:
                    raise TameError(f"{shard.path}: ends at byte {at}; it was changed while it was written, run again")
                digest.update(piece[:count])
                at += count
    digest.update(shard.tail())
    return digest.hexdigest()
