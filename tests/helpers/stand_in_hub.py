"""A hub of models in a thread: the part of its HTTP interface that huggingface_hub uses to fetch and to commit.

Repositories are dictionaries of files, a commit is a new dictionary. Large files go through LFS, as safetensors do there.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        self.messages.append(message)
        content = json.dumps([len(self.messages), sorted((name, _git_oid(data)) for name, data in files.items())])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def head(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]]


class StandInHub:
    """`hub.repositories["org/name"].head()` is what was pushed; `hub.requests` is what was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.token: str | None = None  # the one that may write, if any is needed
        self.refused: set[str] = set()  # parts of the paths that are not given out
        self.status = 0  # answer everything with it
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commit these files, in place of all others; the commit's name."""
        return self.repositories.setdefault(name, Repository()).commit(files, branch)

    def downloads(self) -> list[str]:
        """The files whose content was asked for."""
        return [request.rpartition("/")[2] for request in self.requests if request.startswith("GET") and "/resolve/" in request]


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet; apart, each answer would wait for an acknowledgement

    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/models/([^/]+/[^/]+)", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", "tree"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "branch"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/large/([0-9a-f]{64})", "store"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def handle_one_method(self) -> None:
        path = urlsplit(self.path).path
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.status:
            return self.answer(self.hub.status)
        if self.command == "GET" and any(part in path for part in self.hub.refused):
            return self.answer(403, error_message="not now")
        method = "GET" if self.command == "HEAD" else self.command
        writes = method != "GET" and not path.startswith(("/large/", "/api/validate-yaml"))
        if writes and self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.answer(401, error_message="Invalid credentials in Authorization header")
        for verb, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and verb == method:
                return getattr(self, name)(*(unquote(part) for part in match.groups()))
        return self.answer(404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one_method

    def log_message(self, *arguments) -> None:
        pass

    def answer(self, status: int, content=None, error_code: str = "", error_message: str = "", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        given = {"X-Error-Code": error_code, "X-Error-Message": error_message}
        for name, value in {"Content-Length": str(len(data)), **given, **headers}.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def find(self, name: str, revision: str = "main") -> tuple[Repository, str] | None:
        """The repository and its commit; answers where there is none."""
        repository = self.hub.repositories.get(name)
        if repository is None:
            self.answer(404, error_code="RepoNotFound")
        elif repository.gated:
            self.answer(403, error_code="GatedRepo")
        elif (sha := repository.branches.get(revision, revision)) not in repository.commits:
            self.answer(404, error_code="RevisionNotFound")
        else:
            return repository, sha
        return None

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        known = name in self.hub.repositories
        if not known:
            private = asked.get("visibility") == "private" or asked.get("private") is True
            self.hub.repositories[name] = Repository(private)
            self.hub.repositories[name].commit({".gitattributes": b""})
        self.answer(409 if known else 200, {"url": f"{self.hub.url}/{name}"})

    def validate(self) -> None:
        match = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        try:
            fine = match is None or isinstance(yaml.safe_load(match.group(1)), dict)
        except yaml.YAMLError:
            fine = False
        self.answer(200 if fine else 400, {"errors": [] if fine else [{"message": "not YAML"}], "warnings": []})

    def info(self, name: str, revision: str = "main") -> None:
        if found := self.find(name, revision):
            repository, sha = found
            siblings = [{"rfilename": file} for file in repository.commits[sha]]
            self.answer(200, {"id": name, "sha": sha, "private": repository.private, "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        if found := self.find(name, revision):
            files = found[0].commits[found[1]]
            self.answer(200, [_entry(file, data) for file, data in files.items()])

    def branch(self, name: str, branch: str) -> None:
        if found := self.find(name):
            repository, sha = found
            known = branch in repository.branches
            repository.branches.setdefault(branch, sha)
            self.answer(409 if known else 200, {})

    def preupload(self, name: str, revision: str) -> None:
        if found := self.find(name, revision):
            there = found[0].commits[found[1]]
            asked = [file["path"] for file in json.loads(self.body)["files"]]
            files = [
                {
                    "path": file,
                    "uploadMode": "lfs" if _is_large(file) else "regular",
                    "shouldIgnore": False,
                    "oid": _etag(file, there[file]) if file in there else None,
                }
                for file in asked
            ]
            self.answer(200, {"files": files})

    def batch(self, name: str) -> None:
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/large/{asked['oid']}"}}
            objects.append({**asked, **({} if asked["oid"] in self.hub.large else {"actions": upload})})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.large[oid] = self.body
        self.answer(200)

    def commit(self, name: str, branch: str) -> None:
        if found := self.find(name, branch):
            repository, sha = found
            files, message = dict(repository.commits[sha]), ""
            for line in self.body.splitlines():
                key, value = (json.loads(line)[part] for part in ("key", "value"))
                if key == "header":
                    message = value["summary"]
                elif key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    files[value["path"]] = self.hub.large[value["oid"]]
                elif key == "deletedFile":
                    del files[value["path"]]
            sha = repository.commit(files, branch, message)
            self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def resolve(self, name: str, revision: str, file: str) -> None:
        if found := self.find(name, revision):
            repository, sha = found
            data = repository.commits[sha].get(file)
            if data is None:
                self.answer(404, error_code="EntryNotFound", X_Repo_Commit=sha)
            else:
                self.answer(200, data, X_Repo_Commit=sha, ETag=f'"{_etag(file, data)}"')


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def _entry(name: str, data: bytes) -> dict:
    """A file as the tree lists it."""
    if not _is_large(name):
        return {"type": "file", "path": name, "size": len(data), "oid": _git_oid(data)}
    digest = hashlib.sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(data)}\n".encode()
    large = {"oid": digest, "size": len(data), "pointerSize": len(pointer)}
    return {"type": "file", "path": name, "size": len(data), "oid": _git_oid(pointer), "lfs": large}


def _etag(name: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if _is_large(name) else _git_oid(data)


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
