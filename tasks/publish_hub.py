"""Publishing to the Hub: private until every byte has been compared, and never the same thing twice.

Each attempt begins by looking at what is there, and does only what is missing: that is what makes a retry, and a rerun
after a kill, safe. What was compared in full is tagged, so an untagged head is one that nobody has verified yet.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from configs.errors import TameError
from tasks import provenance
from tasks.hub import endpoint
from tasks.isolate import isolated
from tasks.progress import Progress
from tasks.publish_loads import loads
from tasks.publish_wire import ask, connect, content, explained, fetch, upload

log = logging.getLogger("tame.publish")

# What somebody may keep beside a model without changing what is loaded.
HARMLESS = (".md", ".txt", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".pdf", ".gitattributes", ".gitignore")
SIGNATURE = "model.sig"
SMALL = 20_000_000  # bytes: what is kept when it is read back, to load the configuration and tokenizer from


class Remote(BaseModel):
    """A file as the Hub lists it. Large files have a `sha256`, others the `oid` of their git blob."""

    model_config = ConfigDict(frozen=True)

    size: int
    oid: str
    sha256: str | None


class Repo(BaseModel):
    """A model repo as it stands."""

    model_config = ConfigDict(frozen=True)

    id: str
    private: bool
    head: str
    files: dict[str, Remote]
    tags: dict[str, str]
    """Commit by tag."""

    @property
    def ours(self) -> bool:
        """Whether tame made it, or nobody put anything into it yet."""
        return provenance.NAME in self.files or not self.files.keys() - {".gitattributes"}

    @property
    def fresh(self) -> bool:
        """Whether no commit of it was ever verified, and no stranger can see it."""
        return self.private and not self.tags


class Wanted(BaseModel):
    """A file that is to be published: from a path, or from memory."""

    model_config = ConfigDict(frozen=True)

    size: int
    sha256: str
    path: str | None = None
    content: bytes | None = None

    def is_at(self, remote: Remote | None) -> bool:
        """Whether `remote` is this file, as far as the Hub's digests tell."""
        if remote is None or remote.size != self.size:
            return False
        return remote.sha256 == self.sha256 if remote.sha256 else remote.oid == self.git_oid

    @property
    def git_oid(self) -> str:
        """SHA-1 over git's blob header and the content."""
        content = Path(self.path).read_bytes() if self.path else self.content or b""
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class Done(BaseModel):
    """What was done on the Hub."""

    model_config = ConfigDict(frozen=True)

    url: str
    commit: str | None
    private: bool
    uploaded: list[str]
    already: bool


def look(api: Any, repo: str, revision: str | None = None) -> Repo | None:
    """What stands at `repo`; None if there is nothing, or nothing that this token may see."""
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        info = ask(repo, lambda: api.model_info(repo, revision=revision))
        tree = ask(repo, lambda: list(api.list_repo_tree(repo, recursive=True, revision=info.sha)))
        refs = ask(repo, lambda: api.list_repo_refs(repo))
    except RepositoryNotFoundError:
        return None
    files = {
        entry.path: Remote(size=entry.size, oid=entry.blob_id, sha256=entry.lfs.sha256 if entry.lfs else None)
        for entry in tree
        if isinstance(entry, RepoFile)
    }
    tags = {tag.name: tag.target_commit for tag in refs.tags}
    return Repo(id=info.id, private=bool(info.private), head=str(info.sha), files=files, tags=tags)


def put(
    files: dict[str, Wanted],
    extra: dict[str, bytes],
    repo: str,
    private: bool,
    review: bool,
    tag: str,
    sign: Callable[[dict[str, Wanted]], bytes] | None,
    progress: Progress,
) -> Done:
    """One attempt to make the model repo `repo` hold exactly `files` and `extra`, verified, tagged and visible as asked.

    Raises:
        TameError: it holds what tame did not put there, changed meanwhile, or does not hold what was uploaded.
        UnreachableError: the Hub does not answer, or not now; `after` is how long it asks to wait, s.
        BadInputError: the Hub does not let this token do it.
    """
    api = connect()
    there = look(api, repo)
    if there is None:
        ask(repo, lambda: api.create_repo(repo, private=True, exist_ok=True))
        there = look(api, repo)
        if there is None:
            raise TameError(
                f"{repo} was made on {endpoint()} but cannot be seen; see that HF_TOKEN may read what it writes"
            )
    if not there.ours:
        raise TameError(f"{repo} holds files that tame did not put there; give another name, or empty it")
    wanted = _wanted(api, there, files, extra, sign)
    adding = [name for name, file in wanted.items() if not file.is_at(there.files.get(name))]
    removing = _stale(api, there, wanted)
    verified = there.head in there.tags.values()
    if not adding and not removing and verified and there.private == private:
        return Done(url=_url(there.id, there.head), commit=there.head, private=private, uploaded=[], already=True)
    commit, unread = there.head, [] if verified else list(wanted)
    if adding or removing:
        if private and not there.private:
            raise TameError(
                f"{repo} is public and publish.private is true; make it private on {endpoint()}/{repo}/settings, or set "
                "publish.private: false"
            )
        if there.fresh:
            commit = upload(api, there.id, _sources(wanted, adding), removing, there.head, tag, progress).oid
        else:
            whole = sorted({*adding, *unread})
            done = _propose(api, there, wanted, adding, removing, whole, review, tag, progress)
            if isinstance(done, Done):
                return done
            commit, unread = done, []
    _verify(api, there.id, commit, wanted, unread, progress)
    _still(api, there.id, commit)
    if there.private and not private:
        ask(repo, lambda: api.update_repo_settings(repo, private=False))
    _tag(api, there, tag, commit)
    return Done(url=_url(there.id, commit), commit=commit, private=private, uploaded=adding, already=False)


def _wanted(
    api: Any,
    there: Repo,
    files: dict[str, Wanted],
    extra: dict[str, bytes],
    sign: Callable[[dict[str, Wanted]], bytes] | None,
) -> dict[str, Wanted]:
    """What is to be published, with documents that already tell of the same release left as they are."""
    if extra.keys() <= there.files.keys() and any(not in_memory(c).is_at(there.files[n]) for n, c in extra.items()):
        extra = provenance.settled({name: _content(api, there, name) for name in extra}, extra)
    wanted = files | {name: in_memory(content) for name, content in extra.items()}
    if sign is None:
        return wanted
    unchanged = all(file.is_at(there.files.get(name)) for name, file in wanted.items()) and SIGNATURE in there.files
    signature = _content(api, there, SIGNATURE) if unchanged else sign(wanted)
    return wanted | {SIGNATURE: in_memory(signature)}


def in_memory(content: bytes) -> Wanted:
    """A file to publish that exists in memory alone."""
    return Wanted(size=len(content), sha256=hashlib.sha256(content).hexdigest(), content=content)


def _content(api: Any, there: Repo, name: str) -> bytes:
    return content(api, there.id, there.head, name, there.files[name].size)


def _sources(wanted: dict[str, Wanted], names: list[str]) -> dict[str, str | bytes]:
    return {name: wanted[name].path or wanted[name].content or b"" for name in names}


def _stale(api: Any, there: Repo, wanted: Iterable[str]) -> list[str]:
    """Files of an earlier release that this one does not have.

    Raises:
        TameError: a file that tame did not put there and that might change what is loaded.
    """
    more = sorted(name for name in there.files if name not in set(wanted) and not name.endswith(".gitattributes"))
    if not more:
        return []
    try:
        before = json.loads(_content(api, there, provenance.NAME))
        known = {*before["artifact"]["files"], *before["documents"], SIGNATURE}
    except (ValueError, KeyError, TypeError):
        raise TameError(f"{there.id}: its {provenance.NAME} cannot be read; give another name, or empty it") from None
    for name in set(more) - known:
        if not name.lower().endswith(HARMLESS) and not name.upper().startswith(("LICENSE", "NOTICE")):
            raise TameError(f"{there.id} has {name}, which tame did not put there; remove it, or give another name")
    return [name for name in more if name in known]


def _propose(
    api: Any,
    there: Repo,
    wanted: dict[str, Wanted],
    adding: list[str],
    removing: list[str],
    whole: list[str],
    review: bool,
    tag: str,
    progress: Progress,
) -> Done | str:
    """Open (or find) a pull request with the changes, verify it, and merge it; the new commit, or what waits for review."""
    content = "".join(f"{wanted[name].sha256} {name}\n" for name in sorted(wanted))
    title = f"tame: {tag} ({hashlib.sha256(content.encode()).hexdigest()[:12]})"
    number = _open(api, there.id, title)
    left = adding
    if number is None:
        made = upload(api, there.id, _sources(wanted, adding), removing, there.head, title, progress, pull_request=True)
        number, commit = int(made.pr_num), made.oid
    else:
        proposed = look(api, there.id, f"refs/pr/{number}")
        if proposed is None:
            raise TameError(f"{there.id}: pull request {number} is gone; run it again")
        commit = proposed.head
        left = [name for name in adding if not wanted[name].is_at(proposed.files.get(name))]
        if left:
            ref = f"refs/pr/{number}"
            commit = upload(api, there.id, _sources(wanted, left), [], proposed.head, title, progress, ref).oid
    try:
        _verify(api, there.id, commit, wanted, whole, progress)
    except TameError:
        ask(there.id, lambda: api.change_discussion_status(there.id, number, "closed"))
        raise
    if review:
        url = f"{endpoint()}/{there.id}/discussions/{number}"
        log.info("%s waits for review", url)
        return Done(url=url, commit=commit, private=there.private, uploaded=left, already=not left)
    _still(api, there.id, there.head)
    with explained(there.id):
        api.merge_pull_request(there.id, number)
    now = look(api, there.id)
    if now is None:
        raise TameError(f"{there.id} is gone; run it again")
    return now.head


def _open(api: Any, repo: str, title: str) -> int | None:
    """The open pull request with this title, left by an attempt that did not end."""
    found = ask(repo, lambda: list(api.get_repo_discussions(repo, discussion_status="open")))
    return next((d.num for d in found if d.is_pull_request and d.title == title), None)


def _verify(api: Any, repo: str, commit: str, wanted: dict[str, Wanted], whole: list[str], progress: Progress) -> None:
    """See that `repo` at `commit` has every wanted file, by the Hub's digests and, for those in `whole`, by its bytes.

    Raises:
        TameError: a file is missing, is not what was measured, or the model cannot be built from its configuration.
    """
    there = look(api, repo, commit)
    files = there.files if there else {}
    where = f"{repo} at {commit[:12]}"
    for name, file in wanted.items():
        found = files.get(name)
        if not file.is_at(found):
            what = f"is {found.size} bytes with digest {(found.sha256 or found.oid)[:12]}…" if found else "is missing"
            expected = f"expected {file.size} bytes with sha256 {file.sha256[:12]}…"
            raise TameError(f"{where}: {name} {what}, {expected}; run it again to upload it anew")
    total, done = sum(wanted[name].size for name in whole), 0
    with tempfile.TemporaryDirectory(prefix="tame-") as folder:
        for name in whole:
            file = wanted[name]
            place = Path(folder) / name
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("w+b") as sink:
                digest = fetch(api, repo, commit, name, file.size, sink if file.size <= SMALL else None)
            if digest not in (file.sha256, ""):
                raise TameError(
                    f"{where}: {name} was downloaded with sha256 {digest[:12]}…, but {file.sha256[:12]}… was uploaded; delete "
                    "the repo's file and run it again"
                )
            done += file.size
            progress(f"verify {repo}", min(done, total - 1), total)
        if "config.json" in whole and (problem := isolated(f"load {repo}", loads, folder)):
            raise TameError(f"{where} cannot be loaded: {problem}")
    progress(f"verify {repo}", total, total)


def _still(api: Any, repo: str, commit: str) -> None:
    """See that nobody else changed `repo` meanwhile."""
    if (now := ask(repo, lambda: api.model_info(repo)).sha) != commit:
        raise TameError(
            f"{repo} changed while it was being published (it is at {now[:12]}, not {commit[:12]}); run it again"
        )


def _tag(api: Any, there: Repo, tag: str, commit: str) -> None:
    """Tag `commit`, with a number added where the tag is taken by an earlier one: tags do not move."""
    if commit in there.tags.values():
        return
    names = [tag, *(f"{tag}.{number}" for number in range(2, 1000))]
    free = next(name for name in names if name not in there.tags)
    ask(there.id, lambda: api.create_tag(there.id, tag=free, revision=commit, exist_ok=True))


def _url(repo: str, commit: str) -> str:
    return f"{endpoint()}/{repo}/commit/{commit}"
