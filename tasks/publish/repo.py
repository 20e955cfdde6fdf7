"""A model repo on the Hub as it stands, and a file that is to be in it."""

import hashlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from configs.errors import BadInputError, MissingError
from tasks.publish import provenance
from tasks.publish.client import TIMEOUT, ask
from tasks.publish.transfer import fetch

SIGNATURE = "model.sig"
TAG = "tame-"
"""What the tags begin with that mark a commit as verified."""


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
    def releases(self) -> set[str]:
        """Commits that tame verified and tagged."""
        return {commit for name, commit in self.tags.items() if name.startswith(TAG)}

    @property
    def verified(self) -> bool:
        """Whether what it shows now is such a commit."""
        return self.head in self.releases

    @property
    def hidden(self) -> bool:
        """Whether no stranger can see it and nothing was released in it: what is committed now harms nobody."""
        return self.private and not self.releases


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


def read_repo(api: Any, repo: str, revision: str | None = None) -> Repo | None:
    """What stands at `repo`; None if there is nothing, or nothing that this token may see."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = ask(repo, lambda: api.model_info(repo, revision=revision, timeout=TIMEOUT))
        files = files_at(api, repo, info.sha)
        tags = _tags(api, repo)
    except (RepositoryNotFoundError, MissingError):
        return None
    return Repo(id=info.id, private=bool(info.private), head=info.sha, files=files, tags=tags)


def not_renamed(repo: str, found: str) -> None:
    """Check that the Hub, asked for `repo`, has not answered with another repo, as it does when one was renamed.

    Raises:
        BadInputError: it has; what is published there would replace what stands there now.
    """
    if repo.lower() != found.lower():
        raise BadInputError(
            f"{repo} was renamed to {found}, and what is published would replace what is there; give {found}, or a new name"
        )


def _tags(api: Any, repo: str) -> dict[str, str]:
    """Commit by tag. A Hub that does not list them costs a verification more each time, and nothing else."""
    try:
        return {tag.name: tag.target_commit for tag in ask(repo, lambda: api.list_repo_refs(repo)).tags}
    except (MissingError, KeyError):
        return {}


def files_at(api: Any, repo: str, commit: str) -> dict[str, Remote]:
    """The files of `repo` at `commit`, as the Hub lists them."""
    from huggingface_hub.hf_api import RepoFile

    tree = ask(repo, lambda: list(api.list_repo_tree(repo, recursive=True, revision=commit)))
    return {
        entry.path: Remote(size=entry.size, oid=entry.blob_id, sha256=entry.lfs.sha256 if entry.lfs else None)
        for entry in tree
        if isinstance(entry, RepoFile)
    }


def has(api: Any, repo: str, commit: str, present: dict[str, Remote], name: str, file: Wanted) -> bool:
    """Whether `repo` has `file`: by the Hub's digest, or by the bytes where that digest is not one of the content."""
    found = present.get(name)
    if file.is_at(found):
        return True
    if found is None or found.sha256 or found.size != file.size:
        return False
    return fetch(api, repo, commit, name, file.size) == file.sha256


def in_memory(content: bytes) -> Wanted:
    """A file to publish that exists in memory alone."""
    return Wanted(size=len(content), sha256=hashlib.sha256(content).hexdigest(), content=content)
