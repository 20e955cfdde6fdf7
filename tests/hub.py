"""A Hub over loopback HTTP, for the real huggingface_hub client: `python -m tests.hub --port 8765 --folder DIR`.

It keeps what the client's requests mean (huggingface_hub 2.4: hf_api.py, _commit_api.py, lfs.py, file_download.py):
users and tokens, repos of models and data sets with commits, branches, tags and pull requests, private and gated
access, collections, LFS in one part or in several, files with ranges. It has no Xet storage, and says so by 404. It goes wrong on
demand: see `Hub.fail`.
"""

import argparse
import contextlib
import hashlib
import re
import tempfile
import threading
from dataclasses import dataclass, field, replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from tests.hub_files import ROUTES, FilePages
from tests.hub_repo import File, Repo, file_of


@dataclass
class Fault:
    """Something that goes wrong with the next `times` requests that match, after `skip` of them went well."""

    match: str
    status: int | None = None
    times: int = 1
    skip: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    corrupt: bool = False
    stall: float = 0.0
    lost: bool = False


class Hub:
    """The server and what it holds. `requests` lists every request as `METHOD /path?query`, in order."""

    def __init__(
        self,
        folder: Path | None = None,
        port: int = 0,
        part_size: int = 8 << 20,
        host: str = "127.0.0.1",
        cdn: str = "localhost",
    ) -> None:
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="tame-hub-")
        self.objects = Path(folder or self._temporary.name) / ".objects"  # type: ignore[union-attr]
        self.objects.mkdir(parents=True, exist_ok=True)
        self.part_size = part_size
        self.repos: dict[tuple[str, str], Repo] = {}
        self.tokens: dict[str, dict[str, Any]] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.renamed: dict[str, str] = {}
        self.granted: set[tuple[str, str]] = set()
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        handler = type("Handler", (FilePages,), {"hub": self, "routes": ROUTES})
        self.server = ThreadingHTTPServer((host if host == "127.0.0.1" else "", port), handler)
        self.server.daemon_threads = True
        self.url = f"http://{host}:{self.server.server_port}"
        self.cdn = f"http://{cdn}:{self.server.server_port}"  # another host, as the real one has for large files

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        if self._temporary:
            self._temporary.cleanup()

    def token(self, role: str = "write", user: str = "me", orgs: tuple[str, ...] = ("org",)) -> str:
        """A token of `user`, a member of `orgs`, that may `read` or `write`."""
        token = f"hf_{role}{hashlib.sha256(repr((role, user, orgs)).encode()).hexdigest()[:28]}"
        self.tokens[token] = {"user": user, "role": role, "orgs": orgs}
        return token

    def add_model(
        self, name: str, folder: Path, gated: bool = False, private: bool = False, kind: str = "models"
    ) -> Repo:
        """A repo with the files of `folder` (not copied: leave them alone) as its first commit."""
        repo = Repo(name, kind, private, gated)
        paths = sorted(p for p in Path(folder).rglob("*") if p.is_file() and ".cache" not in p.parts)
        files = {p.relative_to(folder).as_posix(): file_of(p, p.relative_to(folder).as_posix()) for p in paths}
        repo.commit("refs/heads/main", files, "as given")
        with self.lock:
            self.repos[kind, name] = repo
        return repo

    def add_dataset(self, name: str, folder: Path, **access: bool) -> Repo:
        """A data set, as `add_model`."""
        return self.add_model(name, folder, kind="datasets", **access)

    def model(self, name: str) -> Repo:
        """The model repo `name`."""
        return self.repos["models", name]

    def read(self, name: str, path: str, revision: str = "main") -> bytes:
        """The bytes of a file of a model repo."""
        return self.model(name).files(revision)[path].place.read_bytes()

    def write(self, name: str, path: str, content: bytes | None, message: str = "by somebody else") -> str:
        """Somebody puts a file (None: removes it) on a model repo's main branch, by other means than the client."""
        repo = self.model(name)
        files = dict(repo.files())
        if content is None:
            del files[path]
        else:
            files[path] = self.keep(content, path)
        return repo.commit("refs/heads/main", files, message)

    def corrupt(self, name: str, path: str, honest: bool = True, revision: str = "main") -> None:
        """Flip a byte of a stored file. `honest`: listings tell the digest of what is there; else the one before."""
        repo = self.model(name)
        old = repo.files(revision)[path]
        content = bytearray(old.place.read_bytes())
        content[len(content) // 2] ^= 1
        new = self.keep(bytes(content), path)
        repo.files(revision)[path] = new if honest else replace(old, place=new.place)

    def rename(self, name: str, to: str) -> None:
        """Give a model repo another name; whoever asks for the old one is sent there."""
        repo = self.repos.pop(("models", name))
        repo.id, self.repos["models", to], self.renamed[name] = to, repo, to

    def grant(self, user: str, name: str) -> None:
        """Let `user` download from the gated repo `name`."""
        self.granted.add((user, name))

    def fail(self, match: str, status: int | None = None, **what: Any) -> None:
        """Let requests whose `METHOD /path?query` has `match` (a regular expression) go wrong; see `Fault`.

        `status` answers it (with `headers`), `cut` drops the connection after so many bytes of the body, either way,
        `stall` waits so many seconds, `corrupt` flips a byte of what is stored, `lost` does what was asked and drops
        the connection instead of answering.
        """
        self.faults.append(Fault(match, status, **what))

    def fault(self, request: str) -> Fault | None:
        """The fault that is due for `request`."""
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, request):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def keep(self, content: bytes, path: str) -> File:
        place = self.objects / hashlib.sha256(content).hexdigest()
        place.write_bytes(content)
        return file_of(place, path)


def main() -> None:
    """Serve DIR/OWNER/NAME as models and DIR/datasets/OWNER/NAME as data sets, until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--folder", type=Path, required=True, help="where models lie, and uploads are kept")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with Hub(options.folder, options.port) as hub:
        for folder in sorted(options.folder.glob("[!.]*/*")):
            if folder.is_dir() and folder.parent.name != "datasets":
                hub.add_model(f"{folder.parent.name}/{folder.name}", folder)
        for folder in sorted(options.folder.glob("datasets/*/*")):
            hub.add_dataset(f"{folder.parent.name}/{folder.name}", folder)
        print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={hub.token()}")
        print(f"# a read-only token: {hub.token('read')}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
