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
from tasks.publish.repo import SIGNATURE, Repo, look
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
    there = look(api, repo)
    if there is None:
        raise BadInputError(f"{repo} is not on {endpoint()}, or HF_TOKEN may not read it")
    place = home() / "checks"
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        _download(api, there, Path(folder), progress)
        return problems_in_folder(Path(folder), source)


def _download(api: Any, there: Repo, folder: Path, progress: Progress) -> None:
    total, done = sum(file.size for file in there.files.values()), 0

    def tell(size: int) -> None:
        nonlocal done
        done += size
        progress(f"check {there.id}", min(done, total - 1), total)

    for name, file in there.files.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("w+b") as sink:
            fetch(api, there.id, there.head, name, file.size, sink, tell)
    progress(f"check {there.id}", total, total)


def problems_in_folder(folder: Path, source: str | None = None, names: Iterable[str] | None = None) -> list[str]:
    """`problems` of a folder; of all files in it, or of `names` alone."""
    try:
        told = json.loads((folder / provenance.NAME).read_bytes())
        expected = {**told["artifact"]["files"], **told["documents"]}
        digest = told["artifact"]["digest"]
    except FileNotFoundError:
        raise BadInputError(f"there is no {provenance.NAME}: tame did not publish this") from None
    except (ValueError, KeyError, TypeError) as error:
        return [f"{provenance.NAME} cannot be read ({type(error).__name__}): it was changed"]
    wrong = []
    if on_disk.digest_of(told["artifact"]["files"]) != digest:
        wrong.append(f"{provenance.NAME}: the digests of the files do not make the digest of the whole: it was changed")
    there = (
        {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} if names is None else set(names)
    )
    for name in sorted(expected):
        if name not in there:
            wrong.append(f"{name} is missing")
        elif (found := _sha256(folder / name)) != expected[name]:
            wrong.append(f"{name} was changed: sha256 {found[:12]}…, published was {expected[name][:12]}…")
    more = there - set(expected) - {provenance.NAME, SIGNATURE, ".gitattributes"}
    wrong += [f"{name} was not published by tame" for name in sorted(more)]
    wrong += _card(folder, told)
    if signature := signing.problem(folder):
        wrong.append(signature)
    return wrong + (_source(told, source) if source else [])


def _card(folder: Path, told: dict[str, Any]) -> list[str]:
    """Lines of the card's table that are not what tame.json's numbers make."""
    if "metrics" not in told or not (folder / "README.md").exists():
        return []
    lines = set((folder / "README.md").read_text(errors="replace").splitlines())
    return [
        f"README.md: its table does not say {row!r}, as {provenance.NAME} does"
        for row in card.cost_rows(told.get("baseline") or {}, told["metrics"])
        if row not in lines
    ]


def _source(told: dict[str, Any], source: str) -> list[str]:
    """Files of the source that are not what the model was made from."""
    expected = (told.get("source") or {}).get("files")
    if not expected:
        return [f"{provenance.NAME} names no source to compare {source} with"]
    path = Path(source).expanduser()
    if path.exists():
        folder = path if path.is_dir() else path.parent
        found = {name: _sha256(folder / name) for name in expected if (folder / name).is_file()}
    else:
        found = _source_on_hub(source, told["source"].get("commit"), expected)
    return [
        f"source {source}: {name} is {'missing' if name not in found else 'not the file that was quantized'}"
        for name, digest in sorted(expected.items())
        if found.get(name) != digest
    ]


def _source_on_hub(source: str, commit: str | None, names: dict[str, str]) -> dict[str, str]:
    api = connect(required=False)
    there = look(api, source, commit)
    if there is None:
        raise BadInputError(f"{source} is not on {endpoint()}, or HF_TOKEN may not read it")
    files = {name: file for name, file in there.files.items() if name in names}
    return {
        name: file.sha256 or hashlib.sha256(content(api, there.id, there.head, name, file.size)).hexdigest()
        for name, file in files.items()
    }


def _sha256(path: Path) -> str:
    try:
        return sha256_now(path)
    except OSError as error:
        raise TameError(f"{path}: {error.strerror}") from None
