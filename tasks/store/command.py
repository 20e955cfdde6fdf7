"""`tame cache`: what is in the artifact store, whether it is what was written, and what can go."""

from configs.errors import BadInputError
from tasks.store import admin, artifacts


def look_after(action: str, remote: bool, older_than_days: float | None) -> tuple[list[str], int]:
    """List, verify or prune the store of this machine, or the shared one: lines for people, and the exit code.

    Args:
        action: `list`, `verify` or `prune`.
        remote: The store at TAME_STORE instead of this machine's.
        older_than_days: With `prune`: remove also what was not used (in the shared store: made) for so many days.

    Raises:
        BadInputError: `older_than_days` without `prune`; a shared store that is not named or cannot be used.
    """
    if older_than_days is not None and action != "prune":
        raise BadInputError(f"--older-than {older_than_days:g}: it belongs to prune; leave it out with {action}")
    if action == "prune":
        return (_prune_remote if remote else _prune)(older_than_days), 0
    return _list_remote(action) if remote else _list(action)


def _prune(older_than_days: float | None) -> list[str]:
    removed, kept = artifacts.prune(older_than_days)
    size = sum(artifact.bytes for artifact in removed)
    return [f"removed {len(removed)} artifacts, {size / 1e6:,.1f} MB; kept {len(kept)}"]


def _prune_remote(older_than_days: float | None) -> list[str]:
    remote = admin.remote_store()
    removed, kept = admin.prune(remote, older_than_days)
    return [*([f"removed {remote.url}/{name}" for name in removed] or ["nothing to remove"]), f"kept {len(kept)}"]


def _list(action: str) -> tuple[list[str], int]:
    lines, wrong = [], 0
    for artifact in artifacts.artifacts():
        problems = artifacts.verify(artifact) if action == "verify" else []
        wrong += len(problems)
        lines.append(_row(artifact.kind, artifact.key, artifact.bytes, artifact.path, problems, action))
    return lines, 1 if wrong else 0


def _list_remote(action: str) -> tuple[list[str], int]:
    remote = admin.remote_store()
    lines, wrong = [], 0
    for name, shared, problems in admin.artifacts(remote):
        if shared and action == "verify":
            problems = admin.verify(remote, shared)
        wrong += len(problems)
        kind, _, key = name.rpartition("-")
        lines.append(_row(kind, key, shared.bytes if shared else 0, f"{remote.url}/{name}", problems, action))
    return lines, 1 if wrong and action == "verify" else 0


def _row(kind: str, key: str, size: int, where: str, problems: list[str], action: str) -> str:
    said = "".join(f"\n  {problem}" for problem in problems) or ("  ok" if action == "verify" else "")
    return f"{kind:<12} {key[:12]}  {size / 1e6:>10,.1f} MB  {where}{said}"
