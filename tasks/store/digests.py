"""sha256 of files, remembered by what the kernel says of a file, so that large ones are read once."""

import contextlib
import hashlib
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from configs.settings import home


def sha256_file(path: Path) -> str:
    """The sha256 of a file, read again only when its inode, size, modification or status-change time differ.

    The status-change time (ctime) is set by the kernel and cannot be put back, so a file replaced by another of the same
    size and modification time is read again. A file changed less than two seconds before it was read is not remembered:
    a second change within the clock's granularity would not show.
    """
    path = path.resolve(strict=True)
    before = path.stat()
    identity = (before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns)
    row = None
    # The table only saves reading: without it, or with a damaged one, everything is read.
    with contextlib.suppress(sqlite3.Error), _known_digests() as cache:
        row = cache.execute(
            "SELECT sha256 FROM digests WHERE path = ? AND identity = ?", (str(path), repr(identity))
        ).fetchone()
    if row:
        return str(row[0])
    digest = sha256_now(path)
    after = path.stat()
    settled = time.time_ns() - max(after.st_ctime_ns, after.st_mtime_ns) > 2_000_000_000
    if settled and identity == (after.st_dev, after.st_ino, after.st_size, after.st_mtime_ns, after.st_ctime_ns):
        with contextlib.suppress(sqlite3.Error), _known_digests() as cache:
            cache.execute("INSERT OR REPLACE INTO digests VALUES (?, ?, ?)", (str(path), repr(identity), digest))
    return digest


def sha256_now(path: Path) -> str:
    """The sha256 of a file, read now, whatever is known of it.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(folder: Path, names: list[str]) -> dict[str, str]:
    """The sha256 of each named file in `folder`, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(lambda name: sha256_file(folder / name), names), strict=True))


class _known_digests:  # noqa: N801
    """The table of digests by file identity, committed and closed on leaving."""

    def __enter__(self) -> sqlite3.Connection:
        home().mkdir(parents=True, exist_ok=True)
        self.connection = sqlite3.connect(home() / "digests.db", timeout=60)
        self.connection.execute(
            "CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, identity TEXT, sha256 TEXT)"
        )
        return self.connection

    def __exit__(self, *_: object) -> None:
        self.connection.commit()
        self.connection.close()
