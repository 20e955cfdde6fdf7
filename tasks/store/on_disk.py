"""An artifact's folder on this machine: its key, its manifest, its lock, and how it comes into its place.

tasks/store/artifacts.py says what lies where.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel

from configs.errors import TameError
from configs.settings import home
from tasks.runtime.files import existing_parent
from tasks.store.digests import sha256_files
from tasks.store.remote_store import Manifest

log = logging.getLogger("tame.store")

KEY_LENGTH = 24  # hex digits of sha256: 96 bits


class Artifact(Manifest):
    """A complete artifact on this machine. `path` is its files/ folder."""

    path: str
    stamps: dict[str, int]
    """Modification time of each file, ns: with the size, what a cache hit is checked by."""


class Made(BaseModel):
    """What a stage returns from building: things to remember, and the sha256 of files it hashed while writing them."""

    meta: dict[str, Any] = {}
    digests: dict[str, str] = {}


def key_of(inputs: dict[str, Any]) -> str:
    """The key of everything that decides an artifact's bytes: sha256 over canonical JSON."""
    canonical = json.dumps(inputs, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:KEY_LENGTH]


def digest_of(files: dict[str, str]) -> str:
    """One sha256 for a set of files, from their names and sha256s."""
    return hashlib.sha256("".join(f"{files[name]}  {name}\n" for name in sorted(files)).encode()).hexdigest()


def store_folder() -> Path:
    """Where this machine keeps artifacts: TAME_HOME/artifacts."""
    return home() / "artifacts"


def folder_of(kind: str, inputs: dict[str, Any]) -> Path:
    """The folder of the artifact that is made from `inputs`, whether it is there or not."""
    return store_folder() / f"{kind}-{key_of({'kind': kind, **inputs})}"


def lock_path(folder: Path) -> Path:
    """The lock file of the artifact at `folder`."""
    return folder.parent / ".locks" / folder.name


@contextmanager
def locked(folder: Path, waiting: str) -> Iterator[None]:
    """Hold the lock of the artifact at `folder`; `waiting` is logged if another process has it.

    Raises:
        TameError: the folder of locks cannot be written.
    """
    path = lock_path(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("%s", waiting)
            lock.acquire()
    except OSError as error:
        raise TameError(os_error(error, folder.parent)) from error
    try:
        yield
    finally:
        lock.release()


def read(folder: Path) -> Artifact | None:
    """The artifact at `folder`, if its manifest is there and every file has the size and time that it says."""
    artifact = read_manifest(folder)
    if artifact is None:
        return None
    for name, size in artifact.sizes.items():
        try:
            stat = (Path(artifact.path) / name).stat()
        except OSError:
            return None
        if (stat.st_size, stat.st_mtime_ns) != (size, artifact.stamps[name]):
            return None
    return artifact


def read_manifest(folder: Path) -> Artifact | None:
    """The manifest of the artifact at `folder`; its files are not looked at. None if it is absent or damaged."""
    try:
        content = json.loads((folder / "manifest.json").read_bytes())
        return Artifact.model_validate({**content, "path": str(folder / "files")})
    except (OSError, ValueError):
        return None


def clear(partial: Path) -> None:
    """Remove what was being built, unless it is complete and waits for the shared store."""
    if read(partial) is None:
        remove_folder(partial)


def seal(kind: str, inputs: dict[str, Any], partial: Path, made: Made) -> Artifact:
    """Hash what a stage left in `partial`, and write the manifest, last."""
    files = partial / "files"
    names = sorted(path.relative_to(files).as_posix() for path in walk(files))
    unhashed = [name for name in names if name not in made.digests]
    digests = {**sha256_files(files, unhashed), **{name: made.digests[name] for name in names if name in made.digests}}
    stats = {name: (files / name).stat() for name in names}
    artifact = Artifact(
        kind=kind,
        key=key_of({"kind": kind, **inputs}),
        path=str(files),
        digest=digest_of(digests),
        bytes=sum(stat.st_size for stat in stats.values()),
        files=digests,
        sizes={name: stat.st_size for name, stat in stats.items()},
        stamps={name: stat.st_mtime_ns for name, stat in stats.items()},
        inputs=inputs,
        meta=made.meta,
        created=time.time(),
    )
    write(partial, artifact)
    return artifact


def write(folder: Path, artifact: Artifact) -> None:
    """Flush the files in `folder` to the disk, and then their manifest."""
    files, manifest = folder / "files", folder / "manifest.json"
    for name in artifact.files:
        fsync(files / name)
    manifest.write_text(artifact.model_dump_json(indent=1, exclude={"path"}), encoding="utf-8")
    for path in (manifest, *(p for p in files.rglob("*") if p.is_dir()), files, folder):
        fsync(path)


def take(folder: Path, target: Path) -> Artifact:
    """Rename a complete artifact into its place."""
    folder.rename(target)
    fsync(target.parent)
    artifact = read_manifest(target)
    assert artifact is not None
    return artifact


def walk(folder: Path) -> Iterator[Path]:
    """All files below `folder`, links included."""
    return (path for path in folder.rglob("*") if not path.is_dir())


def fsync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Rename the folder to a name that marks it as removed, then delete it. A kill in between leaves no half artifact."""
    if not folder.exists():
        return
    if not folder.name.startswith("."):
        removed = folder.parent / f".removed-{folder.name}"
        shutil.rmtree(removed, ignore_errors=True)
        folder.rename(removed)
        folder = removed
    shutil.rmtree(folder, ignore_errors=True)


def os_error(error: OSError, folder: Path) -> str:
    """What to say of an error of the disk: where, what, and what to do."""
    where = error.filename or folder
    if error.errno == errno.ENOSPC:
        free = shutil.disk_usage(folder if folder.exists() else home().parent).free
        return f"{where}: no space left ({free / 1e9:.1f} GB free); make room, or set TAME_HOME to a larger disk"
    return f"{where}: {error.strerror or error}; make it writable, or set TAME_HOME to a folder that is"


def need_space(folder: Path, size: int, what: str) -> None:
    """Refuse work that the disk cannot hold. `size` in bytes.

    Raises:
        TameError: fewer bytes are free where `folder` is, or will be.
    """
    folder = existing_parent(folder)
    if (free := shutil.disk_usage(folder).free) < size:
        raise TameError(
            f"{folder}: {free / 1e9:.1f} GB free, but to {what} takes {size / 1e9:.1f} GB; make room or use a larger disk"
        )
