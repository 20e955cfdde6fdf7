"""How the tests' Hub speaks HTTP: bodies in, answers and files out, who may do what, and what goes wrong on demand."""

import base64
import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_repo import File, Repo

if TYPE_CHECKING:
    from tests.hub import Fault, Hub

PIECE = 1 << 20


class Answer(Exception):
    """An HTTP answer, raised from wherever it is known."""

    def __init__(self, status: int, body: Any = None, code: str | None = None, **headers: str) -> None:
        self.status, self.body = status, body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if code:
            self.headers["X-Error-Code"] = code
        if status >= 400 and isinstance(body, str):
            self.headers["X-Error-Message"], self.body = body, {"error": body}


class Sent(ConnectionError):
    """A file was sent in full: nothing else is to be."""


class Handler(BaseHTTPRequestHandler):
    hub: "Hub"
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for the acknowledgement of its headers
    routes: list[tuple[str, str, Any]]
    fault: "Fault | None" = None

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
        except Sent:
            pass
        except ConnectionError:
            self._drop()
        return None

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _route(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        for method, pattern, function in self.routes:
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
        if repo_id in self.hub.renamed:
            raise Answer(307, None, Location=self.path.replace(repo_id, self.hub.renamed[repo_id], 1))
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

    # Files.

    def _file(self, status: int, file: File, headers: dict[str, str], path: str) -> None:
        """Send a file, or the part of it that was asked for; 302 sends the client to the page of large files."""
        if status == 302:
            # Another host name than the API's, as on the real Hub: the client stops there and reads the headers.
            headers["Location"] = f"{self.hub.cdn}/cdn/{base64.urlsafe_b64encode(str(file.place).encode()).decode()}"
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
        raise Sent
