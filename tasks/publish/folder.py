"""Publishing into a local folder: the files that the Hub would get, complete or not at all."""

import ctypes
import hashlib
import os
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from filelock import FileLock

from configs.errors import TameError
from configs.settings import home
from tasks.publish import provenance
from tasks.publish.repo import SIGNATURE, Wanted, in_memory
from tasks.runtime.progress import Progress
from tasks.store.cache_only import may_make
from tasks.store.digests import sha256_files

PIECE = 1 << 20


def put(
    files: dict[str, Wanted],
    extra: dict[str, bytes],
    target: Path,
    sign: Callable[[dict[str, Wanted]], bytes] | None,
    progress: Progress,
) -> list[str]:
    """Make `target` hold exactly `files` and `extra`, and a signature if there is a key; the names that were written.

    The new folder is built beside its place, each file's digest compared while it is copied, and put in its place in one
    step. What stood there stays as it was until then, and when anything fails.

    Raises:
        TameError: `target` holds something that tame did not put there; a file is not what was measured.
        OSError: `target` cannot be written. NotCachedError: it would have to be, within `cache_only.nothing_made`.
    """
    target = target.resolve()  # a link stays one, and what it leads to is replaced
    if not target.exists():
        may_make(f"all of {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = home() / "locks" / hashlib.sha256(str(target).encode()).hexdigest()[:24]
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        present = digests(target)
        if present and provenance.NAME not in present:
            raise TameError(f"{target}: holds files that tame did not put there; give another folder, or empty it")
        extra = provenance.settled({name: (target / name).read_bytes() for name in extra if name in present}, extra)
        wanted = files | {name: in_memory(content) for name, content in extra.items()}
        if SIGNATURE in present and all(present.get(name) == file.sha256 for name, file in wanted.items()):
            wanted[SIGNATURE] = in_memory((target / SIGNATURE).read_bytes())
        elif sign:
            wanted[SIGNATURE] = in_memory(sign(wanted))
        partial = target.parent / f".{target.name}.partial"
        if target.exists():  # what a killed run left; without a target, the old one may be all there is
            for rubbish in (partial, target.parent / f".{target.name}.old"):
                shutil.rmtree(rubbish, ignore_errors=True)
        if present == {name: file.sha256 for name, file in wanted.items()}:
            return []
        may_make(f"all of {target}")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _fill(partial, wanted, progress)
            _swap(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return sorted(name for name, file in wanted.items() if present.get(name) != file.sha256)


def digests(target: Path) -> dict[str, str]:
    """The sha256 of every file in `target`; none if it is not there."""
    names = [path.relative_to(target).as_posix() for path in sorted(target.rglob("*")) if not path.is_dir()]
    return sha256_files(target, names)


def _fill(partial: Path, wanted: dict[str, Wanted], progress: Progress) -> None:
    total, done = sum(file.size for file in wanted.values()), 0
    for name, file in wanted.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        source = Path(file.path).open("rb") if file.path else BytesIO(file.content or b"")  # noqa: SIM115
        with source, (partial / name).open("xb") as copy:
            while piece := source.read(PIECE):
                digest.update(piece)
                copy.write(piece)
                done += len(piece)
                progress(f"publish {partial.parent}", min(done, total - 1), total)
            copy.flush()
            os.fsync(copy.fileno())
        if digest.hexdigest() != file.sha256:
            raise TameError(f"{file.path} is not the file that was measured; run `tame cache verify`")
    progress(f"publish {partial.parent}", total, total)


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
