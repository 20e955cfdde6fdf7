"""Publish: what was measured goes to the Hub or into a folder, all of it or nothing, and never twice."""

import json
import logging
from pathlib import Path

from configs.errors import BadInputError, TameError
from configs.schema import Publish
from tasks.download.hub_client import endpoint
from tasks.publish import folder, provenance
from tasks.publish import hub as publish_hub
from tasks.publish import preflight as checks
from tasks.publish.card import plain_files
from tasks.publish.check import problems, problems_in_folder
from tasks.publish.client import again_when_reached, connect
from tasks.publish.collection import collect
from tasks.publish.contents import contents, summary
from tasks.publish.hub import Release
from tasks.publish.repo import TAG, Wanted
from tasks.publish.signing import signer
from tasks.runtime.progress import Progress, show
from tasks.store.digests import sha256_files
from tasks.values import Published

log = logging.getLogger("tame.publish")

PAUSES = (2.0, 10.0, 30.0)
"""Seconds before each further attempt, after the client's own."""


def publish(
    folder: Path,
    files: dict[str, str],
    extra: dict[str, bytes],
    repo: str,
    spec: Publish,
    *,
    progress: Progress = show,
    pauses: tuple[float, ...] = PAUSES,
) -> Published:
    """Publish `files` of `folder` (sha256 by name) with `extra` (contents by name) to a Hub repo or a folder.

    The Hub gets them in a private repo, or in a pull request to one that has been published before; every file is
    compared with its digest and read back; then it becomes visible, is merged and tagged. What is there already is not
    uploaded again.

    Raises:
        TameError: a file is not what was measured; the target holds something else, or changed meanwhile; the Hub does not
            hold what was uploaded.
        UnreachableError: the Hub did not answer, or not well, in any attempt.
    """
    if spec.to == "nowhere":
        raise BadInputError("publish.to is nowhere; give hub or folder")
    _unchanged(folder, files)
    wanted = {
        name: Wanted(size=(folder / name).stat().st_size, sha256=digest, path=str(folder / name))
        for name, digest in files.items()
    }
    if spec.to == "folder":
        return _log_published(_to_folder(wanted, extra, repo, progress))
    tag = provenance.tag(extra, files)
    release = Release(
        repo=repo,
        files=wanted,
        extra=extra,
        private=spec.private,
        review=spec.review,
        tag=tag if tag.startswith(TAG) else TAG + tag,
    )
    done = _log_published(again_when_reached(lambda: _to_hub(release, progress), pauses))
    if spec.collection:
        collect(spec.collection, done.repo, spec.private)
    return done


def _unchanged(folder: Path, files: dict[str, str]) -> None:
    try:
        found = sha256_files(folder, list(files))
    except OSError as error:
        raise TameError(f"{error.filename}: {error.strerror}; it was measured and cannot be read now") from None
    for name, digest in found.items():
        if digest != files[name]:
            raise TameError(f"{folder / name} is not the file that was measured; run `tame cache verify`")


def _to_folder(wanted: dict[str, Wanted], extra: dict[str, bytes], repo: str, progress: Progress) -> Published:
    try:
        written = folder.put(wanted, extra, Path(repo), signer(repo), progress)
    except OSError as error:
        raise TameError(f"{error.filename or repo}: {error.strerror or error}; nothing was published there") from None
    return Published(
        to="folder", repo=repo, url=repo, commit=None, visibility="local", uploaded=written, already=not written
    )


def _to_hub(release: Release, progress: Progress) -> Published:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        release = release.model_copy(update={"repo": checks.full_name(release.repo, connect())})
        done = publish_hub.put(release, signer(release.repo), progress)
    except BadInputError as error:  # too late for exit code 2: work has been done
        raise TameError(str(error)) from None
    except RepositoryNotFoundError:
        raise TameError(f"{release.repo} is gone from {endpoint()}, or hidden from this token; run it again") from None
    return Published(
        to="hub",
        repo=release.repo,
        url=done.url,
        commit=done.commit,
        visibility="private" if done.private else "public",
        uploaded=done.uploaded,
        already=done.already,
    )


def _log_published(done: Published) -> Published:
    if done.already:
        log.debug("%s is there already, as it should be", done.url)
    else:
        log.debug("published %s (%s)", done.url, done.visibility)
    return done


def publish_folder(folder: Path, repo: str, private: bool = True, progress: Progress = show) -> Published:
    """Publish any folder that holds a model to the Hub repo `repo`: `tame publish FOLDER REPO`.

    Only what a checkpoint consists of is published, and what is left out is said. A folder without a card or tame.json gets
    them, with what its files tell.

    Raises:
        BadInputError: there is no such folder, it holds no model or not a whole one, or the preflight fails.
        As `publish`.
    """
    checks.legal(repo)
    names, left_out = contents(folder)
    if "README.md" in names:
        checks.utf8(folder / "README.md")
    api = connect()
    repo = checks.full_name(repo, api)
    checks.may_write(api, repo)
    checks.free(api, repo, private, None)
    if "README.md" in names:
        checks.metadata(api, (folder / "README.md").read_text(encoding="utf-8"), f"{folder / 'README.md'}")
    try:
        files = sha256_files(folder, names)
    except OSError as error:
        raise BadInputError(f"{error.filename}: {error.strerror}; make it readable, or remove it") from None
    if left_out:
        log.warning("not published, as they are no part of a checkpoint: %s", summary(left_out))
    if provenance.NAME in files and (wrong := problems_in_folder(folder, names=names)):
        raise BadInputError(f"{folder}: {wrong[0]}; what is published has to be what its {provenance.NAME} tells of")
    extra = {} if provenance.NAME in files else plain_files(folder, files, repo)
    return publish(folder, files, extra, repo, Publish(to="hub", repo=repo, private=private), progress=progress)


def check(repo: str, source: str | None = None, progress: Progress = show) -> list[str]:
    """`tame publish --check REPO [--source S]`: what is wrong with a published repo or folder, a line each.

    Raises:
        As `tasks.publish.check.problems`.
    """
    return problems(repo, source, progress)


def tell_lineage(done: Published, extra: dict[str, bytes]) -> None:
    """Tell Prefect what was made of what: an asset event, with the source as the asset that it came from."""
    from prefect.events import emit_event

    try:
        record = json.loads(extra[provenance.NAME])
        source = f"{endpoint()}/{record['source']['model']}"
        target = f"{endpoint()}/{done.repo}" if done.to == "hub" else f"file://{done.repo}"
        emit_event(
            event="prefect.asset.materialization.succeeded",
            resource={
                "prefect.resource.id": target,
                "prefect.resource.name": done.repo,
                "prefect.asset.url": done.url,
            },
            related=[{"prefect.resource.id": source, "prefect.resource.role": "asset"}],
            payload={"commit": done.commit, "source_commit": record["source"]["commit"], **record["artifact"]},
        )
    except Exception as error:  # what is published is published, whoever hears of it
        log.debug("no asset event for %s: %s", done.repo, error)
