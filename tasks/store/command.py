"""`tame cache`: what is in the artifact store, whether it is what was written, and what can go."""

import re
import time

from pydantic import ValidationError

from configs.errors import BadInputError
from configs.schema import Variant
from tasks.store import admin, artifacts, on_disk
from tasks.store.names import name_of


def look_after(
    action: str, remote: bool, older_than_days: float | None, dry_run: bool = False
) -> tuple[list[str], int]:
    """List, verify or prune the store of this machine, or the shared one: lines for people, and the exit code.

    Args:
        action: `list`, `verify` or `prune`.
        remote: The store at TAME_STORE instead of this machine's.
        older_than_days: With `prune`: remove also what was not used (in the shared store: made) for so many days.
        dry_run: With `prune`: say what would be removed, and remove nothing.

    Raises:
        BadInputError: `older_than_days` or `dry_run` without `prune`; a shared store that is not named or cannot be used.
    """
    if older_than_days is not None and action != "prune":
        raise BadInputError(f"--older-than {older_than_days:g}: it belongs to prune; leave it out with {action}")
    if dry_run and (action != "prune" or remote):
        raise BadInputError("--dry-run: it belongs to prune of this machine's store; leave it out")
    if action == "prune" and dry_run:
        return _would_prune(older_than_days), 0
    if action == "prune":
        return (_prune_remote if remote else _prune)(older_than_days), 0
    return _list_remote(action) if remote else _list(action)


def _prune(older_than_days: float | None) -> list[str]:
    removed, kept = artifacts.prune(older_than_days)
    size = sum(artifact.bytes for artifact in removed)
    return [f"removed {len(removed)} artifacts, {size / 1e6:,.1f} MB; kept {len(kept)}"]


def _would_prune(older_than_days: float | None) -> list[str]:
    going = [one for one in artifacts.artifacts() if artifacts.is_old(one, older_than_days) or artifacts.verify(one)]
    size = sum(artifact.bytes for artifact in going)
    rows = [_row(one, [], "prune") for one in going]
    return [*rows, f"would remove {len(going)} artifacts, {size / 1e6:,.1f} MB, and what killed runs left"]


def _prune_remote(older_than_days: float | None) -> list[str]:
    remote = admin.remote_store()
    removed, kept = admin.prune(remote, older_than_days)
    return [*([f"removed {remote.url}/{name}" for name in removed] or ["nothing to remove"]), f"kept {len(kept)}"]


def _list(action: str) -> tuple[list[str], int]:
    lines, wrong, total = [], 0, 0
    for artifact in artifacts.artifacts():
        problems = artifacts.verify(artifact) if action == "verify" else []
        wrong += len(problems)
        total += artifact.bytes
        lines.append(_row(artifact, problems, action))
    if lines:
        lines.append(f"{len(lines)} artifacts, {total / 1e6:,.1f} MB in {on_disk.store_folder()}")
    return lines, 1 if wrong else 0


def _list_remote(action: str) -> tuple[list[str], int]:
    remote = admin.remote_store()
    lines, wrong = [], 0
    for name, shared, problems in admin.artifacts(remote):
        if shared and action == "verify":
            problems = admin.verify(remote, shared)
        wrong += len(problems)
        kind, _, key = name.rpartition("-")
        lines.append(_row_remote(kind, key, shared.bytes if shared else 0, f"{remote.url}/{name}", problems, action))
    return lines, 1 if wrong and action == "verify" else 0


def _row(artifact: on_disk.Artifact, problems: list[str], action: str) -> str:
    """An artifact: what it is, of which model, when it was made, how large it is, and its key."""
    days = (time.time() - artifact.created) / 86_400
    age = f"{days:.0f} d" if days >= 1 else f"{days * 24:.0f} h" if days * 24 >= 1 else f"{days * 1440:.0f} min"
    what = f"{artifact.kind:<12} {_of(artifact):<34.34} {age:>7}"
    return f"{what} {artifact.bytes / 1e6:>10,.1f} MB  {artifact.key[:12]}{_said(problems, action)}"


def _of(artifact: on_disk.Artifact) -> str:
    """The variant, model or text that an artifact was made of, as far as what it was made from tells."""
    inputs = artifact.inputs
    if isinstance(inputs.get("variant"), dict):
        variant = inputs["variant"]
        source = name_of(str(inputs.get("snapshot", "")))
        try:
            return f"{source} {Variant.model_validate(variant).label}"
        except ValidationError:  # of a later or an earlier tame
            return f"{source} {variant.get('method')}"
    text = str(inputs.get("builtin") or inputs.get("dataset") or inputs.get("model") or "")
    return name_of(text) if re.fullmatch(r"[0-9a-f]{64}", text) else text


def _row_remote(kind: str, key: str, size: int, where: str, problems: list[str], action: str) -> str:
    return f"{kind:<12} {key[:12]}  {size / 1e6:>10,.1f} MB  {where}{_said(problems, action)}"


def _said(problems: list[str], action: str) -> str:
    return "".join(f"\n  {problem}" for problem in problems) or ("  ok" if action == "verify" else "")
