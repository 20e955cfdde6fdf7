"""One builder over all machines: an object in the shared store that says who builds an artifact, and that he lives.

A lease is TAME_STORE/KIND-KEY/lease.N, created exclusively and written again with another number while its holder works.
Whoever sees it unchanged for TTL seconds by his own clock, with storage answering all the while, creates lease.N+1: one of
several succeeds. A holder that was only slow, or cut off, builds for nothing: the manifest, not the lease, decides whose
artifact stands.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from configs.settings import lease_seconds
from tasks.store.remote_store import Remote, create, delete, patiently, read, sizes

log = logging.getLogger("tame.store")

BEATS = 6  # signs of life in that time
PROCESS = uuid.uuid4().hex
_dead: dict[str, float] = {}
"""Other processes that showed no sign of life, and when that was seen: an evaluation holds a lease for each of its parts."""


@contextmanager
def lease(remote: Remote, name: str) -> Iterator[None]:
    """Hold the right to build the artifact `name`; waits while another machine that lives holds it.

    Raises:
        TameError, AwayError: as the store.
    """
    owner = {"owner": f"{socket.gethostname()}:{os.getpid()}", "process": PROCESS, "id": uuid.uuid4().hex}
    place = f"{remote.root}/{name}"
    number = _acquire(remote, place, owner)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(remote, f"{place}/lease.{number}", owner, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        with contextlib.suppress(Exception):  # it ends by itself
            _release(remote, f"{place}/lease.{number}", owner["id"])


def leases(remote: Remote, name: str) -> list[bytes | None]:
    """The leases of the artifact `name` as they are now; those that differ a little later are of machines that live."""
    place = f"{remote.root}/{name}"
    return [read(remote, f"{place}/lease.{number}") for number in _numbers(remote, place)]


def _acquire(remote: Remote, place: str, owner: dict[str, str]) -> int:
    seen, since, looked, told = (0, b""), 0.0, -lease_seconds(), ""
    while True:
        last = max(_numbers(remote, place), default=0)
        content = read(remote, f"{place}/lease.{last}") if last else b""
        now = time.monotonic()
        if content is None:  # let go of meanwhile
            continue
        blind = (
            now - looked > lease_seconds() / 2
        )  # storage was away, for its holder perhaps as well, or this machine slept
        looked = now
        if (last, content) != seen or blind:
            seen, since = (last, content), now
        holder, process = _holder(content)
        known = now - _dead.get(process, -lease_seconds()) < lease_seconds()
        if not last or known or now - since > lease_seconds():
            if last and not known:
                log.warning("%s: no sign of life from %s for %.0f s; building it here", place, holder, now - since)
                if process:
                    _dead[process] = now
            if create(remote, f"{place}/lease.{last + 1}", _content(owner, 0)):
                for number in range(1, last + 1):
                    delete(remote, f"{place}/lease.{number}")
                return last + 1
            continue
        if holder != told:
            log.info("%s is making %s; waiting for it", holder, place.rpartition("/")[2])
            told = holder
        time.sleep(min(2.0, lease_seconds() / BEATS))


def _beat(remote: Remote, path: str, owner: dict[str, str], ended: threading.Event) -> None:
    """Write the lease again and again until `ended`, or until it is another's."""
    beats = 0
    while not ended.wait(lease_seconds() / BEATS):
        beats += 1
        try:
            if owner["id"].encode() not in remote.fs.cat_file(path):
                raise FileNotFoundError(path)
            remote.fs.pipe_file(path, _content(owner, beats))
        except FileNotFoundError:
            log.warning("%s: another machine has taken over; who is done first is taken", path)
            return
        except Exception as error:  # whoever waits sees as little as we do
            log.debug("%s: %s", path, error)


def _release(remote: Remote, path: str, identity: str) -> None:
    if identity.encode() in patiently(remote, lambda: remote.fs.cat_file(path), limit=lease_seconds() / BEATS):
        patiently(remote, lambda: remote.fs.rm_file(path), limit=lease_seconds() / BEATS)


def _numbers(remote: Remote, place: str) -> list[int]:
    found = [name.rpartition("/")[2] for name in sizes(remote, place)]
    return [int(name[6:]) for name in found if name.startswith("lease.") and name[6:].isdecimal()]


def _content(owner: dict[str, str], beats: int) -> bytes:
    return json.dumps({**owner, "beats": beats}).encode()


def _holder(content: bytes) -> tuple[str, str]:
    """Who holds a lease, for people, and its process."""
    try:
        told = json.loads(content)
        return str(told["owner"]), str(told["process"])
    except (ValueError, KeyError, TypeError):
        return "another machine", ""
