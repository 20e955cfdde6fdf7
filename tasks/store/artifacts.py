"""The artifact store: folders named by the content that made them, complete or absent, never built twice.

TAME_HOME/artifacts/KIND-KEY/manifest.json     written last; its presence means complete
TAME_HOME/artifacts/KIND-KEY/files/            what the stage made, and nothing else
TAME_HOME/artifacts/.partial-KIND-KEY/         being built, or left by one that was killed
TAME_HOME/artifacts/.fetched-KIND-KEY/         on its way from TAME_STORE, which several machines share: tasks/store/remote_store.py
TAME_HOME/artifacts/.locks/KIND-KEY            held by the builder; the kernel lets go when it dies
"""

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from configs.errors import AwayError, CorruptedError, KilledError, TameError
from configs.settings import home, shared_store
from tasks.store import cache_only, on_disk, remote_store
from tasks.store.digests import sha256_file
from tasks.store.lease import lease
from tasks.store.remote_store import Remote, Shared

log = logging.getLogger("tame.store")


def find(kind: str, inputs: dict[str, Any]) -> on_disk.Artifact | None:
    """The artifact made from `inputs`, if it is here, complete, and its files have the size and time they had."""
    return on_disk.read(on_disk.folder_of(kind, inputs))


def where(kind: str, inputs: dict[str, Any]) -> str | None:
    """Where the artifact made from `inputs` is: `the cache`, the URL of the shared store, or None: it has to be made.

    Raises:
        TameError: the shared store does not answer.
    """
    folder = on_disk.folder_of(kind, inputs)
    if on_disk.read(folder):
        return "the cache"
    remote = remote_store.connect()
    try:
        return remote.url if remote and remote_store.manifest(remote, folder.name) else None
    except CorruptedError:
        return None


def check() -> None:
    """Check that TAME_STORE can be used, unless that was checked in the last hour.

    Raises:
        BadInputError: the store cannot be used. AwayError: the store does not answer.
    """
    url = shared_store()
    seen = home() / "stores" / hashlib.sha256(url.encode()).hexdigest()[: on_disk.KEY_LENGTH]
    with contextlib.suppress(OSError):
        if 0 <= time.time() - seen.stat().st_mtime < 3600:
            return
    if (remote := remote_store.connect()) is None:
        return
    remote_store.check(remote)
    seen.parent.mkdir(parents=True, exist_ok=True)
    seen.touch()


def build(
    kind: str,
    inputs: dict[str, Any],
    make: Callable[[Path], on_disk.Made],
    keep_partial: bool = False,
    shared: bool = True,
) -> tuple[on_disk.Artifact, bool]:
    """The artifact made from `inputs`, built by `make(folder)` unless it is there, and whether it was there.

    `make` fills a folder that is empty, or, with `keep_partial`, holds what a killed run of the same inputs left. When
    two processes want the same artifact, one builds and the other waits. When `make` raises, nothing stays behind.

    With TAME_STORE, the same holds for all machines: what one has made, the others fetch, and what is returned is what
    stands in the shared store. `shared=False` keeps to this machine what is cheap or means nothing on another.

    Raises:
        TameError: the store cannot be written, or has no space left; the shared one does not answer: what was made is
            kept, and the next run uploads it. Whatever `make` raises.
    """
    with _room(kind, inputs, keep_partial, shared) as room:
        if room.artifact is not None:
            return room.artifact, True
        return room.take(on_disk.Made() if room.ready else make(room.files)), False


class Wanted(NamedTuple):
    """An artifact that `build_many` is asked for."""

    kind: str
    inputs: dict[str, Any]


def build_many(
    wanted: dict[str, Wanted], run: Callable[[dict[str, Path]], None], last: str
) -> tuple[dict[str, on_disk.Artifact], bool]:
    """Several artifacts, those that are missing made by one call of `run`; and whether all of them were there.

    `run` gets the folders to fill, by the names that they have in `wanted`. In each it writes the file `last` when it has
    written everything else: a folder without it is not complete, and becomes no artifact.

    Raises:
        TameError: as `build`. Whatever `run` raises, after what it had completed was kept.
    """
    found: dict[str, on_disk.Artifact] = {}
    rooms: dict[str, _Room] = {}
    failure: Exception | None = None
    with ExitStack() as open_rooms:
        # In one order everywhere, so that two processes do not wait for each other.
        for name, (kind, inputs) in sorted(wanted.items(), key=lambda item: on_disk.folder_of(*item[1])):
            room = open_rooms.enter_context(_room(kind, inputs))
            if room.artifact is not None:
                found[name] = room.artifact
            else:
                rooms[name] = room
        unfinished = {name: rooms[name].files for name in wanted if name in rooms and not rooms[name].ready}
        if unfinished:
            try:
                run(unfinished)
            except Exception as error:
                failure = error
        for name, room in rooms.items():
            if room.ready or (room.files / last).is_file():
                try:
                    found[name] = room.take(on_disk.Made())
                except Exception as error:  # the store is full or away: what else is complete is kept
                    failure = failure or error
        if failure is not None:
            raise failure
    return {name: found[name] for name in wanted if name in found}, not rooms


@dataclass
class _Room:
    """An artifact that is there, or the folder that it is to be made in, which no other process has meanwhile."""

    kind: str
    inputs: dict[str, Any]
    folder: Path
    artifact: on_disk.Artifact | None = None
    """What was there."""
    remote: Remote | None = None
    """The shared store, if what is made belongs there."""
    ready: on_disk.Artifact | None = None
    """What an earlier run has made, but could not upload."""

    @property
    def partial(self) -> Path:
        """Where it is made."""
        return self.folder.parent / f".partial-{self.folder.name}"

    @property
    def files(self) -> Path:
        """The folder to fill."""
        return self.partial / "files"

    def take(self, made: on_disk.Made) -> on_disk.Artifact:
        """Seal what was made, and bring it into its place, and into the shared store."""
        artifact = self.ready or on_disk.seal(self.kind, self.inputs, self.partial, made)
        if self.remote is None:
            return on_disk.take(self.partial, self.folder)
        return _published(self.remote, artifact, self.partial, self.folder)


@contextmanager
def _room(kind: str, inputs: dict[str, Any], keep_partial: bool = False, shared: bool = True) -> Iterator[_Room]:
    """The artifact made from `inputs` if it is there, else room to make it; what is not taken at the end is removed."""
    room = _Room(kind, inputs, on_disk.folder_of(kind, inputs))
    folder, partial = room.folder, room.partial
    room.artifact = on_disk.read(folder)
    if room.artifact is not None:
        os.utime(folder / "manifest.json")  # when it was last used, for prune
        yield room
        return
    cache_only.may_make(f"{kind} {folder.name[-on_disk.KEY_LENGTH :][:8]}")
    with (
        on_disk.locked(
            folder, f"another process is making {kind} {folder.name[-on_disk.KEY_LENGTH :][:8]}; waiting for it"
        ),
        ExitStack() as held,
    ):
        try:
            room.artifact = on_disk.read(folder)
            if room.artifact is None:
                _prepare(room, keep_partial, shared, held)
            yield room
        except OSError as error:
            on_disk.clear(partial)
            raise TameError(on_disk.os_error(error, folder.parent)) from error
        except (KilledError, AwayError, KeyboardInterrupt):  # what is finished is taken up by the next run
            if not keep_partial:
                on_disk.clear(partial)
            raise
        except BaseException:
            on_disk.clear(partial)
            raise
        if room.ready is None and room.artifact is None:
            on_disk.clear(partial)  # nothing was taken


def _prepare(room: _Room, keep_partial: bool, shared: bool, held: ExitStack) -> None:
    """Bring what another machine has made; else have the right to make it, for all machines, and an empty folder."""
    folder = room.folder
    if folder.exists():
        log.warning("%s does not verify; it is made again", folder)
        on_disk.remove_folder(folder)
    room.remote = remote_store.connect() if shared else None
    if room.remote is not None:
        with contextlib.suppress(CorruptedError):
            room.artifact = fetched(room.remote, folder)
        if room.artifact is not None:
            return
        held.enter_context(lease(room.remote, folder.name))
        try:
            room.artifact = fetched(room.remote, folder)
        except CorruptedError as error:
            log.warning("%s; it is made again", error)
            remote_store.discard(room.remote, folder.name)
        if room.artifact is not None:
            return
    room.ready = on_disk.read(room.partial)
    if room.ready is None:
        if not keep_partial:
            on_disk.remove_folder(room.partial)
        room.files.mkdir(parents=True, exist_ok=True)


def artifacts() -> Iterator[on_disk.Artifact]:
    """Every complete artifact, oldest first."""
    found = [a for folder in on_disk.store_folder().glob("[!.]*") if (a := on_disk.read_manifest(folder))]
    yield from sorted(found, key=lambda artifact: (artifact.created, artifact.key))


def verify(artifact: on_disk.Artifact) -> list[str]:
    """Read every file of `artifact` and compare digests: what is wrong, a line each, naming the file."""
    wrong = []
    for name, expected in artifact.files.items():
        path = Path(artifact.path) / name
        if not path.is_file():
            wrong.append(f"{path} is missing")
        elif (actual := sha256_file(path)) != expected:
            wrong.append(
                f"{path} has sha256 {actual[:12]}…, but {expected[:12]}… was written; remove it with cache prune"
            )
    extra = {p.relative_to(artifact.path).as_posix() for p in on_disk.walk(Path(artifact.path))} - set(artifact.files)
    return wrong + [f"{Path(artifact.path) / name} was not made by tame" for name in sorted(extra)]


def remove(artifact: on_disk.Artifact) -> bool:
    """Remove an artifact unless a process is building it, and say whether it was removed."""
    folder = Path(artifact.path).parent
    try:
        with FileLock(on_disk.lock_path(folder), timeout=0):
            on_disk.remove_folder(folder)
            return True
    except Timeout:
        return False


def is_old(artifact: on_disk.Artifact, days: float | None) -> bool:
    """Whether an artifact was not used for so many days; None: however long that is."""
    idle = time.time() - (Path(artifact.path).parent / "manifest.json").stat().st_mtime
    return days is not None and idle >= days * 86_400


def prune(older_than_days: float | None) -> tuple[list[on_disk.Artifact], list[on_disk.Artifact]]:
    """Remove what killed runs left, what is damaged, and what was not used for so many days: (removed, kept)."""
    sweep()
    removed: list[on_disk.Artifact] = []
    kept: list[on_disk.Artifact] = []
    for artifact in list(artifacts()):
        gone = (is_old(artifact, older_than_days) or bool(verify(artifact))) and remove(artifact)
        (removed if gone else kept).append(artifact)
    return removed, kept


def sweep() -> int:
    """Remove what killed runs left: partial folders and removals that nobody holds. How many there were."""
    swept = 0
    for rubbish in [
        path for kind in ("partial", "fetched", "removed") for path in on_disk.store_folder().glob(f".{kind}-*")
    ]:
        try:
            with FileLock(on_disk.lock_path(rubbish.parent / rubbish.name.split("-", 1)[1]), timeout=0):
                on_disk.remove_folder(rubbish)
                swept += 1
        except Timeout:
            continue
    for lock in on_disk.store_folder().glob(".locks/*"):
        if not (on_disk.store_folder() / lock.name).exists():
            try:
                with FileLock(lock, timeout=0):
                    lock.unlink(missing_ok=True)
            except Timeout:
                continue
    return swept


def fetched(remote: Remote, target: Path) -> on_disk.Artifact | None:
    """The artifact at `target`, brought from the shared store, if it has one."""
    manifest = remote_store.manifest(remote, target.name)
    if manifest is None:
        return None
    if on_disk.digest_of(manifest.files) != manifest.digest:
        raise CorruptedError(f"{remote.url}/{target.name}/manifest.json has another digest than the files it names")
    started, folder = time.monotonic(), target.parent / f".fetched-{target.name}"
    files = folder / "files"
    files.mkdir(parents=True, exist_ok=True)
    on_disk.need_space(folder, manifest.bytes, f"fetch {manifest.kind} from {remote.url}")
    remote_store.fetch(remote, manifest, files)
    for path in [path for path in on_disk.walk(files) if path.relative_to(files).as_posix() not in manifest.files]:
        path.unlink()  # of an earlier upload
    stamps = {name: (files / name).stat().st_mtime_ns for name in manifest.files}
    on_disk.write(folder, on_disk.Artifact(**manifest.model_dump(exclude={"upload"}), path=str(files), stamps=stamps))
    seconds = time.monotonic() - started
    level = logging.INFO if manifest.bytes > 1e6 else logging.DEBUG
    log.log(level, "fetched %s %s, %.1f MB in %.1f s", manifest.kind, manifest.key[:8], manifest.bytes / 1e6, seconds)
    return on_disk.take(folder, target)


def _published(remote: Remote, made: on_disk.Artifact, partial: Path, target: Path) -> on_disk.Artifact:
    """Upload what was made, and take into `target` what then stands in the shared store: another machine may have won."""
    ours = Shared.model_validate(made.model_dump(include=set(Shared.model_fields)))
    if remote_store.publish(remote, ours, Path(made.path)).digest == made.digest:
        return on_disk.take(partial, target)
    log.warning("%s %s: another machine was done first; its files are taken", made.kind, made.key[:8])
    on_disk.remove_folder(partial)
    artifact = fetched(remote, target)
    assert artifact is not None
    return artifact
