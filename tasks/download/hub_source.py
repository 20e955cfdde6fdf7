"""A repo of the Hub as a source: seen before it is downloaded, downloaded once, compared with the digests that the Hub names."""

import logging
import shutil
from pathlib import Path

from configs.errors import CorruptedError, TameError, UnreachableError
from configs.schema import Source
from tasks.download import hub
from tasks.download.checkpoint import INDEX, WEIGHTS, refuse_quantized, refuse_wrapped, top_tensors
from tasks.download.folder import SMALL, check_weights, read_json, select
from tasks.runtime.progress import Progress
from tasks.store import artifacts as store
from tasks.store import cache_only, on_disk, remote_store
from tasks.store.digests import sha256_files
from tasks.values import Found

log = logging.getLogger("tame.download")


def inspect_hub(source: Source, quantized: bool) -> Found:
    """What a repo holds, from its small files and the names of its tensors; from the cache where the Hub does not answer.

    Raises:
        BadInputError, TameError: as `tasks.download.inspection.inspect_source`.
    """
    cached = hub.cached_commit(source.model, source.revision)
    try:
        info = hub.model_info(source.model, source.revision)
    except UnreachableError as error:
        if cached is None:
            raise UnreachableError(
                f"{source.model}: {error}, and no complete copy of it is cached; try again when it can be reached"
            ) from None
        log.info("%s: %s; using the cached commit %s", source.model, error, cached.commit[:12])
        return _inspect_cached(source, cached)
    small = hub.fetch_json(source.model, info.commit, [name for name in SMALL if name in info.files])
    taken = select(source, list(info.files), small)
    if not quantized:
        refuse_quantized(small["config.json"], source.model)
    complete = cached is not None and cached.commit == info.commit and set(taken) <= set(cached.names)
    path = str(cached.folder) if cached is not None and complete else None
    if path:
        names = _tensors(Path(path))
    elif WEIGHTS in taken:
        names = hub.tensor_names(source.model, info.commit, WEIGHTS)
    else:
        names = list(small[INDEX]["weight_map"])
    refuse_wrapped(names or [], source.model)
    return Found(
        kind="hub",
        name=source.model.rsplit("/", 1)[-1],
        path=path,
        commit=info.commit,
        files={name: info.files[name] for name in taken},
        config=small["config.json"],
        top_tensors=None if names is None else top_tensors(names),
        licence=info.licence,
        card=info.card,
        gated=info.gated,
        sha256={name: digest for name, digest in info.sha256.items() if name in taken},
    )


def fetch(source: Source, found: Found, progress: Progress) -> tuple[Path, bool]:
    """The folder that the files of `found` are in, downloaded if they are not here, and whether they were.

    With TAME_STORE, one machine downloads and the others fetch from it.

    Raises:
        TameError: a file is not what the Hub says, no space, or the Hub does not answer.
    """
    if found.path is not None:
        return Path(found.path), True
    cache_only.may_make(source.model)
    on_disk.need_space(hub.cache_folder(), found.bytes, f"download {source.model}")
    commit, names = str(found.commit), sorted(found.files)

    def from_hub() -> Path:
        return hub.fetch(source.model, source.revision, commit, names, found.bytes, progress)

    if remote_store.connect() is None:
        return from_hub(), False

    def make(folder: Path) -> on_disk.Made:  # one machine downloads, the others fetch it from the shared store
        downloaded = from_hub()
        files = sha256_files(downloaded, names)
        compare(source.model, downloaded, files, found.sha256)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                (folder / name).hardlink_to((downloaded / name).resolve())
            except OSError:  # another disk
                shutil.copyfile(downloaded / name, folder / name)
        return on_disk.Made(digests=files)

    inputs = {"model": source.model, "commit": commit, "files": names}
    artifact, cached = store.build("source", inputs, make)
    return Path(artifact.path), cached


def compare(model: str, folder: Path, actual: dict[str, str], expected: dict[str, str]) -> None:
    """Compare digests with those that the Hub names; what differs is removed, so that it is downloaded again.

    Raises:
        CorruptedError: the digest of a file differs.
    """
    for name, digest in expected.items():
        if actual[name] != digest:
            (folder / name).resolve().unlink()
            (folder / name).unlink(missing_ok=True)
            raise CorruptedError(
                f"{model}: {name} arrived with sha256 {actual[name][:12]}…, but the Hub names {digest[:12]}…; removed it, run again"
            )


def _inspect_cached(source: Source, cached: hub.CachedRepo) -> Found:
    small = {name: read_json(cached.folder / name) for name in SMALL if name in cached.names}
    taken = select(source, cached.names, small)
    remembered = hub.remembered(source.model, cached.commit)
    names = _tensors(cached.folder)
    return Found(
        kind="hub",
        name=source.model.rsplit("/", 1)[-1],
        path=str(cached.folder),
        commit=cached.commit,
        files={name: (cached.folder / name).stat().st_size for name in taken},
        config=small["config.json"],
        top_tensors=None if names is None else top_tensors(names),
        **(remembered.model_dump(include={"licence", "card", "gated"}) if remembered else {}),
    )


def _tensors(folder: Path) -> list[str] | None:
    """The names of the tensors in a folder of the cache; None where it is damaged, which is told when its digests are compared."""
    try:
        return check_weights(folder, quantized=True)
    except TameError:
        return None
