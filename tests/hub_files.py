"""The pages of the tests' Hub for content: uploads by LFS and by commit, and files."""

import base64
import functools
import hashlib
import json
import threading
from pathlib import Path
from typing import Any

from tests.hub_http import Answer
from tests.hub_pages import Pages
from tests.hub_repo import File, file_of, git_oid, is_lfs


class FilePages(Pages):
    """Pages that take and give files."""

    def preupload(self, kind: str, repo_id: str, revision: str) -> None:
        asked = self._json()
        repo = self._repo(kind, repo_id, write="create_pr" not in self.query)
        files = repo.commits[self._commit(repo, revision)]
        modes = []
        for file in asked["files"]:
            lfs = is_lfs(file["path"], file["size"], base64.b64decode(file["sample"]))
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
            flip(place)
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
            files[path] = self.hub.keep(content, path)
        elif key == "lfsFile":
            place = self.hub.objects / value["oid"]
            if not place.exists():
                raise Answer(400, f"LFS pointer pointed to a file that does not exist: {path}")
            oid = git_oid(f"version https://git-lfs\noid sha256:{value['oid']}\nsize {place.stat().st_size}\n".encode())
            files[path] = File(place, place.stat().st_size, oid, value["oid"], True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise Answer(404, f"A file with this name doesn't exist: {path}", code="EntryNotFound")
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]

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
        stat = place.stat()
        self._file(200, known(place, (stat.st_mtime_ns, stat.st_size)), {}, place.name)


@functools.lru_cache(10_000)
def known(place: Path, _stamp: tuple[int, int]) -> File:
    """The file at `place`, which is not hashed again for each part of it that somebody asks for."""
    return file_of(place, place.name)


def flip(place: Path) -> None:
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 1
    place.write_bytes(bytes(content))


R = r"/api/(models|datasets|spaces)/([^/]+(?:/[^/]+)?)"
G = r"/(?:(models|datasets|spaces)/)?([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", FilePages.whoami),
    ("POST", "/api/repos/create", FilePages.create),
    ("DELETE", "/api/repos/delete", FilePages.delete),
    ("POST", "/api/collections", FilePages.collections),
    ("GET", "/api/collections/([^/]+/[^/]+)", FilePages.collection),
    ("POST", "/api/collections/([^/]+/[^/]+)/items", FilePages.collect),
    ("POST", "/api/validate-yaml", FilePages.validate_yaml),
    ("PUT", rf"{R}/settings", FilePages.settings),
    ("GET", rf"{R}/tree/([^/]+)(?:/(.+))?", FilePages.tree),
    ("POST", rf"{R}/paths-info/([^/]+)", FilePages.paths_info),
    ("GET", rf"{R}/refs", FilePages.refs),
    ("GET", rf"{R}/commits/([^/]+)", FilePages.log),
    ("POST", rf"{R}/branch/(.+)", FilePages.branch),
    ("DELETE", rf"{R}/branch/(.+)", FilePages.branch),
    ("POST", rf"{R}/tag/(.+)", FilePages.tag),
    ("DELETE", rf"{R}/tag/(.+)", FilePages.tag),
    ("POST", rf"{R}/preupload/([^/]+)", FilePages.preupload),
    ("POST", rf"{R}/commit/([^/]+)", FilePages.commit),
    ("GET", rf"{R}/discussions", FilePages.discussions),
    ("POST", rf"{R}/discussions", FilePages.discussions),
    ("GET", rf"{R}/discussions/(\d+)", FilePages.discussion),
    ("POST", rf"{R}/discussions/(\d+)/merge", FilePages.merge),
    ("POST", rf"{R}/discussions/(\d+)/status", FilePages.status),
    ("GET", rf"{R}/auth-check(/write)?", FilePages.auth_check),
    ("GET", r"/api/models", FilePages.models),
    ("GET", rf"{R}/revision/([^/]+)", FilePages.info),
    ("GET", r"/api/(models|datasets|spaces)/([^/]+/[^/]+)()", FilePages.info),
    ("POST", rf"{G}\.git/info/lfs/objects/batch", FilePages.lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})(?:/(\d+))?", FilePages.lfs_put),
    ("POST", r"/lfs/([0-9a-f]{64})/complete", FilePages.lfs_complete),
    ("POST", r"/lfs/([0-9a-f]{64})/verify", FilePages.lfs_verify),
    ("GET", r"/cdn/(.+)", FilePages.cdn),
    ("GET", rf"{G}/(?:resolve|raw)/([^/]+)/(.+)", FilePages.resolve),
]
