"""Files: written whole or not at all, in folders that can be written; and small ones that may be missing, read."""

import errno
import json
import os
import tempfile
import uuid
from pathlib import Path
from typing import Any

import psutil

from configs.errors import TameError


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that may be missing; empty where there is no such file, or no object in it."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_text(path: Path, text: str) -> Path:
    """Write `text` to `path` as UTF-8, whole or not at all, and return `path`. Missing folders are made.

    It is written beside its place under a name that ends with the process's number, and renamed. What a killed process has
    left under such a name is removed; any other file beside it is somebody else's, and stays.

    Raises:
        OSError: the file cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*"):
        number = leftover.suffix[1:]
        if number.isdecimal() and len(number) < 10 and not psutil.pid_exists(int(number)):
            leftover.unlink(missing_ok=True)
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return path


def write_once(path: Path, content: bytes) -> None:
    """Write a file that is complete or absent, and never over another: a hard link is made whole, or not at all.

    Raises:
        FileExistsError: the file exists already.
        OSError: the file cannot be written.
    """
    path.parent.mkdir(exist_ok=True)
    beside = path.with_name(f".{uuid.uuid4().hex}")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(beside, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        with path.open("xb") as file:  # no hard links: SMB, FUSE; a reader may meet half a manifest, and comes again
            file.write(content)
    finally:
        beside.unlink(missing_ok=True)


def existing_parent(path: Path) -> Path:
    """`path` itself if it is there, else the nearest folder above it that is: where it would be made."""
    at = path.absolute()
    while not at.exists() and at != at.parent:
        at = at.parent
    return at


def check_writable(folder: Path, instead: str = "give another folder") -> None:
    """Check that `folder` can be written or made, by making a file there, or in its nearest parent, and removing it again.

    Args:
        folder: The folder, which need not be there.
        instead: What to do if it cannot, for the message.

    Raises:
        TameError: the folder can neither be written nor made.
    """
    at = existing_parent(folder)
    if not at.is_dir():
        raise TameError(f"{folder}: {at} is a file, so no folder can be made there; {instead}")
    try:
        with tempfile.TemporaryFile(dir=at):
            pass
    except OSError as error:
        raise TameError(
            f"{folder}: {at} cannot be written ({error.strerror}); make it writable, or {instead}"
        ) from None
