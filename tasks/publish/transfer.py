"""Files to the Hub and back: one commit up, one file down, with progress and without the client's own noise."""

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, BinaryIO, NamedTuple

from tasks.download.hub_client import endpoint, explained, quiet
from tasks.publish.client import ask
from tasks.runtime.progress import Progress

log = logging.getLogger("tame.publish")

TOO_LARGE = 50_000_000_000  # the Hub serves larger files by Xet alone


class Change(NamedTuple):
    """What one commit does to a repo: `additions` are paths or contents, by name in the repo; `parent` is the commit before."""

    additions: dict[str, str | bytes]
    removals: list[str]
    parent: str
    message: str


def upload(
    api: Any,
    repo: str,
    change: Change,
    progress: Progress,
    revision: str | None = None,
    pull_request: bool = False,
) -> Any:
    """Upload what `change` adds and make its commit, on the branch or pull request `revision`, as a new pull request if asked."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    class Addition(CommitOperationAdd):
        """A file that tells how far it has been read."""

        @contextmanager
        def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
            with super().as_file() as file:
                if with_tqdm:
                    read = file.read
                    file.read = lambda size=-1: report(read(size))  # type: ignore[method-assign]
                yield file

    operations = [Addition(name, content) for name, content in sorted(change.additions.items())]
    total = sum(operation.upload_info.size for operation in operations)
    done = 0

    def report(piece: bytes) -> bytes:
        nonlocal done
        done += len(piece)
        progress(f"upload {repo}", min(done, total - 1), total)  # what is sent again counts again, up to the end
        return piece

    removing = [CommitOperationDelete(name) for name in change.removals]
    log.info("upload %s: %d files, %.1f MB", repo, len(operations), total / 1e6)
    with explained(repo, publishing=True), quiet():
        _choose_transfer(api, repo)
        commit = api.create_commit(
            repo,
            [*operations, *removing],
            commit_message=change.message,
            revision=revision,
            create_pr=pull_request,
            parent_commit=change.parent,
        )
    progress(f"upload {repo}", total, total)
    return commit


def _choose_transfer(api: Any, repo: str) -> None:
    """Large files go by Xet where the Hub has it. Where it has not, the client does not find out by itself."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers

    if constants.HF_HUB_DISABLE_XET or endpoint() == "https://huggingface.co":
        return
    url = f"{api.endpoint}/api/models/{repo}/xet-write-token/main"
    answer = get_session().get(url, headers=build_hf_headers(token=api.token))
    if "x-xet-cas-url" not in answer.headers:
        log.debug("%s has no Xet storage (%d): large files go by LFS", api.endpoint, answer.status_code)
        constants.HF_HUB_DISABLE_XET = True


def fetch(
    api: Any,
    repo: str,
    commit: str,
    name: str,
    size: int,
    sink: BinaryIO | None = None,
    report: Callable[[int], None] = lambda size: None,
) -> str:
    """Download one file past every cache, into `sink` if there is one, and return its sha256.

    A connection that breaks is resumed by the client. `report` hears the size of each piece. Files larger than TOO_LARGE
    are not fetched: "".
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    if size > TOO_LARGE:
        return ""
    url = hf_hub_url(repo, name, revision=commit, endpoint=api.endpoint)

    def once() -> str:
        hasher = _Hasher(sink, report)
        with quiet():
            http_get(url, hasher, headers=build_hf_headers(token=api.token), expected_size=size or None)  # type: ignore[arg-type]
        return hasher.digest.hexdigest()

    return ask(repo, once)


def content(api: Any, repo: str, commit: str, name: str, size: int) -> bytes:
    """The content of one small file."""
    sink = BytesIO()
    fetch(api, repo, commit, name, size, sink)
    return sink.getvalue()


class _Hasher:
    """What the client writes a download into: it may start over, and never skips."""

    def __init__(self, sink: BinaryIO | None, report: Callable[[int], None]) -> None:
        self.sink, self.report = sink, report
        self.restart()

    def restart(self) -> None:
        self.digest, self.at = hashlib.sha256(), 0
        if self.sink:
            self.sink.seek(0)
            self.sink.truncate()

    def write(self, piece: bytes) -> int:
        self.digest.update(piece)
        self.at += len(piece)
        if self.sink:
            self.sink.write(piece)
        self.report(len(piece))
        return len(piece)

    def tell(self) -> int:
        return self.at

    def seek(self, position: int) -> int:
        if position != self.at:
            self.restart()
        return self.at

    def truncate(self) -> int:
        return self.at
