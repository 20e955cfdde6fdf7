"""Looking after the shared store: what `tame cache --remote` does."""

import hashlib
import time
from collections.abc import Iterator
from typing import Any

from configs.errors import BadInputError, CorruptedError
from configs.settings import lease_seconds
from tasks.store.lease import leases
from tasks.store.remote_store import (
    Remote,
    Shared,
    check,
    connect,
    delete,
    discard,
    each,
    manifest,
    patiently,
    sizes,
    url_of,
)


def remote_store() -> Remote:
    """The store that TAME_STORE names.

    Raises:
        BadInputError: TAME_STORE is not set, or names a store that cannot be used. AwayError: the store does not answer.
    """
    if (remote := connect()) is None:
        raise BadInputError("TAME_STORE is not set, so there is no shared store; expected s3://bucket/prefix or a path")
    check(remote)
    return remote


def artifacts(remote: Remote) -> Iterator[tuple[str, Shared | None, list[str]]]:
    """Everything in the store by its name: its manifest, or why it has none that can be used."""
    for name in sorted({name.split("/")[0] for name in sizes(remote, remote.root) if "/" in name and name[0] != "."}):
        try:
            shared = manifest(remote, name)
        except CorruptedError as error:
            yield name, None, [str(error)]
        else:
            yield (
                name,
                shared,
                [] if shared else [f"{remote.url}/{name} is not complete: being made, or left by a kill"],
            )


def verify(remote: Remote, shared: Shared) -> list[str]:
    """Read every file of a shared artifact and compare digests: what is wrong, a line each, naming the file."""

    def one(name: str) -> str:
        path = f"{remote.root}/{shared.name}/{shared.upload}/{name}"
        try:
            actual = patiently(remote, lambda: _sha256(remote.fs.open(path, "rb")))
        except FileNotFoundError:
            return f"{url_of(remote, path)} is missing"
        if actual != shared.files[name]:
            return f"{url_of(remote, path)} has sha256 {actual[:12]}…, but {shared.files[name][:12]}… was written"
        return ""

    return [wrong for wrong in each(one, shared.files) if wrong]


def prune(remote: Remote, older_than_days: float | None) -> tuple[list[str], list[str]]:
    """Remove what killed machines left, what is damaged, and what was made so many days ago: (removed, kept) names.

    Takes as long as a lease lives where something is not complete: whose lease changes meanwhile is being made, and stays.
    """
    found = list(artifacts(remote))
    before = {name: leases(remote, name) for name, _, _ in found}
    if any(shared is None or before[name] for name, shared, _ in found):
        time.sleep(lease_seconds())
    removed: list[str] = []
    kept: list[str] = []
    for name, shared, _ in found:
        if leases(remote, name) != before[name] or (shared is None and _made_meanwhile(remote, name)):
            gone = False
        elif shared is None:
            gone = True
        else:
            old = older_than_days is not None and time.time() - shared.created >= older_than_days * 86_400
            gone = old or bool(verify(remote, shared))
        if gone:
            discard(remote, name)
            delete(remote, f"{remote.root}/{name}")  # with the leases of the dead
        (removed if gone else kept).append(name)
    return removed, kept


def _made_meanwhile(remote: Remote, name: str) -> bool:
    try:
        return manifest(remote, name) is not None
    except CorruptedError:
        return False


def _sha256(opened: Any) -> str:
    digest = hashlib.sha256()
    with opened as file:
        while block := file.read(2**23):
            digest.update(block)
    return digest.hexdigest()
