"""Publishing into a local folder: the files that the Hub would get, complete or not at all."""

import ctypes
import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock

from configs.errors import TameError
from tasks import provenance, store
from tasks.progress import Progress

PIECE = 1 << 20


def put(folder: Path, files: dict[str, str], extra: dict[str, bytes], target: Path, progress: Progress) -> list[str]:
    """Make `target` hold exactly `files` of `folder` (sha256 by name) and `extra`; the names that were written.

    The new folder is built beside its place, each file's digest compared while it is copied, and put in its place in one
    step. What stood there stays as it was until then, and when anything fails.

    Raises:
        TameError: `target` holds something that tame did not put there; a file of `folder` is not what was measured.
        OSError: it cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = store.home() / "locks" / hashlib.sha256(str(target).encode()).hexdigest()[:24]
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        extra = provenance.settled(_read(target, extra), extra)
        wanted = files | {name: hashlib.sha256(content).hexdigest() for name, content in extra.items()}
        there = digests(target)
        if there == wanted:
            return []
        if there and provenance.NAME not in there:
            raise TameError(f"{target}: holds files that tame did not put there; give another folder, or empty it")
        partial = target.parent / f".{target.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _fill(partial, folder, files, extra, progress)
            _swap(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return sorted(name for name in wanted if there.get(name) != wanted[name])


def digests(target: Path) -> dict[str, str]:
    """The sha256 of every file in `target`; none if it is not there."""
    names = [path.relative_to(target).as_posix() for path in sorted(target.rglob("*")) if not path.is_dir()]
    return store.sha256_files(target, names)


def _read(target: Path, names: Iterable[str]) -> dict[str, bytes]:
    return {name: (target / name).read_bytes() for name in names if (target / name).is_file()}


def _fill(partial: Path, folder: Path, files: dict[str, str], extra: dict[str, bytes], progress: Progress) -> None:
    total = sum((folder / name).stat().st_size for name in files)
    done = 0
    for name, expected in files.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with (folder / name).open("rb") as source, (partial / name).open("xb") as copy:
            while piece := source.read(PIECE):
                digest.update(piece)
                copy.write(piece)
                done += len(piece)
                progress("publish", min(done, total - 1), total)
            copy.flush()
            os.fsync(copy.fileno())
        if digest.hexdigest() != expected:
            raise TameError(f"{folder / name} is not the file that was measured; run `tame cache verify`")
    for name, content in extra.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(content)
    progress("publish", total, total)


def _swap(partial: Path, target: Path) -> None:
    """Put `partial` in the place of `target`, in one step where the system can."""
    if not target.exists() or not any(target.iterdir()):
        partial.rename(target)
    elif not _exchange(partial, target):
        old = target.parent / f".{target.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """renameat2(2) with RENAME_EXCHANGE: Linux only, and not on every file system."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here = -100  # AT_FDCWD
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), 2) == 0)
