"""Publish: what was measured goes to the Hub or into a folder, all of it or nothing, and never twice."""

import functools
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import State, task
from prefect.states import Completed
from pydantic import BaseModel, ConfigDict

from configs.errors import BadInputError, TameError
from configs.schema import Publish, Recipe
from tasks import hub, provenance, publish_hub, publish_local, store
from tasks.hub import UnreachableError, endpoint
from tasks.progress import Progress, show
from tasks.publish_hub import TAG, Release, Wanted
from tasks.publish_wire import MissingError, ask, connect, wait
from tasks.signing import signer

log = logging.getLogger("tame.publish")

PAUSES = (2.0, 10.0, 30.0)
"""Seconds before each further attempt, after the client's own."""
# Licences whose text sets conditions on passing the model on, or forbids it. None is one too: no licence, no permission.
CONDITIONAL = (
    "llama",
    "gemma",
    "other",
    "cc-by-nd",
    "cc-by-nc-nd",
    "openrail",
    "bigscience",
    "falcon",
    "qwen",
    "unknown",
)


class Published(BaseModel):
    """What was published, and where. `commit` is None for folders; `uploaded` names the files that had to be moved."""

    model_config = ConfigDict(frozen=True)

    to: str
    repo: str
    url: str
    commit: str | None
    visibility: str
    """`private`, `public`, or `local` for a folder."""
    uploaded: list[str]
    already: bool
    """Whether nothing had to be done."""

    @property
    def cached(self) -> bool:
        """Names the Prefect state."""
        return self.already


def preflight(
    recipe: Recipe, repos: dict[str, str], source_licence: str | None, source_gated: bool, source_bytes: int
) -> list[str]:
    """See that every variant can be published where it is to go, before anything is made; what should be known first.

    Raises:
        BadInputError: no token, or one that is not accepted or may not write there; a name that the Hub does not allow; a
            target that holds what tame did not put there, or is public and should be private; no space in a folder.
        UnreachableError: the Hub does not answer.
    """
    spec = recipe.publish
    if spec.to == "nowhere" or not repos:
        return []
    if len({repo.lower() for repo in repos.values()}) < len(repos):
        raise BadInputError(f"publish.repo {spec.repo!r} is the same for two variants; put {{variant}} in it")
    if spec.to == "folder":
        for repo in repos.values():
            _folder_can_be_written(Path(repo))
        return _space(repos, source_bytes)
    for repo in repos.values():
        _legal(repo)
    api = connect()
    signer("")
    for repo in repos.values():
        _may_write(api, _full_name(repo, api), spec.private)
    warnings = _licence(recipe.source.model, source_licence, source_gated)
    if warnings and spec.licence_check == "refuse":
        raise BadInputError(f"{warnings[0]}; publish.licence_check is refuse")
    return warnings


def publish(
    folder: Path,
    files: dict[str, str],
    extra: dict[str, bytes],
    repo: str,
    spec: Publish,
    *,
    tag: str | None = None,
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
    changed = [name for name, digest in store.sha256_files(folder, list(files)).items() if digest != files[name]]
    if changed:
        raise TameError(f"{folder / changed[0]} is not the file that was measured; run `tame cache verify`")
    if spec.to == "folder":
        uploaded = publish_local.put(folder, files, extra, Path(repo), progress)
        where = Published(
            to="folder", repo=repo, url=repo, commit=None, visibility="local", uploaded=uploaded, already=not uploaded
        )
        return _told(where)
    wanted = {
        name: Wanted(size=(folder / name).stat().st_size, sha256=digest, path=str(folder / name))
        for name, digest in files.items()
    }
    tag = tag or provenance.tag(extra, files)
    release = Release(
        repo=repo,
        files=wanted,
        extra=extra,
        private=spec.private,
        review=spec.review,
        tag=tag if tag.startswith(TAG) else TAG + tag,
    )
    return _told(_patiently(lambda: _to_hub(release, progress), pauses))


def _to_hub(release: Release, progress: Progress) -> Published:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        release = release.model_copy(update={"repo": _full_name(release.repo, connect())})
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


def _patiently(attempt: Callable[[], Published], pauses: tuple[float, ...]) -> Published:
    for pause in pauses:
        try:
            return attempt()
        except UnreachableError as error:
            wait(error, pause)
    return attempt()


def _told(done: Published) -> Published:
    if done.already:
        log.info("%s is there already, as it should be", done.url)
    else:
        log.info("published %s (%s)", done.url, done.visibility)
    return done


def publish_folder(folder: Path, repo: str, private: bool = True, progress: Progress = show) -> Published:
    """Publish any folder that holds a model to the Hub repo `repo`: `tame publish FOLDER REPO`.

    A folder without a card or tame.json gets them, with what its files tell.

    Raises:
        BadInputError: there is no such folder, it holds no model, or the preflight fails.
        As `publish`.
    """
    from tasks.card import plain_files  # not above: a card is made from a result, and a result knows this module

    names = (
        sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else []
    )
    names = [name for name in names if not any(part in (".git", ".cache", "__pycache__") for part in name.split("/"))]
    if not any(name.endswith((".safetensors", ".gguf")) for name in names):
        raise BadInputError(f"{folder}: no folder with .safetensors files; give the folder of a model")
    _legal(repo)
    api = connect()
    repo = _full_name(repo, api)
    _may_write(api, repo, private)
    files = store.sha256_files(folder, names)
    extra = {} if provenance.NAME in files else plain_files(folder, files, repo)
    return publish(folder, files, extra, repo, Publish(to="hub", repo=repo, private=private), progress=progress)


def check(repo: str, source: str | None = None, progress: Progress = show) -> list[str]:
    """`tame publish --check REPO [--source S]`: what is wrong with a published repo or folder, a line each.

    Raises:
        As `tasks.publish_check.problems`.
    """
    from tasks.publish_check import problems  # not above: it reads cards, and those are made from results

    return problems(repo, source, progress)


def _legal(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise BadInputError(
            f"{repo!r} is not a name that the Hub allows: owner/name of letters, digits, '-', '_', '.', 96 characters at most, "
            "no '--' or '..'"
        ) from None


@functools.cache
def _account(address: str, token: str) -> dict[str, Any]:
    """Who the token belongs to, asked once: the Hub answers this seldom to those who ask often."""
    from huggingface_hub import HfApi

    account: dict[str, Any] = ask("your account", HfApi(endpoint=address, token=token).whoami)
    return account


def _full_name(repo: str, api: Any) -> str:
    return repo if "/" in repo else f"{_account(api.endpoint, api.token)['name']}/{repo}"


def _may_write(api: Any, repo: str, private: bool) -> None:
    account, owner = _account(api.endpoint, api.token), repo.split("/")[0]
    access = (account.get("auth") or {}).get("accessToken") or {}
    mine = {account["name"]} | {org["name"] for org in account.get("orgs") or [] if org.get("roleInOrg") != "read"}
    if access.get("role") == "read":
        raise BadInputError(
            f"the token in HF_TOKEN may only read; make one that may write to {repo} on {endpoint()}/settings/tokens"
        )
    if owner.lower() not in {name.lower() for name in mine}:
        raise BadInputError(
            f"{account['name']} (the token in HF_TOKEN) may not write to {repo}; names that may: {', '.join(sorted(mine))}"
        )
    scopes = (access.get("fineGrained") or {}).get("scoped")
    if scopes is not None and not _scoped(scopes, repo):
        raise BadInputError(
            f"the token in HF_TOKEN has no write permission for {repo}; grant it on {endpoint()}/settings/tokens"
        )
    _free(api, repo, private)


def _free(api: Any, repo: str, private: bool) -> None:
    """See that `repo` is not there yet, or that tame may go on with it."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = ask(repo, lambda: api.model_info(repo))
    except (RepositoryNotFoundError, MissingError):
        return
    names = {sibling.rfilename for sibling in info.siblings or []}
    if provenance.NAME not in names and names - {".gitattributes"}:
        raise BadInputError(
            f"{repo} is there and tame did not make it (it has no {provenance.NAME}); give another name, or empty it"
        )
    if private and not info.private:
        raise BadInputError(
            f"{repo} is public and publish.private is true; set publish.private: false, or make it private on "
            f"{endpoint()}/{repo}/settings"
        )


def _scoped(scopes: list[dict[str, Any]], repo: str) -> bool:
    names = {repo.lower(), repo.split("/")[0].lower()}
    return any(
        str((scope.get("entity") or {}).get("name", "")).lower() in names
        and "repo.write" in (scope.get("permissions") or [])
        for scope in scopes
    )


def _licence(model: str, licence: str | None, gated: bool) -> list[str]:
    warnings = []
    if licence and licence.lower().startswith(CONDITIONAL):
        warnings.append(
            f"{model} is under {licence!r}, which sets conditions on passing it on; read it before you publish"
        )
    if licence and licence.lower().startswith("cc-by-nc"):
        warnings.append(f"{model} is under {licence!r}: not for commercial use, and neither is what is made from it")
    if gated:
        warnings.append(f"{model} is gated: its owner decides who gets it, and what is published here goes around that")
    return warnings


def _folder_can_be_written(target: Path) -> None:
    at = target
    while not at.exists():
        at = at.parent
    if not at.is_dir():
        raise BadInputError(f"{target}: {at} is a file, so no folder can be made there; give another publish.repo")
    if not os.access(at if at != target else at.parent, os.W_OK | os.X_OK):
        raise BadInputError(f"{target}: {at} cannot be written; make it writable or give another publish.repo")
    if at == target and any(target.iterdir()) and not (target / provenance.NAME).exists():
        raise BadInputError(f"{target} holds files that tame did not put there; give another publish.repo, or empty it")


def _space(repos: dict[str, str], source_bytes: int) -> list[str]:
    at = Path(next(iter(repos.values())))
    while not at.exists():
        at = at.parent
    free, least = shutil.disk_usage(at).free, source_bytes // 4 * len(repos)
    if free < least:
        raise BadInputError(
            f"{at} has {free / 1e9:.1f} GB free; {len(repos)} variants need {least / 1e9:.1f} GB or more"
        )
    if free < source_bytes * len(repos):
        return [f"{at} has {free / 1e9:.1f} GB free, which may not be enough for {len(repos)} variants"]
    return []


def _tell_lineage(done: Published, extra: dict[str, bytes]) -> None:
    """Tell Prefect what was made of what: an asset event, with the source as the asset that it came from."""
    from prefect.events import emit_event

    try:
        told = json.loads(extra[provenance.NAME])
        source = f"{endpoint()}/{told['source']['model']}"
        target = f"{endpoint()}/{done.repo}" if done.to == "hub" else f"file://{done.repo}"
        emit_event(
            event="prefect.asset.materialization.succeeded",
            resource={
                "prefect.resource.id": target,
                "prefect.resource.name": done.repo,
                "prefect.asset.url": done.url,
            },
            related=[{"prefect.resource.id": source, "prefect.resource.role": "asset"}],
            payload={"commit": done.commit, "source_commit": told["source"]["commit"], **told["artifact"]},
        )
    except Exception as error:  # what is published is published, whoever hears of it
        log.debug("no asset event for %s: %s", done.repo, error)


@task(
    name="publish",
    task_run_name="publish {label}",
    retries=len(PAUSES),
    retry_delay_seconds=list(PAUSES),
    retry_condition_fn=hub.passes,
)
def publish_task(
    label: str,
    folder: Path,
    files: dict[str, str],
    extra: dict[str, bytes],
    repo: str,
    spec: Publish,
    tag: str | None = None,
) -> State[Published]:
    """`publish` in the flow: Prefect makes the further attempts, so that they can be seen."""
    try:
        done = publish(folder, files, extra, repo, spec, tag=tag, pauses=())
    except UnreachableError as error:
        wait(error, 0.0)  # what the Hub asked for, on top of Prefect's own delay
        raise
    if not done.already:
        _tell_lineage(done, extra)
    return Completed(name="Cached" if done.already else "Completed", data=done)


__all__ = ["Published", "check", "preflight", "publish", "publish_folder", "publish_task"]
