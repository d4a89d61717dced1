"""A small Hugging Face hub for one machine: enough of its endpoints to push a model and to pull it again.

Repositories are kept in memory and are gone when the server stops. Writing, and reading what is private, needs the token.

example: python scripts/hub_server.py 8008
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_local"
_LFS = (".safetensors", ".bin")


@dataclass
class Repository:
    """Commits, each with all its files, and the branches that point to them."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add files to a branch."""
        state = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        text = repr((len(self.commits), sorted((name, hashlib.sha1(data).hexdigest()) for name, data in state.items())))
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = state
        self.branches[branch] = sha
        return sha


class Hub:
    """The repositories, and the objects that were uploaded for the next commit."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []

    @contextmanager
    def serve(self, port: int = 0) -> Iterator[str]:
        """Answer requests in threads; yields the endpoint."""
        handler = type("Handler", (_Handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()


class _RefusedError(Exception):
    def __init__(self, status: int, code: str = "") -> None:
        super().__init__(code)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            for method, pattern, name in _ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method:
                    getattr(self, name)(body, **found.groupdict())
                    return
            raise _RefusedError(404)
        except _RefusedError as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.code} if refused.code else {}
            self._send(json.dumps({"error": refused.code}).encode(), refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815  (names of http.server)

    def _send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    @property
    def _endpoint(self) -> str:
        return f"http://{self.headers['Host']}"

    @property
    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _may_write(self) -> None:
        if not self._known:
            raise _RefusedError(401)

    def _repository(self, repo: str) -> Repository:
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not self._known):
            raise _RefusedError(404 if self._known else 401, "RepoNotFound")
        return found

    def _at(self, repo: str, revision: str | None) -> tuple[Repository, str]:
        found = self._repository(repo)
        sha = found.branches.get(revision or "main", revision or "")
        if sha not in found.commits:
            raise _RefusedError(404, "RevisionNotFound")
        return found, sha

    def create(self, body: bytes) -> None:
        """`POST /api/repos/create`."""
        self._may_write()
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = {"url": f"{self._endpoint}/{repo}"}
        if repo in self.hub.repositories:
            self._json(url, 409)
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[repo] = Repository(private)
        self.hub.repositories[repo].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json(url)

    def check_card(self, body: bytes) -> None:
        """`POST /api/validate-yaml`: a README.md needs a front matter."""
        good = json.loads(body)["content"].startswith("---\n")
        self._json({"errors": [] if good else [{"message": "no metadata"}], "warnings": []}, 200 if good else 400)

    def info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        """`GET /api/models/<repo>[/revision/<revision>]`."""
        found, sha = self._at(repo, revision)
        files = [{"rfilename": name} for name in found.commits[sha]]
        self._json({"id": repo, "modelId": repo, "sha": sha, "private": found.private, "tags": [], "siblings": files})

    def refs(self, body: bytes, repo: str) -> None:
        """`GET /api/models/<repo>/refs`."""
        branches = self._repository(repo).branches.items()
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches]
        self._json({"branches": listed, "tags": [], "converts": []})

    def branch(self, body: bytes, repo: str, revision: str) -> None:
        """`POST /api/models/<repo>/branch/<name>`."""
        self._may_write()
        found, sha = self._at(repo, None)
        exists = revision in found.branches
        found.branches.setdefault(revision, sha)
        self._json({}, 409 if exists else 200)

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        """`POST /api/models/<repo>/preupload/<revision>`: which files go to the large file storage."""
        self._may_write()
        self._at(repo, revision)
        names = [each["path"] for each in json.loads(body)["files"]]
        modes = [(name, "lfs" if name.endswith(_LFS) else "regular") for name in names]
        self._json({"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes]})

    def batch(self, body: bytes, repo: str) -> None:
        """`POST /<repo>.git/info/lfs/objects/batch`: where to upload large files."""
        self._may_write()
        objects = [
            {**each, "actions": {"upload": {"href": f"{self._endpoint}/objects/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        """`PUT /objects/<sha256>`."""
        if hashlib.sha256(body).hexdigest() != oid:
            raise _RefusedError(400)
        self.hub.objects[oid] = body
        self._send(b"")

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        """`POST /api/models/<repo>/commit/<revision>`: newline-delimited JSON."""
        self._may_write()
        found, _ = self._at(repo, revision)
        files = {}
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        sha = found.commit(files, revision)
        self._json({"commitUrl": f"{self._endpoint}/{repo}/commit/{sha}", "commitOid": sha})

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        """`GET` or `HEAD /<repo>/resolve/<revision>/<file>`."""
        found, sha = self._at(repo, revision)
        data = found.commits[sha].get(name)
        if data is None:
            raise _RefusedError(404, "EntryNotFound")
        self._send(data, headers={"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'})


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = (
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "check_card"),
    ("GET", rf"/api/models/{_REPO}/refs", "refs"),
    ("GET", rf"/api/models/{_REPO}(?:/revision/(?P<revision>.+))?", "info"),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<revision>.+)", "branch"),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>.+)", "commit"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/objects/(?P<oid>[0-9a-f]{64})", "upload"),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", "resolve"),
)


if __name__ == "__main__":
    with Hub().serve(int(sys.argv[1]) if len(sys.argv) > 1 else 8008) as address:
        print(f"export HF_ENDPOINT={address} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1", flush=True)
        threading.Event().wait()
