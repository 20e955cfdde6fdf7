"""What a recipe would do, found out without doing any of it; and whether it can be done at all."""

import os
import shutil
from pathlib import Path

from prefect import task
from pydantic import BaseModel, ConfigDict

from configs.errors import BadInputError, TameError
from configs.schema import Recipe
from tasks import store
from tasks.device import name_of, pick
from tasks.download import Found, local_path, look


class Plan(BaseModel):
    """A recipe that can be run: what was found, where its variants go, and what somebody should know first."""

    model_config = ConfigDict(frozen=True)

    found: Found
    targets: dict[str, str]
    """Hub repo id or absolute folder of each variant, by its label; empty when nothing is published."""
    tokens: int | None
    """Tokens in the evaluation text, where they had to be counted to know that it fills a window."""
    warnings: list[str]


_made: dict[str, Plan] = {}


def preflight(recipe: Recipe, out: Path) -> Plan:
    """Check all that can be checked before anything is made: publishing first, then source, text, tasks and folders.

    Raises:
        BadInputError: the recipe cannot be run as it stands.
        TameError: a folder that cannot be written, a source that is damaged, a Hub that does not answer.
    """
    key = f"{recipe.model_dump_json()} {out}"
    if key not in _made:
        _made[key] = _preflight(recipe, out)
    return _made[key]


def targets(recipe: Recipe, model: str, out: Path) -> dict[str, str]:
    """Where each variant is published: Hub repo ids, or absolute folders (relative ones lie under `out`/published)."""
    if recipe.publish.to == "nowhere":
        return {}
    filled = {
        v.label: recipe.publish.repo.format(model=model, variant=v.label, name=recipe.name) for v in recipe.variants
    }
    if recipe.publish.to == "folder":
        return {label: str((out.absolute() / "published" / Path(repo).expanduser())) for label, repo in filled.items()}
    return filled


def _preflight(recipe: Recipe, out: Path) -> Plan:
    from tasks.evaluate.tasks import check_tasks
    from tasks.evaluate.text import check_text, load_text
    from tasks.publish import preflight as preflight_publish

    path = local_path(recipe.source.model)
    model = (
        recipe.source.model.rsplit("/", 1)[-1] if path is None else path.stem if path.is_file() else path.resolve().name
    )
    where = targets(recipe, model, out)
    # The token first: with one that the Hub does not accept, every other question is answered with 401.
    warnings = preflight_publish(recipe, where, None, False, 0) if where else []
    found = look(recipe.source)
    if where and (found.licence or found.gated):
        warnings = preflight_publish(recipe, where, found.licence, found.gated, found.bytes)
    text = load_text(recipe.evaluate.text)
    folder = Path(found.path) if found.kind == "folder" and found.path else None
    tokens = check_text(text, recipe.evaluate.window, folder)
    check_tasks(recipe.evaluate.tasks, recipe.evaluate.task_path)
    for place in (out, store.home()):
        writable(place)
    pick()
    return Plan(found=found, targets=where, tokens=tokens, warnings=warnings)


def writable(folder: Path) -> None:
    """See that `folder` can be made, or written if it is there.

    Raises:
        TameError: it cannot.
    """
    at = folder.absolute()
    while not at.exists():
        at = at.parent
    if not at.is_dir():
        raise TameError(f"{folder}: {at} is a file, so no folder can be made there; give another")
    if not os.access(at, os.W_OK | os.X_OK):
        raise TameError(f"{folder}: {at} cannot be written; make it writable or give another")


def describe(recipe: Recipe, out: Path) -> list[tuple[str, str]]:
    """The plan as (what, how it stands) lines: source, device, each variant, the evaluation, the disk.

    Raises:
        As `preflight`.
    """
    plan = preflight(recipe, out)
    found, device = plan.found, pick()
    pinned = f" at {found.commit[:12]}" if found.commit else ""
    there = "on this disk" if found.path else f"{found.bytes / 1e9:.2f} GB to download"
    lines = [
        ("source", f"{recipe.source.model}{pinned}, {there}"),
        ("device", name_of(device)),
    ]
    need = 0
    for variant in recipe.variants:
        size, share, left = _expected(recipe, variant, found)
        need += size
        target = plan.targets.get(variant.label)
        goes = f", published to {target}" if target else ", published nowhere"
        lines.append((variant.label, f"about {size / 1e9:.2f} GB{share}{goes}{left}"))
    free = shutil.disk_usage(_existing(store.home())).free
    lines.append(
        (
            "disk",
            f"{free / 1e9:.1f} GB free, about {(need * (2 if plan.targets else 1) + found.bytes) / 1e9:.1f} GB needed",
        )
    )
    lines += [("note", warning) for warning in plan.warnings]
    return lines


def _expected(recipe, variant, found):  # type: ignore[no-untyped-def]
    raise NotImplementedError


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


@task(name="plan", task_run_name="plan {recipe.name}")
def plan_task(recipe: Recipe, out: Path) -> Plan:
    """`preflight` in the flow, for runs that did not come through the command line."""
    return preflight(recipe, out)


__all__ = ["BadInputError", "Plan", "describe", "plan_task", "preflight", "targets", "writable"]
