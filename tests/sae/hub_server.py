"""A stand-in for the Hugging Face Hub, which answers its client as the Hub does.

Repositories of models with commits, branches, tags; who may see and write them; files in git or, as
the Hub has arrays, in a large file storage of another address, whose connections can be cut.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".safetensors", ".npz", ".pt", ".png")
BLOCK = 1 << 12


@dataclass
class Repository:
    """Commits are `{path: content}`; branches and tags name them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        """A new state of all files of a branch."""
        text = f"{len(self.commits)} {sorted(files)}"
        name = hashlib.sha1(text.encode()).hexdigest()
        self.commits[name], self.branches[branch] = dict(files), name
        self.messages.append(message)
        return name

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, a tag or a commit's own name."""
        known = {**self.branches, **self.tags, **{name: name for name in self.commits}}
        return known.get(revision)

    @property
    def files(self) -> dict[str, bytes]:
        """Those of the branch `main`."""
        return self.commits[self.branches["main"]]


class Hub:
    """`repositories` by name, `tokens` with their users, and what was `asked`.

    With `cut_after` the connection of each download of a large file breaks after so many bytes;
    `cuts` says how often. `status` is what every request gets where it is not None.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens = {"hf_owner": "user", "hf_reader": "other"}
        self.read_only: set[str] = set()
        self.asked: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.agents: set[str] = set()
        self.cut_after: int | None = None
        self.cuts = 0
        self.status: int | None = None
        self.storage_is_closed = False
        self.stored: dict[str, bytes] = {}
        self.connections: list[socket.socket] = []
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        """The address, for `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def storage(self) -> str:
        """The address of large files, of another host, as the Hub's is."""
        return f"http://localhost:{self.server.server_port}/storage"

    def add(self, name: str, files: dict[str, bytes] | None = None, **options) -> Repository:
        """A repository with one commit."""
        found = self.repositories[name] = Repository(**options)
        found.commit(files or {".gitattributes": b""})
        return found

    def close(self) -> None:
        """Stop answering, as where there is no network."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Refused(Exception):
    """An answer that is an error, with the headers by which the client tells errors apart."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = 1 << 16, True

    def setup(self) -> None:
        super().setup()
        self.hub.connections.append(self.connection)

    def do_GET(self) -> None:
        self.answer("GET")

    do_HEAD = do_POST = do_PUT = lambda self: self.answer(self.command)

    def log_message(self, *arguments) -> None:
        pass

    def answer(self, method: str) -> None:
        self.hub.agents.add(self.headers.get("User-Agent", ""))
        self.path_asked = unquote(urlsplit(self.path).path)
        # The branch or tag of an address is quoted once more, so that it is one part of the path.
        self.hub.asked[f"{method if method != 'HEAD' else 'GET'} {self.path_asked}"] += 1
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or self.chunked()
        try:
            if self.hub.status is not None:
                raise Refused(self.hub.status, "out of order")
            for pattern, verb, name in ROUTES:
                match = re.fullmatch(pattern, self.path_asked)
                if match and verb in (method, "GET" if method == "HEAD" else method):
                    getattr(self, name)(body, *match.groups())
                    return
            raise Refused(404, f"no such address: {method} {self.path_asked}")
        except Refused as error:
            headers = {"X-Error-Message": error.message}
            headers |= {"X-Error-Code": error.code} if error.code else {}
            self.send({"error": error.message}, error.status, headers)

    def chunked(self) -> bytes:
        """A body that is sent in pieces, as commits are."""
        found = []
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().strip(), 16):
                found.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        return b"".join(found)

    def send(self, content, status: int = 200, headers=None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in self.hub.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def repository(self, name: str, write: bool = False) -> Repository:
        """A repository that the user may see; one that may not be seen is as one that is not."""
        user, found = self.user(), self.hub.repositories.get(name)
        owner = user == name.partition("/")[0]
        if found is None or (found.private and not owner):
            if user is None:
                raise Refused(401, "Invalid username or password.")
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write:
            self.check_write(name)
        return found

    def check_write(self, name: str) -> None:
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if user != name.partition("/")[0] or user in self.hub.read_only:
            raise Refused(403, "You don't have the rights to write to this namespace")

    def commit_of(self, found: Repository, revision: str | None) -> str:
        name = found.resolve(revision or "main")
        if name is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return name

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        found = self.repository(name)
        commit = self.commit_of(found, revision)
        self.send(
            {
                "id": name, "modelId": name, "sha": commit, "private": found.private,
                "gated": "manual" if found.gated else False, "tags": [], "downloads": 0, "likes": 0,
                "siblings": [{"rfilename": path} for path in found.commits[commit]],
            }
        )  # fmt: skip

    def tree(self, body: bytes, name: str, revision: str) -> None:
        found = self.repository(name)
        files = found.commits[self.commit_of(found, revision)]
        self.send([{"type": "file", "path": p, **described(p, c)} for p, c in files.items()])

    def refs(self, body: bytes, name: str) -> None:
        found = self.repository(name)
        kinds = {"branches": ("heads", found.branches), "tags": ("tags", found.tags)}
        self.send(
            {
                kind: [
                    {"name": n, "ref": f"refs/{where}/{n}", "targetCommit": commit}
                    for n, commit in names.items()
                ]
                for kind, (where, names) in kinds.items()
            }
            | {"converts": []}
        )

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or self.user()}/{asked['name']}"
        self.check_write(name)
        answer = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repositories:
            self.send({**answer, "error": "You already created this model repo"}, 409)
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.add(name, private=private)
        self.send(answer)

    def branch(self, body: bytes, name: str, branch: str) -> None:
        found = self.repository(name, write=True)
        if branch in found.branches:
            raise Refused(409, "Reference already exists")
        found.branches[branch] = found.branches["main"]
        self.send({}, 201)

    def validate(self, body: bytes) -> None:
        front = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        try:
            values = yaml.safe_load(front[1]) if front else None
        except yaml.YAMLError as error:
            self.send({"errors": [{"message": str(error)}], "warnings": []}, 400)
            return
        missing = (
            [] if isinstance(values, dict) else [{"message": "empty or missing yaml metadata"}]
        )
        self.send({"errors": [], "warnings": missing})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        found = self.repository(name, write=True)
        files = found.commits[self.commit_of(found, revision)]
        self.send(
            {
                "files": [
                    {
                        "path": file["path"], "shouldIgnore": False,
                        "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                        "oid": described(file["path"], files[file["path"]])["oid"]
                        if file["path"] in files else None,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        )  # fmt: skip

    def batch(self, body: bytes, name: str) -> None:
        self.repository(name, write=True)
        objects = [
            {**asked, "actions": {"upload": {"href": f"{self.hub.storage}/{asked['oid']}"}}}
            if asked["oid"] not in self.hub.stored
            else asked
            for asked in json.loads(body)["objects"]
        ]
        self.send({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, name: str) -> None:
        if self.hub.storage_is_closed:
            raise Refused(403, "the storage is closed")
        if hashlib.sha256(body).hexdigest() != name:
            raise Refused(400, "other content than was announced")
        self.hub.stored[name] = body
        self.send(b"")

    def commit(self, body: bytes, name: str, branch: str) -> None:
        found = self.repository(name, write=True)
        files = dict(found.commits[self.commit_of(found, branch)])
        message = ""
        for line in body.splitlines():
            change = json.loads(line)
            value = change["value"]
            if change["key"] == "header":
                message = value["summary"]
            elif change["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif change["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, f"unknown change {change['key']}")
        oid = found.commit(files, branch, message)
        url = f"{self.hub.url}/{name}/commit/{oid}"
        self.send({"success": True, "commitOid": oid, "commitUrl": url})

    def file(self, body: bytes, name: str, revision: str, path: str) -> None:
        found = self.repository(name)
        commit = self.commit_of(found, revision)
        if found.gated and self.user() != name.partition("/")[0]:
            status = 401 if self.user() is None else 403
            raise Refused(status, f"Access to model {name} is restricted.", "GatedRepo")
        content = found.commits[commit].get(path)
        if content is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        known, headers = described(path, content), {"X-Repo-Commit": commit}
        if not path.endswith(LARGE):
            self.send(content, headers={**headers, "ETag": f'"{known["oid"]}"'})
            return
        oid = known["lfs"]["oid"]
        self.hub.stored[oid] = content
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        self.send(b"", 302, {**headers, "Location": f"{self.hub.storage}/{oid}"})

    def stored(self, body: bytes, name: str) -> None:
        """A large file or the rest of one, to the end or to where the connection is cut."""
        content, start, headers = self.hub.stored[name], 0, {}
        if asked := self.headers.get("Range"):
            self.hub.ranges.append(asked)
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        rest = content[start:]
        self.send_response(206 if start else 200)
        for key, value in {
            "Content-Length": str(len(rest)),
            "ETag": f'"{name}"',
            **headers,
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cut_after is not None and len(rest) > self.hub.cut_after:
            self.hub.cuts += 1
            rest, self.close_connection = rest[: self.hub.cut_after], True
        for i in range(0, len(rest), BLOCK):
            self.wfile.write(rest[i : i + BLOCK])


def described(path: str, content: bytes) -> dict:
    """Size and name of a content, as git has it or the storage of large files."""
    size = len(content)
    if path.endswith(LARGE):
        oid = hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n"
        blob = hashlib.sha1(f"blob {len(pointer)}\0{pointer}".encode()).hexdigest()
        return {"size": size, "oid": oid, "blob": blob} | {
            "lfs": {"oid": oid, "size": size, "pointerSize": len(pointer)}
        }
    return {"size": size, "oid": hashlib.sha1(b"blob %d\0" % size + content).hexdigest()}


REPOSITORY = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"/api/repos/create", "POST", "create"),
    (r"/api/validate-yaml", "POST", "validate"),
    (rf"/api/models/{REPOSITORY}/revision/(.+)", "GET", "info"),
    (rf"/api/models/{REPOSITORY}/tree/([^/]+)", "GET", "tree"),
    (rf"/api/models/{REPOSITORY}/refs", "GET", "refs"),
    (rf"/api/models/{REPOSITORY}/branch/(.+)", "POST", "branch"),
    (rf"/api/models/{REPOSITORY}/preupload/(.+)", "POST", "preupload"),
    (rf"/api/models/{REPOSITORY}/commit/(.+)", "POST", "commit"),
    (rf"/api/models/{REPOSITORY}", "GET", "info"),
    (rf"/{REPOSITORY}\.git/info/lfs/objects/batch", "POST", "batch"),
    (rf"/{REPOSITORY}/resolve/([^/]+)/(.+)", "GET", "file"),
    (r"/storage/(\w+)", "PUT", "store"),
    (r"/storage/(\w+)", "GET", "stored"),
]  # fmt: skip
