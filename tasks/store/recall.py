"""Finds an artifact by its former path when its inputs are not available: on this machine, or in the shared store."""

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
