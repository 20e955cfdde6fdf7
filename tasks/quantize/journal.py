"""What a run has finished, so that a killed one is taken up where it was and not begun again."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

NAME = ".journal"


class Done(NamedTuple):
    """A finished tensor: the XXH3 checksum of what was written for it, and texts that wait for the end of the file."""

    checksum: int
    late: dict[str, str]


class Journal:
    """Finished tensors, a line each, in the folder that is being filled; empty if its output would be another one.

    The lines are not forced to the disk, and need not be: an entry counts only if the bytes it speaks of have its checksum.
    """

    def __init__(self, folder: Path, identity: Any) -> None:
        first = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.path = folder / NAME
        self.done: dict[str, Done] = {}
        with contextlib.suppress(OSError):
            lines = self.path.read_text(encoding="utf-8").splitlines()
            if lines[:1] == [first]:
                for line in lines[1:]:
                    with contextlib.suppress(ValueError):  # the last one may have been cut short
                        name, checksum, late = json.loads(line)
                        self.done[name] = Done(checksum, late)
        self.path.write_text(
            "\n".join([first, *(json.dumps([name, *done]) for name, done in self.done.items())]) + "\n",
            encoding="utf-8",
        )
        self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def add(self, name: str, done: Done) -> None:
        """Note a tensor as finished; by one write, so that threads do not mix their lines."""
        os.write(self.file, (json.dumps([name, *done]) + "\n").encode())

    def remove(self) -> None:
        """The output is complete."""
        os.close(self.file)
        self.path.unlink()
