"""The pages of the tests' Hub for repos: accounts, settings, listings, branches, tags and pull requests."""

import json
from typing import Any
from urllib.parse import parse_qs

from tests.hub_http import Answer, Handler
from tests.hub_repo import Repo, entry, front_matter, front_matter_of

LICENCES = ["mit", "apache-2.0", "llama3.2", "other", *(f"another-{number}" for number in range(60))]
DATE = "2026-01-01T00:00:00.000Z"


def as_list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value] if value else []


class Pages(Handler):
    """Pages that tell of repos and change them."""

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
            attributes = self.hub.keep(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", ".gitattributes")
            repo.commit("refs/heads/main", {".gitattributes": attributes}, "initial commit")
            self.hub.repos[f"{kind}s", repo_id] = repo
        raise Answer(200, {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id, "private": repo.private})

    def collections(self) -> None:
        """Make one; a title that its owner has already is answered with 409 and its slug."""
        asked, who = self._json(), self._who()
        owner, title = asked["namespace"], asked["title"]
        if who is None or not self._may(f"{owner}/"):
            raise Answer(403, f"You don't have the rights to create a collection under the namespace {owner}")
        if len(title) > 59:
            raise Answer(400, "Title must be at most 59 characters")
        with self.hub.lock:
            for slug, one in self.hub.collections.items():
                if (one["owner"]["name"], one["title"]) == (owner, title):
                    raise Answer(409, {"error": "You already have a collection with this title", "slug": slug})
            number = f"{len(self.hub.collections):024x}"
            slug = f"{owner}/{'-'.join(title.lower().split())}-{number}"
            made = {
                "slug": slug,
                "title": title,
                "owner": {"name": owner},
                "items": [],
                "lastUpdated": DATE,
                "position": 0,
            }
            made |= {
                "private": asked["private"],
                "theme": "blue",
                "upvotes": 0,
                "description": asked.get("description"),
            }
            self.hub.collections[slug] = made
        raise Answer(200, made)

    def collection(self, slug: str) -> None:
        raise Answer(200, self._collection(slug))

    def collect(self, slug: str) -> None:
        """Put an item into one; what is there already is answered with 409."""
        item = self._json()["item"]
        found = self._collection(slug)
        if not self._may(slug):
            raise Answer(403, "You don't have the rights to change this collection")
        self._repo(f"{item['type']}s", item["id"])
        if any((one["type"], one["id"]) == (item["type"], item["id"]) for one in found["items"]):
            raise Answer(409, "Item is already in the collection")
        place = len(found["items"])
        found["items"].append({"_id": f"{place:024x}", "id": item["id"], "type": item["type"], "position": place})
        raise Answer(200, found)

    def _collection(self, slug: str) -> dict[str, Any]:
        found = self.hub.collections.get(slug)
        if found is None or (found["private"] and not self._may(slug)):
            raise Answer(404, "Collection not found")
        return found

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
                "lastModified": repo.dates[commit].isoformat(timespec="milliseconds").replace("+00:00", "Z"),
                "createdAt": DATE,
                "siblings": siblings,
            }
            | ({"cardData": front_matter(repo.commits[commit])} if "README.md" in repo.commits[commit] else {}),
        )

    def models(self) -> None:
        """A page of ten, so that there is a second one."""
        [author] = self.query["author"]
        start = int(self.query.get("cursor", ["0"])[0])
        who = self._who()
        with self.hub.lock:
            seen = [
                repo
                for (kind, name), repo in sorted(self.hub.repos.items())
                if kind == "models" and name.startswith(f"{author}/")
            ]
        seen = [repo for repo in seen if not repo.private or (who and self._may(repo.id, write=False))]
        page = [
            {
                "id": repo.id,
                "modelId": repo.id,
                "sha": repo.at("main"),
                "lastModified": repo.dates[str(repo.at("main"))]
                .isoformat(timespec="milliseconds")
                .replace("+00:00", "Z"),
            }
            for repo in seen[start : start + 10]
        ]
        more = f'<{self.hub.url}/api/models?author={author}&cursor={start + 10}>; rel="next"'
        raise Answer(200, page, **({"Link": more} if start + 10 < len(seen) else {}))

    def tree(self, kind: str, repo_id: str, revision: str, folder: str) -> None:
        repo = self._repo(kind, repo_id)
        files = repo.commits[self._commit(repo, revision)]
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        under = f"{folder}/" if folder else ""
        entries = {path: entry(path, file) for path, file in files.items() if path.startswith(under)}
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
        found = [entry(path, files[path]) for path in asked if path in files]
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
        front = front_matter_of(self._json()["content"])
        licences, languages = (as_list(front.get(key)) for key in ("license", "language"))
        errors = [
            f'"license" must be one of [{", ".join(LICENCES)}]' for licence in licences if licence not in LICENCES
        ] + [f"'{language}' is no language code:\n two letters or three" for language in languages if len(language) > 3]
        raise Answer(400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []})

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
