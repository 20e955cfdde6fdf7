"""What people call what a digest stands for, so that `tame cache list` can say it: TAME_HOME/names/DIGEST."""

import contextlib

from configs.settings import home


def remember(digest: str, name: str) -> None:
    """Keep the name of a snapshot or a checkpoint; that it cannot be kept is no reason to fail."""
    file = home() / "names" / digest
    with contextlib.suppress(OSError):
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(name, encoding="utf-8")


def name_of(digest: str) -> str:
    """The name that was kept for a digest, or the digest's beginning."""
    try:
        return (home() / "names" / digest).read_text(encoding="utf-8")
    except OSError:
        return digest[:8]
