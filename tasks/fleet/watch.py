"""Finds out which watched models have changed since their last release, and starts a release of each of these."""

import fnmatch
import glob
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from configs.errors import BadInputError, TameError, line, named_line
from configs.schema import Recipe, Source, Template, Watch, is_pattern
from tasks.download import hub
from tasks.download.inspection import inspect_source, local_path
from tasks.fleet import flow_runs
from tasks.store import on_disk
from tasks.store.digests import sha256_file, sha256_files

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

AT_ONCE = 8  # requests to the Hub
ACTIONS = ("started", "waits", "settles", "unchanged", "given up", "refused", "error")


class Seen(BaseModel):
    """A model as it is now: the Hub's commit, or a digest of a folder's files, and when it changed."""

    model_config = ConfigDict(frozen=True)

    model: str
    commit: str = ""
    changed: datetime | None = None
    error: str | None = None
    """Why it cannot be told."""


class Row(BaseModel):
    """What came of a look at a model, and why."""

    model_config = ConfigDict(frozen=True)

    model: str
    commit: str
    action: Literal["started", "waits", "settles", "unchanged", "given up", "refused", "error"]
    why: str
    run: str | None = None
    """The address of the release run that is meant."""


def look_at(spec: Watch) -> list[Row]:
    """Look at every model of `spec`, and start a release of each that has moved. Downloads nothing, imports no torch.

    A release is started by a key over recipe, model, commit and attempt, which Prefect's server takes once: two looks at the
    same time, or one that is repeated, start it once. No model is released while another release of it runs.

    Raises:
        TameError: the server has no deployment that releases.
    """
    from prefect.client.orchestration import get_client

    now = datetime.now(UTC)
    with ThreadPoolExecutor(AT_ONCE) as pool, get_client(sync_client=True) as client:
        looks = pool.map(lambda model: list(_see(model, spec, now)), spec.models)
        seen = _apart({one.model: one for group in looks for one in group}, spec)
        keys = {one.model: [_key(one, spec.recipe, n) for n in range(spec.attempts)] for one in seen}
        runs = flow_runs.by_key(client, [key for group in keys.values() for key in group])
        busy = flow_runs.busy(client)
        rows = {
            one.model: decide(
                one, [runs[key] for key in keys[one.model] if key in runs], busy.get(one.model), spec, now
            )
            for one in seen
        }

        moved = [one for one in seen if rows[one.model].action == "started"]
        fleet = flow_runs.fleet(client)
        for one, sent in zip(moved, pool.map(lambda one: _placed(one, spec, fleet), moved), strict=True):
            if isinstance(sent, Row):
                rows[one.model] = sent
                continue
            key = next(key for key in keys[one.model] if key not in runs)
            run = flow_runs.start(client, fleet, sent.recipe, key, sent.queue, ["watch"])
            update = {"why": f"{rows[one.model].why}; sent to {sent.queue}", "run": flow_runs.page(run)}
            rows[one.model] = rows[one.model].model_copy(update=update)
    return sorted(rows.values(), key=lambda row: ACTIONS.index(row.action))


def decide(seen: Seen, tried: list["FlowRun"], busy: "FlowRun | None", spec: Watch, now: datetime) -> Row:
    """What to do with a model. `tried` are the release runs of this very commit, `busy` is one of the model that runs."""

    def row(action: str, why: str, run: "FlowRun | None" = None) -> Row:
        page = flow_runs.page(run) if run else None
        return Row.model_validate({**seen.model_dump(), "action": action, "why": why, "run": page})

    if seen.error:
        return row("error", seen.error)
    last = tried[-1] if tried else None
    if last and last.state and flow_runs.ended(last):
        said = line(last.state.message or last.state.name or "", limit=None)
        if last.state.is_completed():
            return row("unchanged", f"released: {said}", last)
        if last.state.is_cancelled():
            return row("unchanged", "its release was cancelled, and is started again when the model changes", last)
        if len(tried) >= spec.attempts:
            return row(
                "given up",
                f"its release failed {len(tried)} times; retry it in Prefect, or change the model: {said}",
                last,
            )
    if running := last if last and not flow_runs.ended(last) else busy:
        return row("waits", f"a release of it is {(running.state_name or 'running').lower()}", running)
    if seen.changed and now - seen.changed < timedelta(seconds=spec.settle_seconds):
        return row("settles", f"changed {max(0, int((now - seen.changed).total_seconds()))} s ago")
    return row("started", f"attempt {len(tried) + 1}" if tried else "new")


class _Sent(NamedTuple):
    recipe: Recipe
    queue: str


def _placed(seen: Seen, spec: Watch, fleet: flow_runs.Fleet) -> _Sent | Row:
    """The recipe for a model that has moved, and its queue; or why it cannot be released."""
    pinned = None if Path(seen.model).is_absolute() else seen.commit
    try:
        recipe = spec.recipe.recipe(seen.model, pinned)
        return _Sent(recipe, flow_runs.queue(fleet, inspect_source(recipe.source), recipe, spec.device))
    except (BadInputError, ValueError) as error:
        return Row(model=seen.model, commit=seen.commit, action="refused", why=named_line(error))
    except TameError as error:
        return Row(model=seen.model, commit=seen.commit, action="error", why=named_line(error))


def _see(model: str, spec: Watch, now: datetime) -> Iterator[Seen]:
    """The models that `model` stands for, as they are."""
    try:
        if is_pattern(model):
            local = model.startswith((".", "/", "~"))
            found = _match_folders(model, spec, now) if local else _match_repos(model, spec.recipe)
            yield from found or [Seen(model=model, error="nothing matches it")]
            return
        path = local_path(model)
        yield _see_repo(model, spec.recipe.revision) if path is None else _see_path(path.absolute(), spec, now)
    except TameError as error:
        yield Seen(model=model, error=named_line(error))


def _see_repo(model: str, revision: str) -> Seen:
    info = hub.model_info(model, revision, pauses=(1.0,))  # the next look is soon
    return Seen(model=model, commit=info.commit, changed=info.modified)


def _see_path(path: Path, spec: Watch, now: datetime) -> Seen:
    """A folder or a .gguf by the content of what a release would take of it; files that change just now are not read."""
    found = inspect_source(Source(model=str(path), trust_remote_code=spec.recipe.trust_remote_code))
    files = [path / name for name in sorted(found.files)] if path.is_dir() else [path]
    stats = [file.stat() for file in files]
    changed = datetime.fromtimestamp(max(max(stat.st_mtime, stat.st_ctime) for stat in stats), UTC)
    if now - changed < timedelta(seconds=spec.settle_seconds):
        return Seen(model=str(path), changed=changed)
    digests = sha256_files(path, sorted(found.files)) if path.is_dir() else {path.name: sha256_file(path)}
    return Seen(model=str(path), commit=on_disk.digest_of(digests), changed=changed)


def _match_repos(pattern: str, recipe: Template) -> list[Seen]:
    owner, slash, _ = pattern.partition("/")
    if not slash or is_pattern(owner):
        raise BadInputError(
            f"models {pattern}: a pattern of Hub repos begins with their owner, as in me/my-fine-tune-*"
        )
    listed = {name: at for name, at in hub.list_models(owner).items() if fnmatch.fnmatchcase(name, pattern)}
    if recipe.revision == "main":
        return [Seen(model=name, commit=commit, changed=changed) for name, (commit, changed) in sorted(listed.items())]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda name: _see_repo(name, recipe.revision), sorted(listed)))


def _match_folders(pattern: str, spec: Watch, now: datetime) -> list[Seen]:
    found = []
    for name in sorted(glob.glob(str(Path(pattern).expanduser().absolute()))):  # noqa: PTH207  (the pattern is absolute)
        if (Path(name) / "config.json").is_file():
            try:
                found.append(_see_path(Path(name), spec, now))
            except TameError as error:
                found.append(Seen(model=name, error=named_line(error)))
    return found


def _apart(seen: dict[str, Seen], spec: Watch) -> list[Seen]:
    """`seen` without what the watch itself publishes, which a pattern may match, too; two that go to one place are refused."""
    goes, refused = flow_runs.destinations([model for model, one in seen.items() if not one.error], spec.recipe)
    return [
        one.model_copy(update={"error": refused.get(model, one.error)})
        for model, one in seen.items()
        if model in spec.models or model not in goes
    ]


def _key(seen: Seen, recipe: Template, attempt: int) -> str:
    content = f"{recipe.model_dump_json()} {seen.model} {seen.commit} {attempt}"
    return f"watch {hashlib.sha256(content.encode()).hexdigest()}"
