"""A lease in the shared store, so that one machine at a time builds an artifact.

A lease is the object TAME_STORE/KIND-KEY/lease.N. It is created exclusively, and its holder writes it again with another number,
a heartbeat, while it works. A lease is stale if a machine has seen it unchanged for TAME_LEASE_SECONDS by its own clock, with
storage answering all the while. That machine then tries to create lease.N+1; if several try, one succeeds. A holder that was only
slow, or cut off from storage, may go on building, but to no effect: the manifest decides whose artifact stands, not the lease.
"""

import contextlib
import json
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from configs.settings import lease_seconds
from tasks.runtime.retry import wait_until
from tasks.store.remote_store import Remote, create, delete, patiently, read, sizes

log = logging.getLogger("tame.store")

HEARTBEATS = 6
"""How often a holder writes its lease in the time after which it is stale."""
LONGEST_PAUSE = 2.0
"""Seconds between two looks at another machine's lease, at most."""
PROCESS = uuid.uuid4().hex
_stale_processes: dict[str, float] = {}
"""Other processes whose lease was stale, and when. An evaluation holds one lease for each of its parts, so that the second lease of
such a process need not be waited for."""


@contextmanager
def lease(remote: Remote, name: str) -> Iterator[None]:
    """Hold the right to build the artifact `name`. Waits while another machine holds it and shows heartbeats.

    Raises:
        TameError, AwayError: as the store.
    """
    owner = {"owner": f"{socket.gethostname()}:{os.getpid()}", "process": PROCESS, "id": uuid.uuid4().hex}
    folder = f"{remote.root}/{name}"
    acquiring = _Acquiring(remote, folder, owner)
    wait_until(acquiring.succeeds, math.inf, min(LONGEST_PAUSE, lease_seconds() / HEARTBEATS), AssertionError)
    path = f"{folder}/lease.{acquiring.number}"
    ended = threading.Event()
    heartbeat = threading.Thread(target=_keep_alive, args=(remote, path, owner, ended), daemon=True)
    heartbeat.start()
    try:
        yield
    finally:
        ended.set()
        heartbeat.join()
        with contextlib.suppress(Exception):  # without its heartbeat it becomes stale by itself
            _release(remote, path, owner["id"])


def leases(remote: Remote, name: str) -> list[bytes | None]:
    """The leases of the artifact `name` as they are now. One that differs a little later has a holder that works."""
    folder = f"{remote.root}/{name}"
    return [read(remote, f"{folder}/lease.{number}") for number in _numbers(remote, folder)]


class _Acquiring:
    """The attempt to get a lease: what was seen of another machine's, and the `number` of our own once we have it."""

    def __init__(self, remote: Remote, folder: str, owner: dict[str, str]) -> None:
        self.remote, self.folder, self.owner = remote, folder, owner
        self.number = 0
        self.seen: tuple[int, bytes] = (0, b"")
        self.seen_since = 0.0
        self.looked_at = -lease_seconds()
        self.announced = ""

    def succeeds(self) -> bool:
        """Look once: take the lease if nobody holds it or if it is stale."""
        last = max(_numbers(self.remote, self.folder), default=0)
        content = read(self.remote, f"{self.folder}/lease.{last}") if last else b""
        if content is None:  # it was released between the two requests
            return False
        unchanged = self._unchanged_for(last, content)
        holder, process = _holder(content)
        known_stale = time.monotonic() - _stale_processes.get(process, -lease_seconds()) < lease_seconds()
        if last and not known_stale and unchanged <= lease_seconds():
            if holder != self.announced:
                log.info("%s is making %s; waiting for it", holder, self.folder.rpartition("/")[2])
                self.announced = holder
            return False
        if last and not known_stale:
            log.warning("%s: no sign of life from %s for %.0f s; building it here", self.folder, holder, unchanged)
            if process:
                _stale_processes[process] = time.monotonic()
        if not create(self.remote, f"{self.folder}/lease.{last + 1}", _content(self.owner, 0)):
            return False
        for number in range(1, last + 1):
            delete(self.remote, f"{self.folder}/lease.{number}")
        self.number = last + 1
        return True

    def _unchanged_for(self, last: int, content: bytes) -> float:
        """Seconds for which this lease has been seen without a change, with no long gap between two looks."""
        now = time.monotonic()
        # After a gap, storage may have been away for the holder as well, or this machine slept.
        after_gap = now - self.looked_at > lease_seconds() / 2
        self.looked_at = now
        if (last, content) != self.seen or after_gap:
            self.seen, self.seen_since = (last, content), now
        return now - self.seen_since


def _keep_alive(remote: Remote, path: str, owner: dict[str, str], ended: threading.Event) -> None:
    """Write the lease again and again until `ended` is set, or until the lease is another machine's."""
    beats = 0
    while not ended.wait(lease_seconds() / HEARTBEATS):
        beats += 1
        try:
            if owner["id"].encode() not in remote.fs.cat_file(path):
                raise FileNotFoundError(path)
            remote.fs.pipe_file(path, _content(owner, beats))
        except FileNotFoundError:
            log.warning("%s: another machine has taken over; who is done first is taken", path)
            return
        except Exception as error:  # a machine that waits for the lease cannot reach storage either
            log.debug("%s: %s", path, error)


def _release(remote: Remote, path: str, identity: str) -> None:
    patience = lease_seconds() / HEARTBEATS
    if identity.encode() in patiently(remote, lambda: remote.fs.cat_file(path), limit=patience):
        patiently(remote, lambda: remote.fs.rm_file(path), limit=patience)


def _numbers(remote: Remote, folder: str) -> list[int]:
    names = [name.rpartition("/")[2] for name in sizes(remote, folder)]
    return [int(name[6:]) for name in names if name.startswith("lease.") and name[6:].isdecimal()]


def _content(owner: dict[str, str], beats: int) -> bytes:
    return json.dumps({**owner, "beats": beats}).encode()


def _holder(content: bytes) -> tuple[str, str]:
    """The machine that holds a lease, as people read it, and its process."""
    try:
        written = json.loads(content)
        return str(written["owner"]), str(written["process"])
    except (ValueError, KeyError, TypeError):
        return "another machine", ""
