"""A stand-in for the Hub on this machine: as much of its HTTP API as uploads and downloads of models need.

Repositories live in memory. Files that git would keep in LFS are uploaded by themselves and become part of a
repository with the commit that names them, as on the Hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

TOKEN = "hf_writer"


@dataclass
class Repository:
    """Files by path, of each commit; branches by name."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.branches.get(revision, revision))


class Hub(ThreadingHTTPServer):
    """The server; `url` is its address.

    Attributes:
        stalled: Set once half of an upload has arrived, if `stalls`; the rest is then never asked for.
        cuts: Downloads that still are to break off in the middle.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.stalls = False
        self.stalled = threading.Event()
        self.cuts = 0

    @contextmanager
    def running(self) -> Iterator[Hub]:
        thread = threading.Thread(target=self.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers one request; a route is a method, a pattern and the name of the function that answers."""

    protocol_version = "HTTP/1.1"
    server: Hub
    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "accept"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", "branch"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/([0-9a-f]+)", "upload"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", "tree"),
        ("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def handle_request(self) -> None:
        path = urlparse(self.path).path
        self.server.requests.append(f"{self.command} {path}")
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                getattr(self, name)(*(unquote(part) if part else None for part in match.groups()))
                return
        self.fail(404, "NoRoute")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815 - http.server looks for these names

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def reply(self, value: object = None, status: int = 200, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value or {}).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.cuts and self.command == "GET" and "resolve" in self.path and len(data) > 1000:
            self.server.cuts -= 1
            self.close_connection = True
            data = data[: len(data) // 2]
        self.wfile.write(data)

    def fail(self, status: int, code: str) -> None:
        self.body()
        self.reply({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    @property
    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, name: str, *, write: bool = False) -> Repository | None:
        """The repository, if it exists and the sender may see it; else the answer is given."""
        found = self.server.repositories.get(name)
        if found is None or (found.private and not self.authorized):
            self.fail(404 if self.authorized else 401, "RepoNotFound")
            return None
        if write and not self.authorized:
            self.fail(401, "Unauthorized")
            return None
        return found

    # ------------------------------------------------------------------------------------- writing

    def create(self) -> None:
        if not self.authorized:
            self.fail(401, "Unauthorized")
            return
        request = json.loads(self.body())
        name = f"{request['organization'] or 'user'}/{request['name']}"
        status = 409 if name in self.server.repositories else 200
        if status == 200:
            repository = Repository(request.get("visibility") == "private" or request.get("private", False))
            repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
            self.server.repositories[name] = repository
        self.reply({"url": f"{self.server.url}/{name}", "name": name}, status)

    def accept(self) -> None:
        self.body()
        self.reply()

    def branch(self, name: str, branch: str) -> None:
        repository = self.repository(name, write=True)
        if repository is None:
            return
        self.body()
        status = 409 if branch in repository.branches else 200
        repository.branches.setdefault(branch, repository.branches["main"])
        self.reply(status=status)

    def preupload(self, name: str, _: str) -> None:
        if self.repository(name, write=True) is None:
            return
        paths = [file["path"] for file in json.loads(self.body())["files"]]
        modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
        self.reply({"files": [{"path": p, "uploadMode": modes[p], "shouldIgnore": False} for p in paths]})

    def batch(self, name: str) -> None:
        if self.repository(name, write=True) is None:
            return
        objects = json.loads(self.body())["objects"]
        for blob in objects:
            if blob["oid"] not in self.server.blobs:
                blob["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{blob['oid']}"}}
        self.reply({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if self.server.stalls:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.close_connection = True
            self.server.stalled.set()
            self.rfile.read()  # ends when the sender does
            return
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            self.reply({"error": "checksum"}, 400)
            return
        self.server.blobs[oid] = data
        self.reply()

    def commit(self, name: str, branch: str) -> None:
        repository = self.repository(name, write=True)
        if repository is None:
            return
        files = dict(repository.files(branch) or {})
        for line in self.body().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    self.fail(400, "MissingBlob")
                    return
                files[value["path"]] = self.server.blobs[value["oid"]]
        oid = repository.commit(branch, files)
        url = f"{self.server.url}/{name}/commit/{oid}"
        self.reply({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    # ------------------------------------------------------------------------------------- reading

    def files_at(self, name: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        repository = self.repository(name)
        if repository is None:
            return None
        revision = revision or "main"
        files = repository.files(revision)
        if files is None:
            self.fail(404, "RevisionNotFound")
            return None
        return repository.branches.get(revision, revision), files

    def info(self, name: str, revision: str | None = None) -> None:
        found = self.files_at(name, revision)
        if found is not None:
            siblings = [{"rfilename": path} for path in found[1]]
            self.reply({"id": name, "modelId": name, "sha": found[0], "siblings": siblings, "tags": []})

    def tree(self, name: str, revision: str) -> None:
        found = self.files_at(name, revision)
        if found is not None:
            entries = found[1].items()
            self.reply(
                [{"type": "file", "path": p, "size": len(data), "oid": etag(data)} for p, data in entries]
            )

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self.files_at(name, revision)
        if found is None:
            return
        commit, files = found
        if path not in files:
            self.fail(404, "EntryNotFound")
            return
        data, first = files[path], 0
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first = int(part[1])
        headers = {"ETag": f'"{etag(data)}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if part:
            headers["Content_Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self.reply(data[first:], 206 if part else 200, **headers)


def etag(data: bytes) -> str:
    """What tells one content from another: git's name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
