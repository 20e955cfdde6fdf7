"""The sha256 of every output file, computed in threads of its own while other files are written."""

import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Self

from configs.errors import TameError
from tasks.quantize.journal import Journal
from tasks.quantize.shards import Shard
from tasks.runtime.device import cores

PIECE = 1 << 23  # bytes hashed at once: threads that hash should not ask for Python's lock often
MOST_THREADS = 8


class Span(NamedTuple):
    """A part of a file that follows the one before it, and what is set when all of it is written."""

    end: int
    """In bytes from the file's beginning."""
    written: threading.Event


class FileDigests:
    """Hashes files in the background. A file that a killed run hashed is not hashed again, unless a tensor of it was lost."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.known = dict(journal.digests)
        self.running: dict[str, Future[str]] = {}
        self.stopped = threading.Event()
        self.pool = ThreadPoolExecutor(max(1, min(MOST_THREADS, cores() // 2)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.pool.shutdown()

    def start(self, shard: Shard, spans: Sequence[Span]) -> None:
        """Hash a file, waiting for each of `spans` to be written; nothing happens if it is hashed, or being hashed."""
        name = shard.path.name
        if name not in self.known and name not in self.running:
            self.running[name] = self.pool.submit(self._hash, shard, spans)

    def forget(self, name: str) -> None:
        """A tensor of this file was written anew, so what a killed run noted for it counts no more."""
        self.known.pop(name, None)

    def stop(self) -> None:
        """Let every thread end early. Whoever waits for a span has to be woken by setting its event."""
        self.stopped.set()

    def results(self) -> dict[str, str]:
        """Wait for all. Returns the sha256 of each file, by its name."""
        return dict(sorted({**self.known, **{name: future.result() for name, future in self.running.items()}}.items()))

    def _hash(self, shard: Shard, spans: Sequence[Span]) -> str:
        digest = _sha256(shard, spans, self.stopped)
        if not self.stopped.is_set():
            self.journal.add_file(shard.path.name, digest)
        return digest


def _sha256(shard: Shard, spans: Sequence[Span], stopped: threading.Event) -> str:
    """The digest of a file whose header and last bytes may not be on the disk yet."""
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
        os.fsync(file.fileno())  # it is wanted on the disk at the end, where nothing else would be done meanwhile
    digest.update(shard.tail())
    return digest.hexdigest()
