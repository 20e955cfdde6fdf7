"""An artifact by the path that it had, when what it was made from is not at hand: here, or brought from the shared store."""

from pathlib import Path

from configs.errors import TameError
from tasks.store import artifacts, on_disk, remote_store


def recalled(path: str) -> Path:
    """The folder of the files of the artifact that was at `path`, maybe on another machine.

    Raises:
        TameError: it is neither here nor in TAME_STORE, or the shared store does not answer.
    """
    folder = on_disk.store_folder() / Path(path).parent.name
    found = on_disk.read(folder)
    if found is None and (remote := remote_store.connect()):
        with on_disk.locked(folder, f"another process is fetching {folder.name}; waiting for it"):
            found = on_disk.read(folder) or artifacts.fetched(remote, folder)
    if found is None:
        raise TameError(f"{folder} is gone, and was not kept in TAME_STORE; run the recipe again")
    return Path(found.path)
