"""Is what the Hub has what was uploaded? By its own digests, by the bytes that come back, and by loading it."""

import contextlib
import tempfile
from pathlib import Path
from typing import Any

from configs.errors import TameError, UnreachableError
from tasks.publish.client import ask
from tasks.publish.load_check import loads
from tasks.publish.repo import Wanted, files_at, has
from tasks.publish.transfer import fetch
from tasks.runtime.child_process import isolated
from tasks.runtime.progress import Progress

SMALL = 20_000_000  # bytes: what is kept when it is read back, to load the configuration and tokenizer from


def verify(
    api: Any, repo: str, commit: str, wanted: dict[str, Wanted], whole: list[str], fate: str, progress: Progress
) -> None:
    """Check that `repo` at `commit` has every wanted file, by the Hub's digests and, for those in `whole`, by its bytes.

    `fate` says in an error what becomes of it.

    Raises:
        TameError: a file is missing, is not what was measured, or the model cannot be built from its configuration.
    """
    remote, where = files_at(api, repo, commit), f"{repo} at {commit[:12]}"
    for name, file in wanted.items():
        if not has(api, repo, commit, remote, name, file):
            found = remote.get(name)
            what = f"has {found.size} bytes and digest {(found.sha256 or found.oid)[:12]}…" if found else "is missing"
            expected = f"{file.size} bytes with sha256 {file.sha256[:12]}… were uploaded"
            raise TameError(f"{where}: {name} {what}, but {expected}; {fate}; run it again to upload it anew")
    total, done = sum(wanted[name].size for name in whole), 0

    def tell(size: int) -> None:
        nonlocal done
        done += size
        progress(f"verify {repo}", min(done, total - 1), total)

    with tempfile.TemporaryDirectory(prefix="tame-") as folder:
        for name in whole:
            file, path = wanted[name], Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w+b") as sink:
                kept = sink if file.size <= SMALL else None
                digest = fetch(api, repo, commit, name, file.size, kept, tell)
            if digest not in (file.sha256, ""):
                raise TameError(
                    f"{where}: {name} comes back with sha256 {digest[:12]}…, but {file.sha256[:12]}… was "
                    f"uploaded; {fate}; remove it from the repo and run it again"
                )
        if "config.json" in whole and (problem := isolated(f"load {repo}", loads, folder)):
            raise TameError(f"{where} cannot be loaded: {problem}; {fate}")
    progress(f"verify {repo}", total, total)


def verify_proposal(
    api: Any, repo: str, number: int, commit: str, wanted: dict[str, Wanted], whole: list[str], progress: Progress
) -> None:
    """`verify` of a pull request, which is closed if it is not what was uploaded."""
    try:
        verify(api, repo, commit, wanted, whole, f"pull request {number} is closed", progress)
    except UnreachableError:
        raise
    except TameError:
        with contextlib.suppress(TameError):  # nobody shall merge it; that it is wrong is what has to be said
            ask(repo, lambda: api.change_discussion_status(repo, number, "closed"))
        raise
