"""Publishing to the Hub: private until every byte has been compared, and never the same thing twice.

Each attempt begins by looking at what is there, and does only what is missing: that is what makes a retry, and a rerun
after a kill, safe. What was compared in full is tagged, so an untagged head is one that nobody has verified yet.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict

from configs.errors import ChangedError, MissingError, TameError
from tasks.download.hub_client import endpoint, explained
from tasks.publish import provenance
from tasks.publish.client import TIMEOUT, ask, connect
from tasks.publish.repo import SIGNATURE, Repo, Wanted, has, in_memory, not_renamed, read_repo
from tasks.publish.transfer import Change, content, upload
from tasks.publish.verify import verify, verify_proposal
from tasks.runtime.progress import Progress
from tasks.store.cache_only import may_make

log = logging.getLogger("tame.publish")

# What somebody may keep beside a model without changing what is loaded.
HARMLESS = (".md", ".txt", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".pdf", ".gitattributes", ".gitignore")


class Release(BaseModel):
    """What is to be published where: `files` that were measured, `extra` files that tell of them."""

    model_config = ConfigDict(frozen=True)

    repo: str
    files: dict[str, Wanted]
    extra: dict[str, bytes]
    private: bool
    review: bool
    tag: str

    @property
    def title(self) -> str:
        """Of its commit or pull request: the same for the same release, whoever runs it and however often."""
        identity = provenance.identity(self.extra)
        content = "".join(f"{file.sha256} {name}\n" for name, file in sorted(self.files.items()))
        return f"tame: {self.tag} ({hashlib.sha256((content + identity).encode()).hexdigest()[:12]})"


class Done(BaseModel):
    """What was done on the Hub. `url` is the commit's, or the pull request's that waits for review."""

    model_config = ConfigDict(frozen=True)

    url: str
    commit: str
    private: bool
    uploaded: list[str]
    already: bool


def put(release: Release, sign: Callable[[dict[str, Wanted]], bytes] | None, progress: Progress) -> Done:
    """One attempt to make the model repo hold exactly what `release` has, verified, tagged, and visible as asked.

    Raises:
        TameError: it holds what tame did not put there, changed meanwhile, or does not hold what was uploaded.
        UnreachableError: the Hub does not answer, or not now; `after` is how long it asks to wait, s.
        BadInputError: the Hub does not let this token do it. NotCachedError: something would have to be done, within
            `tasks.store.cache_only.nothing_made`.
    """
    api = connect()
    remote = read_repo(api, release.repo)
    if remote is None:
        may_make(release.repo)
        remote = _create(api, release.repo)
    not_renamed(release.repo, remote.id)
    if not remote.ours:
        raise TameError(f"{remote.id} holds files that tame did not put there; give another name, or empty it")
    wanted = _wanted(api, remote, release, sign)
    adding = [name for name, file in wanted.items() if not has(api, remote.id, remote.head, remote.files, name, file)]
    removing = _stale(api, remote, wanted)
    if not adding and not removing and remote.verified and remote.private == release.private:
        return Done(
            url=_url(remote.id, remote.head), commit=remote.head, private=remote.private, uploaded=[], already=True
        )
    may_make(f"all of {remote.id}")
    if release.private and not remote.private:
        raise TameError(
            f"{remote.id} is public and publish.private is true; set publish.private: false, or make it private on "
            f"{endpoint()}/{remote.id}/settings"
        )
    commit, unread = remote.head, [] if remote.verified else list(wanted)
    if (adding or removing) and remote.hidden:
        change = Change(_sources(wanted, adding), removing, remote.head, release.title)
        commit = upload(api, remote.id, change, progress).oid
    elif adding or removing:
        number, commit, moved = _propose(api, remote, release, wanted, adding, removing, progress)
        verify_proposal(api, remote.id, number, commit, wanted, sorted({*adding, *unread}), progress)
        if release.review:
            url = f"{endpoint()}/{remote.id}/discussions/{number}"
            return Done(url=url, commit=commit, private=remote.private, uploaded=moved, already=not moved)
        commit, unread = _merge(api, remote, number), []
    fate = "it stays hidden" if remote.private else "look at it now: it is public"
    verify(api, remote.id, commit, wanted, unread, fate, progress)
    _still(api, remote.id, commit)
    if remote.private and not release.private:
        ask(remote.id, lambda: api.update_repo_settings(remote.id, private=False))
    _tag(api, remote, release.tag, commit)
    return Done(url=_url(remote.id, commit), commit=commit, private=release.private, uploaded=adding, already=False)


def _create(api: Any, repo: str) -> Repo:
    with contextlib.suppress(ChangedError, KeyError):  # it is there, whatever the answer: an earlier one was lost
        ask(repo, lambda: api.create_repo(repo, private=True))
    remote = read_repo(api, repo)
    if remote is None:
        raise TameError(f"{repo} is there and this token may not see it; give another name, or another HF_TOKEN")
    return remote


def _wanted(
    api: Any, remote: Repo, release: Release, sign: Callable[[dict[str, Wanted]], bytes] | None
) -> dict[str, Wanted]:
    """What is to be published, with documents that already tell of the same release left as they are."""
    extra = release.extra
    if extra.keys() <= remote.files.keys() and any(not in_memory(c).is_at(remote.files[n]) for n, c in extra.items()):
        extra = provenance.settled({name: _content(api, remote, name) for name in extra}, extra)
    wanted = release.files | {name: in_memory(content) for name, content in extra.items()}
    signed = SIGNATURE in remote.files and all(file.is_at(remote.files.get(name)) for name, file in wanted.items())
    if signed:
        return wanted | {SIGNATURE: in_memory(_content(api, remote, SIGNATURE))}
    return wanted | {SIGNATURE: in_memory(sign(wanted))} if sign else wanted


def _content(api: Any, remote: Repo, name: str) -> bytes:
    return content(api, remote.id, remote.head, name, remote.files[name].size)


def _sources(wanted: dict[str, Wanted], names: list[str]) -> dict[str, str | bytes]:
    return {name: wanted[name].path or wanted[name].content or b"" for name in names}


def _stale(api: Any, remote: Repo, wanted: Iterable[str]) -> list[str]:
    """Files of an earlier release that this one does not have.

    Raises:
        TameError: a file that tame did not put there and that might change what is loaded.
    """
    more = sorted(name for name in remote.files if name not in set(wanted) and not name.endswith(".gitattributes"))
    if not more:
        return []
    try:
        before = json.loads(_content(api, remote, provenance.NAME))
        recorded = {*before["artifact"]["files"], *before["documents"], SIGNATURE}
    except (ValueError, KeyError, TypeError):
        raise TameError(f"{remote.id}: its {provenance.NAME} cannot be read; give another name, or empty it") from None
    for name in sorted(set(more) - recorded):
        if not name.lower().endswith(HARMLESS) and not name.upper().startswith(("LICENSE", "NOTICE")):
            raise TameError(f"{remote.id} has {name}, which tame did not put there; remove it, or give another name")
    return [name for name in more if name in recorded]


def _propose(
    api: Any,
    remote: Repo,
    release: Release,
    wanted: dict[str, Wanted],
    adding: list[str],
    removing: list[str],
    progress: Progress,
) -> tuple[int, str, list[str]]:
    """Open a pull request, or complete the one that an attempt left: its number, its commit, what was uploaded now."""
    try:
        found = ask(remote.id, lambda: list(api.get_repo_discussions(remote.id, discussion_status="open")))
    except (MissingError, KeyError):  # a Hub that does not list them
        found = []
    number = next((d.num for d in found if d.is_pull_request and d.title == release.title), None)
    if number is None:
        change = Change(_sources(wanted, adding), removing, remote.head, release.title)
        made = upload(api, remote.id, change, progress, pull_request=True)
        return int(made.pr_num), made.oid, adding
    ref = f"refs/pr/{number}"
    proposed = read_repo(api, remote.id, ref)
    if proposed is None:
        raise TameError(f"{remote.id}: pull request {number} is gone; run it again")
    files = proposed.files
    missing = [name for name in adding if not has(api, remote.id, proposed.head, files, name, wanted[name])]
    if not missing:
        return number, proposed.head, []
    change = Change(_sources(wanted, missing), [], proposed.head, release.title)
    made = upload(api, remote.id, change, progress, revision=ref)
    return number, made.oid, missing


def _merge(api: Any, remote: Repo, number: int) -> str:
    """Merge a verified pull request into what it was made for; the commit that this makes."""
    _still(api, remote.id, remote.head)
    with explained(remote.id, publishing=True):
        api.merge_pull_request(remote.id, number)
    return str(ask(remote.id, lambda: api.model_info(remote.id, timeout=TIMEOUT)).sha)


def _still(api: Any, repo: str, commit: str) -> None:
    """Check that nobody else changed `repo` meanwhile."""
    info = ask(repo, lambda: api.model_info(repo, timeout=TIMEOUT))
    not_renamed(repo, info.id)
    if (now := info.sha) != commit:
        raise TameError(f"{repo} changed while it was published ({now[:12]}, not {commit[:12]}); run it again")


def _tag(api: Any, remote: Repo, tag: str, commit: str) -> None:
    """Tag `commit`, with a number added where the tag is taken by an earlier one: tags do not move."""
    if commit in remote.releases:
        return
    names = [tag, *(f"{tag}.{number}" for number in range(2, 1000))]
    free = next(name for name in names if name not in remote.tags)
    try:
        ask(remote.id, lambda: api.create_tag(remote.id, tag=free, revision=commit, exist_ok=True))
    except MissingError as error:  # it is published and verified all the same
        log.warning("%s; it has no tag %s", error, free)


def _url(repo: str, commit: str) -> str:
    return f"{endpoint()}/{repo}/commit/{commit}"
