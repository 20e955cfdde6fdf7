"""Is a published model still what was published? Compared with its own tame.json, its signature, and its source."""

import hashlib
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from configs.errors import BadInputError, TameError
from configs.settings import home
from tasks.download.hub_client import endpoint
from tasks.publish import card, provenance, signing
from tasks.publish.client import connect
from tasks.publish.repo import SIGNATURE, Repo, read_repo
from tasks.publish.transfer import content, fetch
from tasks.runtime.progress import Progress
from tasks.store import on_disk
from tasks.store.digests import sha256_now


def problems(repo: str, source: str | None, progress: Progress) -> list[str]:
    """What is wrong with a Hub repo or folder, a line each: files, card, signature, and `source` if one is given.

    All of it is downloaded, into a folder that is removed again: what the Hub says of a file is not taken for the file.

    Raises:
        BadInputError: there is no such repo or folder, or tame did not publish it.
    """
    if Path(repo).expanduser().is_dir():
        return problems_in_folder(Path(repo).expanduser(), source)
    api = connect(required=False)
    remote = read_repo(api, repo)
    if remote is None:
        raise BadInputError(f"{repo} is not on {endpoint()}, or HF_TOKEN may not read it")
    checks = home() / "checks"
    checks.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=checks) as folder:
        _download(api, remote, Path(folder), progress)
        return problems_in_folder(Path(folder), source)


def _download(api: Any, remote: Repo, folder: Path, progress: Progress) -> None:
    total, done = sum(file.size for file in remote.files.values()), 0

    def tell(size: int) -> None:
        nonlocal done
        done += size
        progress(f"check {remote.id}", min(done, total - 1), total)

    for name, file in remote.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w+b") as sink:
            fetch(api, remote.id, remote.head, name, file.size, sink, tell)
    progress(f"check {remote.id}", total, total)


def problems_in_folder(folder: Path, source: str | None = None, names: Iterable[str] | None = None) -> list[str]:
    """`problems` of a folder; of all files in it, or of `names` alone."""
    try:
        record = json.loads((folder / provenance.NAME).read_bytes())
        expected = {**record["artifact"]["files"], **record["documents"]}
        digest = record["artifact"]["digest"]
    except FileNotFoundError:
        raise BadInputError(f"there is no {provenance.NAME}: tame did not publish this") from None
    except (ValueError, KeyError, TypeError) as error:
        return [f"{provenance.NAME} cannot be read ({type(error).__name__}): it was changed"]
    wrong = []
    if on_disk.digest_of(record["artifact"]["files"]) != digest:
        wrong.append(f"{provenance.NAME}: the digests of the files do not make the digest of the whole: it was changed")
    present = (
        {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} if names is None else set(names)
    )
    for name in sorted(expected):
        if name not in present:
            wrong.append(f"{name} is missing")
        elif (found := _sha256(folder / name)) != expected[name]:
            wrong.append(f"{name} was changed: sha256 {found[:12]}…, published was {expected[name][:12]}…")
    more = present - set(expected) - {provenance.NAME, SIGNATURE, ".gitattributes"}
    wrong += [f"{name} was not published by tame" for name in sorted(more)]
    wrong += _card(folder, record)
    if signature := signing.problem(folder):
        wrong.append(signature)
    return wrong + (_source(record, source) if source else [])


def _card(folder: Path, record: dict[str, Any]) -> list[str]:
    """Lines of the card's table that are not what tame.json's numbers make."""
    if "metrics" not in record or not (folder / "README.md").exists():
        return []
    lines = set((folder / "README.md").read_text(errors="replace").splitlines())
    return [
        f"README.md: its table does not say {row!r}, as {provenance.NAME} does"
        for row in card.cost_rows(record.get("baseline") or {}, record["metrics"])
        if row not in lines
    ]


def _source(record: dict[str, Any], source: str) -> list[str]:
    """Files of the source that are not what the model was made from."""
    expected = (record.get("source") or {}).get("files")
    if not expected:
        return [f"{provenance.NAME} names no source to compare {source} with"]
    path = Path(source).expanduser()
    if path.exists():
        folder = path if path.is_dir() else path.parent
        found = {name: _sha256(folder / name) for name in expected if (folder / name).is_file()}
    else:
        found = _source_on_hub(source, record["source"].get("commit"), expected)
    return [
        f"source {source}: {name} is {'missing' if name not in found else 'not the file that was quantized'}"
        for name, digest in sorted(expected.items())
        if found.get(name) != digest
    ]


def _source_on_hub(source: str, commit: str | None, names: dict[str, str]) -> dict[str, str]:
    api = connect(required=False)
    remote = read_repo(api, source, commit)
    if remote is None:
        raise BadInputError(f"{source} is not on {endpoint()}, or HF_TOKEN may not read it")
    files = {name: file for name, file in remote.files.items() if name in names}
    return {
        name: file.sha256 or hashlib.sha256(content(api, remote.id, remote.head, name, file.size)).hexdigest()
        for name, file in files.items()
    }


def _sha256(path: Path) -> str:
    try:
        return sha256_now(path)
    except OSError as error:
        raise TameError(f"{path}: {error.strerror}") from None
