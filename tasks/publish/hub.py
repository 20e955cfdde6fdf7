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
from tasks.publish.repo import SIGNATURE, Repo, Wanted, has, in_memory, look, not_renamed
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
        told = provenance.identity(self.extra)
        content = "".join(f"{file.sha256} {name}\n" for name, file in sorted(self.files.items()))
        return f"tame: {self.tag} ({hashlib.sha256((content + told).encode()).hexdigest()[:12]})"


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
    there = look(api, release.repo)
    if there is None:
        may_make(release.repo)
        there = _create(api, release.repo)
    not_renamed(release.repo, there.id)
    if not there.ours:
        raise TameError(f"{there.id} holds files that tame did not put there; give another name, or empty it")
    wanted = _wanted(api, there, release, sign)
    adding = [name for name, file in wanted.items() if not has(api, there.id, there.head, there.files, name, file)]
    removing = _stale(api, there, wanted)
    if not adding and not removing and there.verified and there.private == release.private:
        return Done(url=_url(there.id, there.head), commit=there.head, private=there.private, uploaded=[], already=True)
    may_make(f"all of {there.id}")
    if release.private and not there.private:
        raise TameError(
            f"{there.id} is public and publish.private is true; set publish.private: false, or make it private on "
            f"{endpoint()}/{there.id}/settings"
        )
    commit, unread = there.head, [] if there.verified else list(wanted)
    if (adding or removing) and there.hidden:
        change = Change(_sources(wanted, adding), removing, there.head, release.title)
        commit = upload(api, there.id, change, progress).oid
    elif adding or removing:
        number, commit, moved = _propose(api, there, release, wanted, adding, removing, progress)
        verify_proposal(api, there.id, number, commit, wanted, sorted({*adding, *unread}), progress)
        if release.review:
            url = f"{endpoint()}/{there.id}/discussions/{number}"
            return Done(url=url, commit=commit, private=there.private, uploaded=moved, already=not moved)
        commit, unread = _merge(api, there, number), []
    fate = "it stays hidden" if there.private else "look at it now: it is public"
    verify(api, there.id, commit, wanted, unread, fate, progress)
    _still(api, there.id, commit)
    if there.private and not release.private:
        ask(there.id, lambda: api.update_repo_settings(there.id, private=False))
    _tag(api, there, release.tag, commit)
    return Done(url=_url(there.id, commit), commit=commit, private=release.private, uploaded=adding, already=False)


def _create(api: Any, repo: str) -> Repo:
    with contextlib.suppress(ChangedError, KeyError):  # it is there, whatever the answer: an earlier one was lost
        ask(repo, lambda: api.create_repo(repo, private=True))
    there = look(api, repo)
    if there is None:
        raise TameError(f"{repo} is there and this token may not see it; give another name, or another HF_TOKEN")
    return there


def _wanted(
    api: Any, there: Repo, release: Release, sign: Callable[[dict[str, Wanted]], bytes] | None
) -> dict[str, Wanted]:
    """What is to be published, with documents that already tell of the same release left as they are."""
    extra = release.extra
    if extra.keys() <= there.files.keys() and any(not in_memory(c).is_at(there.files[n]) for n, c in extra.items()):
        extra = provenance.settled({name: _content(api, there, name) for name in extra}, extra)
    wanted = release.files | {name: in_memory(content) for name, content in extra.items()}
    signed = SIGNATURE in there.files and all(file.is_at(there.files.get(name)) for name, file in wanted.items())
    if signed:
        return wanted | {SIGNATURE: in_memory(_content(api, there, SIGNATURE))}
    return wanted | {SIGNATURE: in_memory(sign(wanted))} if sign else wanted


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
    for name in sorted(set(more) - known):
        if not name.lower().endswith(HARMLESS) and not name.upper().startswith(("LICENSE", "NOTICE")):
            raise TameError(f"{there.id} has {name}, which tame did not put there; remove it, or give another name")
    return [name for name in more if name in known]


def _propose(
    api: Any,
    there: Repo,
    release: Release,
    wanted: dict[str, Wanted],
    adding: list[str],
    removing: list[str],
    progress: Progress,
) -> tuple[int, str, list[str]]:
    """Open a pull request, or complete the one that an attempt left: its number, its commit, what was uploaded now."""
    try:
        found = ask(there.id, lambda: list(api.get_repo_discussions(there.id, discussion_status="open")))
    except (MissingError, KeyError):  # a Hub that does not list them
        found = []
    number = next((d.num for d in found if d.is_pull_request and d.title == release.title), None)
    if number is None:
        change = Change(_sources(wanted, adding), removing, there.head, release.title)
        made = upload(api, there.id, change, progress, pull_request=True)
        return int(made.pr_num), made.oid, adding
    ref = f"refs/pr/{number}"
    proposed = look(api, there.id, ref)
    if proposed is None:
        raise TameError(f"{there.id}: pull request {number} is gone; run it again")
    files = proposed.files
    left = [name for name in adding if not has(api, there.id, proposed.head, files, name, wanted[name])]
    if not left:
        return number, proposed.head, []
    change = Change(_sources(wanted, left), [], proposed.head, release.title)
    made = upload(api, there.id, change, progress, revision=ref)
    return number, made.oid, left


def _merge(api: Any, there: Repo, number: int) -> str:
    """Merge a verified pull request into what it was made for; the commit that this makes."""
    _still(api, there.id, there.head)
    with explained(there.id, publishing=True):
        api.merge_pull_request(there.id, number)
    return str(ask(there.id, lambda: api.model_info(there.id, timeout=TIMEOUT)).sha)


def _still(api: Any, repo: str, commit: str) -> None:
    """Check that nobody else changed `repo` meanwhile."""
    info = ask(repo, lambda: api.model_info(repo, timeout=TIMEOUT))
    not_renamed(repo, info.id)
    if (now := info.sha) != commit:
        raise TameError(f"{repo} changed while it was published ({now[:12]}, not {commit[:12]}); run it again")


def _tag(api: Any, there: Repo, tag: str, commit: str) -> None:
    """Tag `commit`, with a number added where the tag is taken by an earlier one: tags do not move."""
    if commit in there.releases:
        return
    names = [tag, *(f"{tag}.{number}" for number in range(2, 1000))]
    free = next(name for name in names if name not in there.tags)
    try:
        ask(there.id, lambda: api.create_tag(there.id, tag=free, revision=commit, exist_ok=True))
    except MissingError as error:  # it is published and verified all the same
        log.warning("%s; it has no tag %s", error, free)


def _url(repo: str, commit: str) -> str:
    return f"{endpoint()}/{repo}/commit/{commit}"
