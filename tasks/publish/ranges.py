"""Parts of the files of a model repo, or of a folder, read without the rest: names, small files, headers, ranges of bytes."""

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.errors import BadInputError, TameError
from tasks.download.checkpoint import INDEX, WEIGHTS, Stored, header_length, parse_header, weight_files
from tasks.download.hub_client import endpoint
from tasks.publish.client import ask, connect
from tasks.publish.repo import read_repo

SMALL = ("config.json", "generation_config.json", INDEX)
GUESS = 1 << 16  # bytes that are read at first of a file, as most headers are shorter
AT_ONCE = 8  # headers that are read at a time


class RangedFiles(ABC):
    """The files of a checkpoint, of which pieces can be read; it counts the bytes."""

    def __init__(self, name: str, sizes: dict[str, int]) -> None:
        self.name = name
        self.sizes = sizes
        self.bytes_read = 0

    def read(self, file: str, start: int, size: int) -> bytes:
        """`size` bytes of a file, from byte `start`.

        Raises:
            TameError: the file is missing, or ends before.
        """
        if file not in self.sizes:
            raise TameError(f"{self.name}: there is no {file}")
        data = self._read(file, start, size) if size else b""
        self.bytes_read += len(data)
        if len(data) != size:
            raise TameError(f"{self.name}: {file} ends at byte {start + len(data)}; {start + size} were expected")
        return data

    @abstractmethod
    def _read(self, file: str, start: int, size: int) -> bytes: ...

    @contextmanager
    def skeleton(self) -> Iterator[Path]:
        """A temporary folder with the small files alone: what tells the architecture and where each tensor lies."""
        with tempfile.TemporaryDirectory(prefix="tame-ranges-") as scratch:
            folder = Path(scratch)
            for name in SMALL:
                if name in self.sizes:
                    (folder / name).write_bytes(self.read(name, 0, self.sizes[name]))
            if WEIGHTS in self.sizes:
                (folder / WEIGHTS).touch()
            yield folder

    def tensors(self, skeleton: Path) -> dict[str, Stored]:
        """Every tensor, by name, from the headers of the files that `skeleton` names.

        Raises:
            TameError: a header lies, or the index names a file that is not there.
        """
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = pool.map(self._header, weight_files(skeleton))
            return {name: tensor for header in found for name, tensor in header.items()}

    def _header(self, file: str) -> dict[str, Stored]:
        size, where = self.sizes.get(file, 0), f"{self.name}: {file}"
        start = self.read(file, 0, min(GUESS, size))
        length = header_length(start, size, where)
        header = start[8 : 8 + length]
        header += self.read(file, 8 + len(header), length - len(header))
        return parse_header(header, size, where, file)


class FolderFiles(RangedFiles):
    """A folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = (path for path in folder.iterdir() if path.is_file())
        super().__init__(str(folder), {path.name: path.stat().st_size for path in names})

    def _read(self, file: str, start: int, size: int) -> bytes:
        with (self.folder / file).open("rb") as opened:
            return os.pread(opened.fileno(), size, start)


class HubFiles(RangedFiles):
    """A model repo of the Hub at one commit, read by HTTP range requests (RFC 9110, section 14)."""

    def __init__(self, repo: str, revision: str | None = None) -> None:
        self.api = connect(required=False)
        remote = read_repo(self.api, repo, revision)
        if remote is None:
            at = f" at {revision[:12]}" if revision else ""
            raise BadInputError(f"{repo}{at} is not on {endpoint()}, or HF_TOKEN may not read it")
        self.repo = remote
        super().__init__(remote.id, {name: file.size for name, file in remote.files.items()})

    def _read(self, file: str, start: int, size: int) -> bytes:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = hf_hub_url(self.repo.id, file, revision=self.repo.head, endpoint=self.api.endpoint)
        headers = {**build_hf_headers(token=self.api.token), "Range": f"bytes={start}-{start + size - 1}"}
        headers["Accept-Encoding"] = "identity"  # a range of a compressed file would be one of other bytes

        def once() -> Any:
            answer = get_session().get(url, headers=headers, follow_redirects=True)
            hf_raise_for_status(answer)
            return answer

        answer = ask(self.repo.id, once)
        return bytes(answer.content[start : start + size] if answer.status_code == 200 else answer.content)


def files_of(model: str, revision: str | None = None) -> RangedFiles:
    """The files of a folder of this machine, or of a Hub repo at `revision`.

    Raises:
        BadInputError: no such folder or repo exists.
        UnreachableError: the Hub does not answer.
    """
    folder = Path(model).expanduser()
    return FolderFiles(folder) if folder.is_dir() else HubFiles(model, revision)
