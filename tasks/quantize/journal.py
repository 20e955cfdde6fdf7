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
    """Finished tensors and hashed files, a line each, in the folder that is being filled; empty if its output would be another.

    The lines are not forced to the disk, and need not be: a tensor's counts only if the bytes it speaks of have its checksum,
    and a file's only if those of all its tensors do.
    """

    def __init__(self, folder: Path, identity: Any) -> None:
        first = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.path = folder / NAME
        self.done: dict[str, Done] = {}
        self.digests: dict[str, str] = {}
        with contextlib.suppress(OSError):
            lines = self.path.read_text(encoding="utf-8").splitlines()
            if lines[:1] == [first]:
                for line in lines[1:]:
                    with contextlib.suppress(ValueError):  # the last one may have been cut short
                        name, *entry = json.loads(line)
                        if len(entry) == 1:
                            self.digests[name] = entry[0]
                        else:
                            self.done[name] = Done(*entry)
        known = [*([name, *done] for name, done in self.done.items()), *self.digests.items()]
        self.path.write_text("\n".join([first, *map(json.dumps, known)]) + "\n", encoding="utf-8")
        self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def add(self, name: str, done: Done) -> None:
        """Note a tensor as finished."""
        self._write([name, *done])

    def add_file(self, name: str, digest: str) -> None:
        """Note a file's sha256."""
        self._write([name, digest])

    def _write(self, entry: list[Any]) -> None:
        os.write(self.file, (json.dumps(entry) + "\n").encode())  # at once, so that threads do not mix their lines

    def remove(self) -> None:
        """The output is complete."""
        os.close(self.file)
        self.path.unlink()
