"""What the tests' Hub stores: repos with their commits, and files told by the digests that the real one tells."""

import contextlib
import hashlib
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class File:
    """One file of a commit; `place` holds its bytes. `lfs` files are told by `sha256`, others by their git `oid`."""

    place: Path
    size: int
    oid: str
    sha256: str
    lfs: bool


@dataclass
class Repo:
    """A repo: `commits` are file lists by commit id, `refs` are branches, tags and pull requests by full name."""

    id: str
    kind: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    log: list[tuple[str, str, str]] = field(default_factory=list)
    """(commit, ref, message), in order."""
    refs: dict[str, str] = field(default_factory=dict)
    discussions: list[dict[str, Any]] = field(default_factory=list)
    dates: dict[str, datetime] = field(default_factory=dict)
    """When each commit was made."""

    def at(self, revision: str) -> str | None:
        """The commit that a branch, tag, pull request or commit names."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.refs[ref]
        return revision if revision in self.commits else None

    def files(self, revision: str = "main") -> dict[str, File]:
        """The files at `revision`."""
        commit = self.at(revision)
        return self.commits[commit] if commit else {}

    def commit(self, ref: str, files: dict[str, File], message: str) -> str:
        """Put a new commit on `ref`."""
        content = repr((self.refs.get(ref), len(self.log), message, sorted((n, f.sha256) for n, f in files.items())))
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid], self.refs[ref] = files, oid
        self.log.append((oid, ref, message))
        self.dates[oid] = datetime.now(UTC)
        return oid


def git_oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    return size > 0 and (
        path.endswith((".safetensors", ".bin", ".gguf", ".parquet")) or size > 10 << 20 or b"\0" in sample
    )


def file_of(place: Path, path: str) -> File:
    content = place.read_bytes()
    lfs = is_lfs(path, len(content), content[:512])
    return File(place, len(content), git_oid(content), hashlib.sha256(content).hexdigest(), lfs)


def entry(path: str, file: File) -> dict[str, Any]:
    lfs = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
    return {"type": "file", "path": path, "size": file.size, "oid": file.oid} | ({"lfs": lfs} if file.lfs else {})


def front_matter(files: dict[str, File]) -> dict[str, Any]:
    return front_matter_of(files["README.md"].place.read_text(errors="replace"))


def front_matter_of(card: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    with contextlib.suppress(yaml.YAMLError):
        return yaml.safe_load(match[1]) or {} if match else {}
    return {}
