"""A Hub over loopback HTTP, for the real huggingface_hub client: `python -m tests.hub --port 8765 --folder DIR`.

It keeps what the client's requests mean (huggingface_hub 2.4: hf_api.py, _commit_api.py, lfs.py, file_download.py):
users and tokens, repos of models and data sets with commits, branches, tags and pull requests, private and gated
access, LFS in one part or in several, files with ranges. It has no Xet storage, and says so by 404. It goes wrong on
demand: see `Hub.fail`.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

PIECE = 1 << 20
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class File:
    """One file of a commit; `place` holds its bytes. `lfs` files are told by `sha256`, others by their git `oid`."""

    place: Path
    size: int
    oid: str
    sha256: str
    lfs: bool


@dataclass
class Repo:
    """A repo: `commits` are file lists by commit id, `refs` are branches, tags and pull requests by full name."""

    id: str
    kind: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    log: list[tuple[str, str, str]] = field(default_factory=list)
    """(commit, ref, message), in order."""
    refs: dict[str, str] = field(default_factory=dict)
    discussions: list[dict[str, Any]] = field(default_factory=list)

    def at(self, revision: str) -> str | None:
        """The commit that a branch, tag, pull request or commit names."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.refs[ref]
        return revision if revision in self.commits else None

    def files(self, revision: str = "main") -> dict[str, File]:
        """The files at `revision`."""
        commit = self.at(revision)
        return self.commits[commit] if commit else {}

    def commit(self, ref: str, files: dict[str, File], message: str) -> str:
        """Put a new commit on `ref`."""
        content = repr((self.refs.get(ref), len(self.log), message, sorted((n, f.sha256) for n, f in files.items())))
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid], self.refs[ref] = files, oid
        self.log.append((oid, ref, message))
        return oid


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


class Answer(Exception):
    """An HTTP answer, raised from wherever it is known."""

    def __init__(self, status: int, body: Any = None, code: str | None = None, **headers: str) -> None:
        self.status, self.body = status, body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if code:
            self.headers["X-Error-Code"] = code
        if status >= 400 and isinstance(body, str):
            self.headers["X-Error-Message"], self.body = body, {"error": body}


class Hub:
    """The server and what it holds. `requests` lists every request as `METHOD /path?query`, in order."""

    def __init__(self, folder: Path | None = None, port: int = 0, part_size: int = 8 << 20) -> None:
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="tame-hub-")
        self.objects = Path(folder or self._temporary.name) / ".objects"  # type: ignore[union-attr]
        self.objects.mkdir(parents=True, exist_ok=True)
        self.part_size = part_size
        self.repos: dict[tuple[str, str], Repo] = {}
        self.tokens: dict[str, dict[str, Any]] = {}
        self.granted: set[tuple[str, str]] = set()
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

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
        files = {p.relative_to(folder).as_posix(): _file(p, p.relative_to(folder).as_posix()) for p in paths}
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
            files[path] = self._keep(content, path)
        return repo.commit("refs/heads/main", files, message)

    def corrupt(self, name: str, path: str, honest: bool = True, revision: str = "main") -> None:
        """Flip a byte of a stored file. `honest`: listings tell the digest of what is there; else the one before."""
        repo = self.model(name)
        old = repo.files(revision)[path]
        content = bytearray(old.place.read_bytes())
        content[len(content) // 2] ^= 1
        new = self._keep(bytes(content), path)
        repo.files(revision)[path] = new if honest else replace(old, place=new.place)

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

    def _keep(self, content: bytes, path: str) -> File:
        place = self.objects / hashlib.sha256(content).hexdigest()
        place.write_bytes(content)
        return _file(place, path)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for the acknowledgement of its headers
    fault: Fault | None = None

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle()

    def do_GET(self) -> None:
        self.fault, self.left = (
            self.hub.fault(f"{self.command} {self.path}"),
            int(self.headers.get("Content-Length") or 0),
        )
        try:
            if self.fault and self.fault.stall:
                time.sleep(self.fault.stall)
            if self.fault and self.fault.status:
                for _ in self._body():
                    pass
                raise Answer(
                    self.fault.status, self.fault.headers.get("X-Error-Message", "on demand"), **self.fault.headers
                )
            self._route()
        except Answer as answer:
            if self.fault and self.fault.lost:
                return self._drop()
            self._send(answer)
        except _Sent:
            pass
        except ConnectionError:
            self._drop()
        return None

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _route(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        for method, pattern, function in ROUTES:
            if (method == self.command or (method, self.command) == ("GET", "HEAD")) and (
                match := re.fullmatch(pattern, url.path)
            ):
                function(self, *(unquote(group or "") for group in match.groups()))
        raise Answer(404, f"no such page: {url.path}")

    # What comes in and what goes out.

    def _body(self) -> Iterator[bytes]:
        limit = self.fault.cut if self.fault and self.fault.cut is not None else None
        got = 0
        for piece in self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self._plain():
            got += len(piece)
            if limit is not None and got > limit:
                self._drop()
                raise ConnectionResetError
            yield piece

    def _plain(self) -> Iterator[bytes]:
        while self.left > 0:
            piece = self.rfile.read(min(self.left, PIECE))
            if not piece:
                raise ConnectionResetError
            self.left -= len(piece)
            yield piece

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            piece = self.rfile.read(size)
            if len(piece) < size:
                raise ConnectionResetError
            self.rfile.readline()
            yield piece
        self.rfile.readline()

    def _json(self) -> Any:
        content = b"".join(self._body())
        return json.loads(content) if content else {}

    def _send(self, answer: Answer) -> None:
        for _ in self._plain():  # what the client still sends, so that the connection can go on
            pass
        body = b"" if answer.body is None else answer.body
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(answer.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **answer.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _drop(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    # Who may do what.

    def _who(self) -> dict[str, Any] | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in self.hub.tokens:
            raise Answer(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(given)

    def _may(self, repo_id: str, write: bool = True) -> bool:
        who = self._who()
        owner = repo_id.split("/")[0]
        return bool(who and owner in (who["user"], *who["orgs"]) and (not write or who["role"] == "write"))

    def _repo(self, kind: str, repo_id: str, write: bool = False, files: bool = False) -> Repo:
        repo = self.hub.repos.get((kind or "models", repo_id))
        who = self._who()
        if repo is None or (repo.private and not self._may(repo_id, write=False)):
            raise Answer(404 if who else 401, "Repository not found", code="RepoNotFound")
        if write and not self._may(repo_id):
            raise Answer(403, f"You don't have the rights to write to {repo_id}")
        granted = who and ((who["user"], repo_id) in self.hub.granted or self._may(repo_id, write=False))
        if files and repo.gated and not granted:
            raise Answer(403 if who else 401, f"Access to model {repo_id} is restricted.", code="GatedRepo")
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        commit = repo.at(revision or "main")
        if commit is None:
            raise Answer(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return commit

    # The pages.

    def whoami(self) -> None:
        who = self._who()
        if who is None:
            raise Answer(401, "Invalid credentials in Authorization header")
        orgs = [{"type": "org", "name": org, "roleInOrg": "write"} for org in who["orgs"]]
        access = {"displayName": "tests", "role": who["role"], "createdAt": DATE}
        auth = {"type": "access_token", "accessToken": access}
        raise Answer(200, {"type": "user", "name": who["user"], "fullname": who["user"], "orgs": orgs, "auth": auth})

    def create(self) -> None:
        asked = self._json()
        who = self._who()
        repo_id = f"{asked.get('organization') or (who or {}).get('user')}/{asked['name']}"
        kind = asked.get("type") or "model"
        with self.hub.lock:
            if (f"{kind}s", repo_id) in self.hub.repos:
                raise Answer(409, {"error": "You already created this repo", "url": f"{self.hub.url}/{repo_id}"})
            if not self._may(repo_id):
                raise Answer(
                    403, f"You don't have the rights to create a {kind} under the namespace {repo_id.split('/')[0]}"
                )
            repo = Repo(repo_id, f"{kind}s", private=asked.get("visibility") == "private" or bool(asked.get("private")))
            attributes = self.hub._keep(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", ".gitattributes")
            repo.commit("refs/heads/main", {".gitattributes": attributes}, "initial commit")
            self.hub.repos[f"{kind}s", repo_id] = repo
        raise Answer(200, {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id, "private": repo.private})

    def delete(self) -> None:
        asked = self._json()
        repo = self._repo(
            f"{asked.get('type') or 'model'}s", f"{asked.get('organization')}/{asked['name']}", write=True
        )
        del self.hub.repos[repo.kind, repo.id]
        raise Answer(200, {})

    def settings(self, kind: str, repo_id: str) -> None:
        asked = self._json()
        repo = self._repo(kind, repo_id, write=True)
        if "visibility" in asked:
            repo.private = asked["visibility"] == "private"
        repo.gated = bool(asked.get("gated", repo.gated))
        raise Answer(200, {"private": repo.private, "gated": repo.gated})

    def info(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self._repo(kind, repo_id)
        commit = self._commit(repo, revision)
        siblings = []
        for path, file in sorted(repo.commits[commit].items()):
            more: dict[str, Any] = {}
            if "blobs" in self.query:
                lfs = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
                more = {"size": file.size, "blobId": file.oid} | ({"lfs": lfs} if file.lfs else {})
            siblings.append({"rfilename": path, **more})
        raise Answer(
            200,
            {
                "id": repo_id,
                "modelId": repo_id,
                "sha": commit,
                "author": repo_id.split("/")[0],
                "private": repo.private,
                "gated": "manual" if repo.gated else False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "lastModified": DATE,
                "createdAt": DATE,
                "siblings": siblings,
            }
            | ({"cardData": _front_matter(repo.commits[commit])} if "README.md" in repo.commits[commit] else {}),
        )

    def tree(self, kind: str, repo_id: str, revision: str, folder: str) -> None:
        repo = self._repo(kind, repo_id)
        files = repo.commits[self._commit(repo, revision)]
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        under = f"{folder}/" if folder else ""
        entries = {path: _entry(path, file) for path, file in files.items() if path.startswith(under)}
        for path in list(entries):
            parts = path[len(under) :].split("/")
            for depth in range(1, len(parts)):
                parent = under + "/".join(parts[:depth])
                entries[parent] = {"type": "directory", "path": parent, "size": 0, "oid": "0" * 40}
        if folder and not entries:
            raise Answer(404, f"{folder} does not exist", code="EntryNotFound")
        if not recursive:
            entries = {path: entry for path, entry in entries.items() if "/" not in path[len(under) :]}
        raise Answer(200, [entries[path] for path in sorted(entries)])

    def paths_info(self, kind: str, repo_id: str, revision: str) -> None:
        content = b"".join(self._body()).decode()
        repo = self._repo(kind, repo_id)
        files = repo.commits[self._commit(repo, revision)]
        asked = json.loads(content)["paths"] if content.startswith("{") else parse_qs(content).get("paths", [])
        found = [_entry(path, files[path]) for path in asked if path in files]
        folders = [path for path in asked if any(name.startswith(f"{path}/") for name in files)]
        raise Answer(200, found + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders])

    def refs(self, kind: str, repo_id: str) -> None:
        repo = self._repo(kind, repo_id)
        answer: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for ref, commit in repo.refs.items():
            group = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}[ref.split("/")[1]]
            answer[group].append({"name": ref.split("/", 2)[2], "ref": ref, "targetCommit": commit})
        raise Answer(200, answer)

    def log(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self._repo(kind, repo_id)
        ref = next((r for r in repo.refs if r.endswith(revision)), revision)
        entries = [
            {"id": oid, "title": message, "message": "", "authors": [], "date": DATE}
            for oid, on, message in reversed(repo.log)
            if on == ref
        ]
        raise Answer(200, entries)

    def branch(self, kind: str, repo_id: str, name: str) -> None:
        asked = self._json()
        repo = self._repo(kind, repo_id, write=True)
        if self.command == "DELETE":
            repo.refs.pop(f"refs/heads/{name}", None)
            raise Answer(200, {})
        if f"refs/heads/{name}" in repo.refs:
            raise Answer(409, "Reference already exists")
        repo.refs[f"refs/heads/{name}"] = self._commit(repo, asked.get("startingPoint", "main"))
        raise Answer(200, {})

    def tag(self, kind: str, repo_id: str, revision: str) -> None:
        asked = self._json()
        repo = self._repo(kind, repo_id, write=True)
        if self.command == "DELETE":
            repo.refs.pop(f"refs/tags/{revision}", None)
            raise Answer(200, {})
        if f"refs/tags/{asked['tag']}" in repo.refs:
            raise Answer(409, "Tag reference exists already")
        repo.refs[f"refs/tags/{asked['tag']}"] = self._commit(repo, revision)
        raise Answer(200, {})

    def validate_yaml(self) -> None:
        self._json()
        raise Answer(200, {"errors": [], "warnings": []})

    def preupload(self, kind: str, repo_id: str, revision: str) -> None:
        asked = self._json()
        repo = self._repo(kind, repo_id, write="create_pr" not in self.query)
        files = repo.commits[self._commit(repo, revision)]
        modes = []
        for file in asked["files"]:
            lfs = _is_lfs(file["path"], file["size"], base64.b64decode(file["sample"]))
            old = files.get(file["path"])
            oid = None if old is None else old.sha256 if old.lfs else old.oid
            mode = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            modes.append(mode | ({"oid": oid} if oid else {}))
        raise Answer(200, {"files": modes, "commitOid": self._commit(repo, revision)})

    def lfs_batch(self, kind: str, repo_id: str) -> None:
        asked = self._json()
        self._repo(kind, repo_id, write=True)
        objects = []
        for wanted in asked["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
            if not (self.hub.objects / oid).exists():
                upload: dict[str, Any] = {"href": f"{self.hub.url}/lfs/{oid}", "header": {}}
                if size > self.hub.part_size and "multipart" in asked.get("transfers", []):
                    parts = -(-size // self.hub.part_size)
                    upload["header"] = {str(n): f"{self.hub.url}/lfs/{oid}/{n}" for n in range(1, parts + 1)}
                    upload["header"]["chunk_size"] = str(self.hub.part_size)
                    upload["href"] = f"{self.hub.url}/lfs/{oid}/complete"
                entry["actions"] = {
                    "upload": upload,
                    "verify": {"href": f"{self.hub.url}/lfs/{oid}/verify", "header": {}},
                }
            objects.append(entry)
        raise Answer(200, {"transfer": "multipart", "objects": objects})

    def lfs_put(self, oid: str, part: str) -> None:
        place = self.hub.objects / f"{oid}.{part or 'whole'}.{threading.get_ident()}"
        with place.open("wb") as file:
            for piece in self._body():
                file.write(piece)
        if self.fault and self.fault.corrupt:
            _flip(place)
        if int(self.headers.get("Content-Length") or place.stat().st_size) != place.stat().st_size:
            raise Answer(400, "The body is not as long as it says")
        etag = hashlib.sha256(place.read_bytes()).hexdigest()
        place.rename(self.hub.objects / (f"{oid}.{part}" if part else oid))
        raise Answer(200, None, ETag=f'"{etag}"')

    def lfs_complete(self, oid: str) -> None:
        asked = self._json()
        partial = self.hub.objects / f"{oid}.partial"
        with partial.open("wb") as whole:
            for part in asked["parts"]:
                piece = self.hub.objects / f"{oid}.{part['partNumber']}"
                if not piece.exists():
                    raise Answer(400, f"part {part['partNumber']} is missing")
                whole.write(piece.read_bytes())
                piece.unlink()
        partial.rename(self.hub.objects / oid)
        raise Answer(200, {})

    def lfs_verify(self, oid: str) -> None:
        asked = self._json()
        place = self.hub.objects / oid
        if not place.exists() or place.stat().st_size != asked["size"]:
            raise Answer(404, "Object does not exist or has another size")
        raise Answer(200, {})

    def commit(self, kind: str, repo_id: str, revision: str) -> None:
        lines = [json.loads(line) for line in b"".join(self._body()).splitlines() if line]
        new_pr = "create_pr" in self.query
        repo = self._repo(kind, repo_id, write=not new_pr)
        header = lines[0]["value"]
        with self.hub.lock:
            base = self._commit(repo, revision)
            if (parent := header.get("parentCommit")) and not base.startswith(parent):
                raise Answer(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repo.commits[base])
            for line in lines[1:]:
                self._apply(files, line["key"], line["value"])
            answer: dict[str, Any] = {"success": True, "hookOutput": ""}
            if new_pr:
                number = self._discuss(repo, header["summary"], header.get("description", ""), True)
                ref = f"refs/pr/{number}"
                answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
            else:
                ref = next((r for r in (revision, f"refs/heads/{revision}") if r in repo.refs), "refs/heads/main")
            answer["commitOid"] = repo.commit(ref, files, header["summary"])
        raise Answer(200, answer | {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{answer['commitOid']}"})

    def _apply(self, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            content = base64.b64decode(value["content"])
            if self.fault and self.fault.corrupt and content:
                content = bytes([content[0] ^ 1]) + content[1:]
            files[path] = self.hub._keep(content, path)
        elif key == "lfsFile":
            place = self.hub.objects / value["oid"]
            if not place.exists():
                raise Answer(400, f"LFS pointer pointed to a file that does not exist: {path}")
            oid = _git_oid(
                f"version https://git-lfs\noid sha256:{value['oid']}\nsize {place.stat().st_size}\n".encode()
            )
            files[path] = File(place, place.stat().st_size, oid, value["oid"], True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise Answer(404, f"A file with this name doesn't exist: {path}", code="EntryNotFound")
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]

    def _discuss(self, repo: Repo, title: str, description: str, pull_request: bool) -> int:
        number = len(repo.discussions) + 1
        repo.discussions.append(
            {
                "num": number,
                "title": title,
                "description": description,
                "status": "open",
                "isPullRequest": pull_request,
                "author": {"name": (self._who() or {}).get("user", "somebody")},
                "createdAt": DATE,
                "repo": {"name": repo.id, "type": repo.kind[:-1]},
                "changes": {"base": "refs/heads/main"},
                "events": [],
                "filesWithConflicts": [],
                "base": repo.refs["refs/heads/main"],
            }
        )
        if pull_request:
            repo.refs[f"refs/pr/{number}"] = repo.refs["refs/heads/main"]
        return number

    def discussions(self, kind: str, repo_id: str) -> None:
        if self.command == "POST":
            asked = self._json()
            repo = self._repo(kind, repo_id)
            number = self._discuss(repo, asked["title"], asked.get("description", ""), asked.get("pullRequest", False))
            raise Answer(200, {"num": number})
        repo = self._repo(kind, repo_id)
        found = repo.discussions
        if "status" in self.query:
            found = [d for d in found if d["status"] == self.query["status"][0]]
        if "type" in self.query:
            found = [d for d in found if d["isPullRequest"] == (self.query["type"][0] == "pull_request")]
        raise Answer(200, {"discussions": found, "count": len(found), "start": 0})

    def discussion(self, kind: str, repo_id: str, number: str) -> None:
        repo = self._repo(kind, repo_id)
        if not 0 < int(number) <= len(repo.discussions):
            raise Answer(404, "no such discussion")
        raise Answer(200, repo.discussions[int(number) - 1])

    def merge(self, kind: str, repo_id: str, number: str) -> None:
        self._json()
        repo = self._repo(kind, repo_id, write=True)
        with self.hub.lock:
            pull_request = repo.discussions[int(number) - 1]
            if pull_request["status"] != "open":
                raise Answer(409, f"This pull request is {pull_request['status']}")
            base = repo.commits[pull_request["base"]]
            mine, main = repo.files(f"refs/pr/{number}"), repo.files()
            for path in {p for p in base.keys() | mine.keys() if base.get(p) != mine.get(p)}:
                if main.get(path) not in (base.get(path), mine.get(path)):
                    raise Answer(409, f"{path} has conflicts")
            merged = {p: f for p, f in main.items() if p in mine or p not in base}
            merged |= {p: f for p, f in mine.items() if base.get(p) != f}
            oid = repo.commit("refs/heads/main", merged, f"{pull_request['title']} (#{number})")
            pull_request["status"], pull_request["changes"]["mergeCommitId"] = "merged", oid
        raise Answer(200, {})

    def status(self, kind: str, repo_id: str, number: str) -> None:
        asked = self._json()
        repo = self._repo(kind, repo_id, write=True)
        repo.discussions[int(number) - 1]["status"] = asked["status"]
        event = {"id": "1", "type": "status-change", "createdAt": DATE, "author": {"name": "me"}, "data": asked}
        raise Answer(200, {"newStatus": event})

    def auth_check(self, kind: str, repo_id: str, write: str) -> None:
        self._repo(kind, repo_id, write=bool(write), files=True)
        raise Answer(200, {})

    def resolve(self, kind: str, repo_id: str, revision: str, path: str) -> None:
        repo = self._repo(kind, repo_id, files=True)
        commit = self._commit(repo, revision)
        file = repo.commits[commit].get(path)
        if file is None:
            raise Answer(404, "Entry not found", code="EntryNotFound", X_Repo_Commit=commit)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.sha256 if file.lfs else file.oid}"'}
        if file.lfs:
            self._file(302, file, headers | {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(file.size)}, path)
        self._file(200, file, headers, path)

    def cdn(self, name: str) -> None:
        place = Path(base64.urlsafe_b64decode(name).decode())
        self._file(200, _file(place, place.name), {}, place.name)

    def _file(self, status: int, file: File, headers: dict[str, str], path: str) -> None:
        """Send a file, or the part of it that was asked for; 302 sends the client to the page of large files."""
        if status == 302:
            # Another host name than the API's, as on the real Hub: the client stops there and reads the headers.
            other = self.hub.url.replace("127.0.0.1", "localhost")
            headers["Location"] = f"{other}/cdn/{base64.urlsafe_b64encode(str(file.place).encode()).decode()}"
            raise Answer(302, None, **headers)
        first, last = 0, file.size - 1
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            if match[1]:
                first, last = int(match[1]), min(int(match[2] or last), last)
            elif match[2]:
                first = max(0, file.size - int(match[2]))
            if first >= file.size:
                raise Answer(416, "range", Content_Range=f"bytes */{file.size}")
            headers["Content-Range"], status = f"bytes {first}-{last}/{file.size}", 206
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(last - first + 1),
            "Accept-Ranges": "bytes",
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        limit = self.fault.cut if self.fault and self.fault.cut is not None else None
        if self.command != "HEAD":
            with file.place.open("rb") as source:
                source.seek(first)
                left = last - first + 1
                while left > 0:
                    piece = source.read(min(left, PIECE if limit is None else limit))
                    if self.fault and self.fault.corrupt:
                        piece, self.fault = bytes([piece[0] ^ 1]) + piece[1:], None
                    self.wfile.write(piece)
                    left -= len(piece)
                    if limit is not None:
                        self._drop()
                        raise ConnectionResetError
        raise _Sent


class _Sent(ConnectionError):
    """A file was sent in full: nothing else is to be."""


R = r"/api/(models|datasets|spaces)/([^/]+(?:/[^/]+)?)"
G = r"/(?:(models|datasets|spaces)/)?([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("DELETE", "/api/repos/delete", _Handler.delete),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("PUT", rf"{R}/settings", _Handler.settings),
    ("GET", rf"{R}/tree/([^/]+)(?:/(.+))?", _Handler.tree),
    ("POST", rf"{R}/paths-info/([^/]+)", _Handler.paths_info),
    ("GET", rf"{R}/refs", _Handler.refs),
    ("GET", rf"{R}/commits/([^/]+)", _Handler.log),
    ("POST", rf"{R}/branch/(.+)", _Handler.branch),
    ("DELETE", rf"{R}/branch/(.+)", _Handler.branch),
    ("POST", rf"{R}/tag/(.+)", _Handler.tag),
    ("DELETE", rf"{R}/tag/(.+)", _Handler.tag),
    ("POST", rf"{R}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"{R}/commit/([^/]+)", _Handler.commit),
    ("GET", rf"{R}/discussions", _Handler.discussions),
    ("POST", rf"{R}/discussions", _Handler.discussions),
    ("GET", rf"{R}/discussions/(\d+)", _Handler.discussion),
    ("POST", rf"{R}/discussions/(\d+)/merge", _Handler.merge),
    ("POST", rf"{R}/discussions/(\d+)/status", _Handler.status),
    ("GET", rf"{R}/auth-check(/write)?", _Handler.auth_check),
    ("GET", rf"{R}/revision/([^/]+)", _Handler.info),
    ("GET", r"/api/(models|datasets|spaces)/([^/]+/[^/]+)()", _Handler.info),
    ("POST", rf"{G}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})(?:/(\d+))?", _Handler.lfs_put),
    ("POST", r"/lfs/([0-9a-f]{64})/complete", _Handler.lfs_complete),
    ("POST", r"/lfs/([0-9a-f]{64})/verify", _Handler.lfs_verify),
    ("GET", r"/cdn/(.+)", _Handler.cdn),
    ("GET", rf"{G}/(?:resolve|raw)/([^/]+)/(.+)", _Handler.resolve),
]


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _is_lfs(path: str, size: int, sample: bytes) -> bool:
    return size > 0 and (
        path.endswith((".safetensors", ".bin", ".gguf", ".parquet")) or size > 10 << 20 or b"\0" in sample
    )


def _file(place: Path, path: str) -> File:
    content = place.read_bytes()
    lfs = _is_lfs(path, len(content), content[:512])
    return File(place, len(content), _git_oid(content), hashlib.sha256(content).hexdigest(), lfs)


def _entry(path: str, file: File) -> dict[str, Any]:
    lfs = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
    return {"type": "file", "path": path, "size": file.size, "oid": file.oid} | ({"lfs": lfs} if file.lfs else {})


def _flip(place: Path) -> None:
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 1
    place.write_bytes(bytes(content))


def _front_matter(files: dict[str, File]) -> dict[str, Any]:
    import yaml

    match = re.match(r"---\n(.*?)\n---", files["README.md"].place.read_text(errors="replace"), re.DOTALL)
    with contextlib.suppress(yaml.YAMLError):
        return yaml.safe_load(match[1]) or {} if match else {}
    return {}


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
