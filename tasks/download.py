"""From a source to a snapshot: a folder of files whose content is known."""

from pydantic import BaseModel, ConfigDict


class Snapshot(BaseModel):
    """A source, pinned and on disk. `files` has the sha256 of every file that was taken, by its path in the folder."""

    model_config = ConfigDict(frozen=True)

    path: str
    model: str
    """As the recipe names it."""
    name: str
    """Short name, for repo templates and titles: Qwen3-1.7B."""
    revision: str | None
    commit: str | None
    """The Hub commit; None for local sources."""
    files: dict[str, str]
    digest: str
    """sha256 over `files`: what every key downstream is made from."""
    trust_remote_code: bool = False
    cached: bool = False
