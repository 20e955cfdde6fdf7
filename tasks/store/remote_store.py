"""Artifacts shared by machines, at TAME_STORE: a bucket or a mounted folder with the store's rules, complete or absent.

TAME_STORE/KIND-KEY/manifest.json     created last, and never over another: who comes second takes the first one's files
TAME_STORE/KIND-KEY/UPLOAD/           the files of one upload; none is ever written twice
TAME_STORE/KIND-KEY/lease.N           held by the machine that builds: tasks/store/lease.py
"""

import contextlib
import errno
import functools
import logging
import os
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from configs.errors import AwayError, BadInputError, CorruptedError, TameError, bare_address, named_line
from configs.settings import shared_store, store_patience
from tasks.runtime.files import write_once
from tasks.runtime.retry import doubling, retry
from tasks.store.digests import sha256_now

log = logging.getLogger("tame.store")

T = TypeVar("T")

DRIVERS = {"s3": "tame[s3]", "gs": "tame[gcs]", "file": "fsspec"}
OPTIONS: dict[str, dict[str, Any]] = {
    # One file takes 4 × 16 MiB of memory on its way in, 4 × 50 MiB on its way out; `patiently` tries again, nobody else.
    "s3": {"default_block_size": 16 * 2**20, "max_concurrency": 4, "config_kwargs": {"retries": {"max_attempts": 0}}},
}
AT_ONCE = 4  # files on their way
FULL = (errno.ENOSPC, errno.EDQUOT)
FINAL = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ParamValidationError")
"""Errors of the drivers that waiting does not mend."""


ANSWERS = (FileNotFoundError, FileExistsError, NotADirectoryError, TameError)
"""Errors that answer what was asked."""


class Remote(NamedTuple):
    """A shared store: its URL for people, the file system that reads it, and the path in that."""

    url: str
    fs: Any
    root: str
    local: bool


class Manifest(BaseModel):
    """What is known of a complete artifact on any machine. `digest` covers names, sizes and contents of all its files."""

    model_config = ConfigDict(frozen=True)

    kind: str
    key: str
    digest: str
    bytes: int
    files: dict[str, str]
    """sha256 of each file, by its path within the folder."""
    sizes: dict[str, int]
    inputs: dict[str, Any]
    meta: dict[str, Any]
    """What the stage wants to remember: small, JSON."""
    created: float


class Shared(Manifest):
    """A shared artifact, and the upload that it came by."""

    upload: str = ""

    @property
    def name(self) -> str:
        """KIND-KEY."""
        return f"{self.kind}-{self.key}"


def connect() -> Remote | None:
    """The store that TAME_STORE names, or None. Opens nothing yet.

    Raises:
        BadInputError: a URL that tame cannot share artifacts by, or a driver that is not installed.
    """
    url = shared_store()
    return _connect(url) if url else None


@functools.cache
def _connect(url: str) -> Remote:
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "file", url
    if bare_address(url) != url:
        raise BadInputError("TAME_STORE: it holds credentials; give them by the environment (AWS_ACCESS_KEY_ID, …)")
    if scheme not in DRIVERS or not rest.strip("/"):
        raise BadInputError(
            f"TAME_STORE {url}: expected s3://bucket/prefix, gs://bucket/prefix, file:///path or a path"
        )
    import fsspec

    try:
        fs = fsspec.filesystem(scheme, use_listings_cache=False, **OPTIONS.get(scheme, {}))
    except ImportError:
        raise BadInputError(f"TAME_STORE {url}: its driver is missing; pip install '{DRIVERS[scheme]}'") from None
    fs.retries = 1
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints a traceback at every attempt
    root = str(Path(rest).expanduser().absolute()) if scheme == "file" else rest.rstrip("/")
    return Remote(url.rstrip("/"), fs, root, scheme == "file")


def check(remote: Remote) -> None:
    """Check that files in `remote` can be listed, written and deleted, and that no file can be created over another.

    Raises:
        BadInputError: the store does not exist, or refuses one of these. AwayError: the store does not answer.
    """
    if remote.local and not Path(remote.root).is_dir():
        raise BadInputError(f"TAME_STORE {remote.url}: no such folder; mount it, or make it")
    folder = f"{remote.root}/.check-{uuid.uuid4().hex[:12]}"
    try:
        first = create(remote, f"{folder}/probe", b"first")
        second = create(remote, f"{folder}/probe", b"second")
        listed = sizes(remote, folder)
        delete(remote, folder)
    except AwayError:
        raise
    except TameError as error:
        raise BadInputError(str(error)) from None
    if not first or second or not listed:
        raise BadInputError(
            f"TAME_STORE {remote.url}: two machines could both create one object there; use S3, GCS, or another mount"
        )


def patiently(remote: Remote, what: Callable[[], T], limit: float | None = None) -> T:
    """Call `what` again, less and less often, while storage is away. FileNotFoundError and FileExistsError pass.

    Raises:
        AwayError: it was away for `limit` seconds, by default TAME_STORE_PATIENCE. TameError: it refuses. OSError: a disk is full.
    """
    limit = store_patience() if limit is None else limit
    started = time.monotonic()

    def warn(error: Exception, pause: float, spent: float) -> None:
        if pause > 1:
            log.warning("%s does not answer (%s); trying for %.0f s more", remote.url, named_line(error), limit - spent)

    try:
        return retry(what, doubling(0.2, 15), _is_transient, warn, limit)
    except ANSWERS:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        if not _is_transient(error):
            raise TameError(
                f"TAME_STORE {remote.url}: {named_line(error)}; give access to list, read, write and delete there"
            ) from error
        raise AwayError(
            f"TAME_STORE {remote.url}: no answer for {time.monotonic() - started:.0f} s ({named_line(error)}); what is "
            "finished is kept on this machine, run again when it answers"
        ) from error


def create(remote: Remote, path: str, content: bytes) -> bool:
    """Write a small object unless there is one, all of it or nothing, and say whether it is this one that is there.

    Raises:
        TameError: there is no such bucket or folder. As `patiently`.
    """

    def once() -> bool:
        try:
            if remote.local:
                write_once(Path(path), content)
            else:
                remote.fs.pipe_file(path, content, mode="create")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise TameError(
                f"TAME_STORE {remote.url}: {named_line(error)}; make the bucket or mount the folder, or correct its name"
            ) from None
        except Exception as error:
            if not _exists(error):
                raise
            return False
        return True

    return patiently(remote, once) or read(remote, path) == content  # an answer that was lost was a success


def read(remote: Remote, path: str) -> bytes | None:
    """A small object, or None where there is none."""
    try:
        return bytes(patiently(remote, lambda: remote.fs.cat_file(path)))
    except (FileNotFoundError, NotADirectoryError):
        return None


def sizes(remote: Remote, path: str) -> dict[str, int]:
    """Bytes of every object at or below `path`, by its name below the store's root."""
    found = patiently(remote, lambda: remote.fs.find(path, detail=True))
    return {name[len(remote.root) + 1 :]: entry["size"] for name, entry in found.items()}


def delete(remote: Remote, path: str) -> None:
    """Remove an object, or all below a folder, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        patiently(remote, lambda: remote.fs.rm(path, recursive=True))


def manifest(remote: Remote, name: str) -> Shared | None:
    """The manifest of the shared artifact `name`, or None: nobody has made it.

    Raises:
        CorruptedError: the file is not a manifest of tame's.
    """
    content = read(remote, f"{remote.root}/{name}/manifest.json")
    if content is None:
        return None
    try:
        shared = Shared.model_validate_json(content)
    except ValidationError:
        raise CorruptedError(f"{remote.url}/{name}/manifest.json is not a manifest") from None
    parts = [PurePosixPath(file).parts for file in (*shared.files, shared.upload)]
    plain = all(part and part[0] != "/" and ".." not in part for part in parts)
    if shared.name != name or not plain or shared.files.keys() != shared.sizes.keys():
        raise CorruptedError(f"{remote.url}/{name}/manifest.json does not describe that artifact")
    return shared


def fetch(remote: Remote, shared: Shared, folder: Path) -> None:
    """Bring the files of a shared artifact into `folder`, but for those that a killed fetch has left there whole.

    Raises:
        CorruptedError: a file is missing, or has another sha256; the message names it. AwayError.
    """

    def one(name: str) -> None:
        target, path = folder / name, f"{remote.root}/{shared.name}/{shared.upload}/{name}"
        if target.is_file() and sha256_now(target) == shared.files[name]:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            patiently(remote, lambda: remote.fs.get_file(path, str(target)))
        except FileNotFoundError:
            raise CorruptedError(f"{url_of(remote, path)} is missing") from None
        if (actual := sha256_now(target)) != shared.files[name]:
            target.unlink()
            raise CorruptedError(f"{url_of(remote, path)} has sha256 {actual[:12]}…, not {shared.files[name][:12]}…")

    each(one, shared.files)


def publish(remote: Remote, shared: Shared, folder: Path) -> Shared:
    """Upload the files in `folder` and then their manifest: the manifest that stands, which may be another machine's.

    Raises:
        TameError: a file is not what it was when it was made, or the storage is full. AwayError: nothing is published.
    """
    shared = shared.model_copy(update={"upload": uuid.uuid4().hex[:12]})
    target = f"{remote.root}/{shared.name}"
    upload = f"{target}/{shared.upload}"

    def one(name: str) -> None:
        if (actual := sha256_now(folder / name)) != shared.files[name]:
            raise TameError(f"{folder / name} has sha256 {actual[:12]}…, not {shared.files[name][:12]}…; run again")
        put(remote, folder / name, f"{upload}/{name}")

    try:
        each(one, shared.files)
    except OSError as error:
        what = "make room there" if error.errno in FULL else "see that it is there"
        raise TameError(f"TAME_STORE {remote.url}: {named_line(error)}; {what}") from error
    uploaded = sizes(remote, upload)
    if missing := [n for n, size in shared.sizes.items() if uploaded.get(f"{shared.name}/{shared.upload}/{n}") != size]:
        raise AwayError(f"{url_of(remote, upload)}/{missing[0]} did not arrive whole; run again")
    while not create(remote, f"{target}/manifest.json", shared.model_dump_json(indent=1).encode()):
        if (first := manifest(remote, shared.name)) is not None:
            delete(remote, upload)
            return first
    for name in {n.split("/")[1] for n in sizes(remote, target) if n.count("/") > 1} - {shared.upload}:
        delete(remote, f"{target}/{name}")  # what killed builders have left
    return shared


def put(remote: Remote, source: Path, path: str) -> None:
    """Upload one file."""
    if remote.local:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    patiently(remote, lambda: remote.fs.put_file(str(source), path))
    if remote.local:
        with Path(path).open("rb") as file:
            os.fsync(file.fileno())


def discard(remote: Remote, name: str) -> None:
    """Take a shared artifact out of sight in one step, its manifest, and then away; leases stay."""
    target = f"{remote.root}/{name}"
    delete(remote, f"{target}/manifest.json")
    for upload in {n.split("/")[1] for n in sizes(remote, target) if n.count("/") > 1}:
        delete(remote, f"{target}/{upload}")


def url_of(remote: Remote, path: str) -> str:
    """A path in the store, for people."""
    return remote.url + path.removeprefix(remote.root)


def each(one: Callable[[str], T], files: dict[str, str]) -> list[T]:
    """Call `one` for every file, some at a time; the first error ends it, and is raised when those under way have ended."""
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        return list(pool.map(one, files))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _exists(error: BaseException) -> bool:
    """Whether a conditional write was refused because there is an object: some S3 servers say no more than 412."""
    response = getattr(error.__cause__, "response", None) or {}
    return isinstance(error, FileExistsError) or response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 412


def _is_transient(error: Exception) -> bool:
    """Whether an error of a driver may be gone if it is tried again: not one of permission, of credentials, of names."""
    refused = isinstance(error, (*ANSWERS, PermissionError, ValueError)) or type(error).__name__ in FINAL
    if isinstance(error, OSError):
        refused |= error.errno in (*FULL, errno.EINVAL, errno.EROFS, errno.EPERM, errno.ENOTSUP) or "Forbidden" in str(
            error
        )
    return not refused
