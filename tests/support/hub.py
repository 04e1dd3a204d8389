"""A model hub on the loopback address: the routes that huggingface_hub asks for, over folders of this machine.

`with Hub({"someone/model": folder}) as hub:` serves `folder` at `hub.url`; `hub.requests` lists (method, path) and
`hub.sent[path]` counts the bytes of every file that left. A repository can be private or gated (then `TOKEN` opens it); what is
pushed lies in `hub.repositories[name].folder`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40
TOKEN = "hf_secret"


@dataclass
class Repository:
    folder: Path
    revision: str = "main"
    private: bool = False
    gated: bool = False
    commits: list[str] = field(default_factory=list)  # their messages

    @property
    def sha(self) -> str:
        return f"{len(self.commits):x}".rjust(40, "b") if self.commits else COMMIT

    def at(self, revision: str) -> bool:
        return revision in (self.revision, self.sha)

    def files(self) -> list[Path]:
        return sorted(p for p in self.folder.rglob("*") if p.is_file())

    def name(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()


class Hub:
    """Args: repositories, by id; where: a folder for new ones; cut: files whose first transfer breaks off half-way."""

    def __init__(
        self, repositories: dict[str, Repository | Path], where: Path | None = None, cut: tuple[str, ...] = ()
    ):
        self.repositories = {n: r if isinstance(r, Repository) else Repository(r) for n, r in repositories.items()}
        self.where, self.cut, self.blobs = where, set(cut), dict[str, bytes]()
        self.requests: list[tuple[str, str]] = []
        self.sent: Counter[str] = Counter()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def asked(self, suffix: str) -> bool:
        """Whether the content of a file was asked for."""
        return any(method == "GET" and path.endswith(suffix) for method, path in self.requests)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    self.body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            hub.requests.append((self.command, path))
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if path == "/api/whoami-v2":
                return self.say({"name": "me", "type": "user", "orgs": []}) if known else self.refuse(401, "")
            if path == "/api/validate-yaml":
                return self.say({"errors": [], "warnings": []})
            if path.startswith("/blobs/"):
                hub.blobs[path.removeprefix("/blobs/")] = self.body
                return self.say({})
            if path == "/api/repos/create":
                return self.create() if known else self.refuse(401, "")
            parts = path.removeprefix("/api/models").strip("/").split("/")
            name = "/".join(parts[:2]).removesuffix(".git")
            repository = hub.repositories.get(name)
            if repository is None or (repository.private and not known):
                return self.refuse(404 if known else 401, "RepoNotFound")
            if path.startswith("/api/models") or path.endswith("/objects/batch"):
                return self.api(repository, name, parts[2:], known)
            if repository.gated and not known:
                return self.refuse(403, "GatedRepo")
            if len(parts) >= 5 and parts[2] == "resolve":
                if not repository.at(parts[3]):
                    return self.refuse(404, "RevisionNotFound")
                file = repository.folder.joinpath(*parts[4:])
                return self.file(file, repository) if file.is_file() else self.refuse(404, "EntryNotFound")
            self.refuse(404, "EntryNotFound")

        def create(self) -> None:
            asked = json.loads(self.body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in hub.repositories:
                return self.refuse(409, "", {"url": f"{hub.url}/{name}"})
            folder = hub.where / name.replace("/", "--")
            folder.mkdir(parents=True)
            hub.repositories[name] = Repository(
                folder, private=asked.get("visibility") == "private" or bool(asked.get("private"))
            )
            self.say({"url": f"{hub.url}/{name}", "name": name, "id": name})

        def api(self, repository: Repository, name: str, rest: list[str], known: bool) -> None:
            kind, revision = (rest or ["revision"])[0], (rest[1:] or [repository.revision])[0]
            if self.command == "POST" and not known:
                return self.refuse(401, "")
            if kind in ("revision", "tree") and not repository.at(revision):
                return self.refuse(404, "RevisionNotFound")
            if kind == "revision":
                files = [
                    {"rfilename": repository.name(p), "size": p.stat().st_size, "blobId": "0"}
                    for p in repository.files()
                ]
                facts = {"id": name, "sha": repository.sha, "private": repository.private, "siblings": files}
                return self.say(facts)
            if kind == "tree":
                entries = [
                    {"type": "file", "path": repository.name(p), "size": p.stat().st_size, "oid": "0" * 40}
                    for p in repository.files()
                ]
                return self.say(entries)
            if kind == "preupload":
                files = [
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for f in json.loads(self.body)["files"]
                ]
                return self.say({"files": files})
            if kind == "info":  # git's large files
                objects = [
                    {**o, "actions": {"upload": {"href": f"{hub.url}/blobs/{o['oid']}", "header": {}}}}
                    for o in json.loads(self.body)["objects"]
                ]
                return self.say({"transfer": "basic", "objects": objects})
            if kind == "commit":
                return self.commit(repository, name)
            self.refuse(404, "")

        def commit(self, repository: Repository, name: str) -> None:
            for line in self.body.splitlines():
                said = json.loads(line)
                kind, value = said["key"], said["value"]
                if kind == "header":
                    repository.commits.append(value["summary"])
                elif kind == "file":
                    place = repository.folder / value["path"]
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(base64.b64decode(value["content"]))
                elif kind == "lfsFile":
                    content = hub.blobs[value["oid"]]
                    assert hashlib.sha256(content).hexdigest() == value["oid"]
                    place = repository.folder / value["path"]
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(content)
                elif kind == "deletedFile":
                    (repository.folder / value["path"]).unlink()
            self.say(
                {
                    "commitUrl": f"{hub.url}/{name}/commit/{repository.sha}",
                    "commitOid": repository.sha,
                    "hookOutput": "",
                }
            )

        def file(self, file: Path, repository: Repository) -> None:
            content = file.read_bytes()
            whole, start, status = len(content), 0, 200
            etag = hashlib.sha256(content).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": repository.sha, "Accept-Ranges": "bytes"}
            wanted = self.headers.get("Range", "").removeprefix("bytes=")
            if wanted:
                first, _, last = wanted.partition("-")
                start, status = int(first), 206
                content = content[start : int(last) + 1 if last else None]
                headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{whole}"
            broken = self.command == "GET" and file.name in hub.cut
            sent = len(content) // 2 if broken else len(content)
            self.reply(content, status, headers, sent)
            if self.command == "GET":
                hub.sent[file.name] += sent
            if broken:
                hub.cut.discard(file.name)
                self.close_connection = True

        def say(self, value: object) -> None:
            self.reply(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

        def refuse(self, status: int, code: str, value: object = None) -> None:
            headers = {"Content-Type": "application/json", **({"X-Error-Code": code} if code else {})}
            self.reply(json.dumps(value or {"error": code or "no"}).encode(), status, headers)

        def reply(self, content: bytes, status: int, headers: dict[str, str], sent: int | None = None) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[:sent])

    return Handler


def copied(folder: Path, to: Path) -> Path:
    """Return a copy of a folder, for a repository that a test writes to."""
    return Path(shutil.copytree(folder, to))
