"""A model hub on the loopback address: the few routes that huggingface_hub asks for, over folders of this machine.

`with Hub({"someone/model": folder}) as hub:` serves `folder` at `hub.url`; `hub.requests` lists (method, path).
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


class Hub:
    def __init__(self, repositories: dict[str, Path], revision: str = "main") -> None:
        self.repositories, self.revision = repositories, revision
        self.requests: list[tuple[str, str]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
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

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.requests.append((self.command, path))
                for name, folder in hub.repositories.items():
                    if path in (f"/api/models/{name}", f"/api/models/{name}/revision/{hub.revision}"):
                        files = [{"rfilename": p.name} for p in sorted(folder.iterdir())]
                        return self.send(json.dumps({"id": name, "sha": COMMIT, "siblings": files}).encode(), body)
                    for revision in (hub.revision, COMMIT):
                        if path.startswith(f"/api/models/{name}/tree/{revision}"):
                            entries = [
                                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40}
                                for p in sorted(folder.iterdir())
                            ]
                            return self.send(json.dumps(entries).encode(), body)
                        file = folder / path.removeprefix(f"/{name}/resolve/{revision}/")
                        if path.startswith(f"/{name}/resolve/{revision}/") and file.is_file():
                            return self.send(file.read_bytes(), body)
                self.send(b'{"error": "Repository not found"}', body, status=404)

            def send(self, content: bytes, body: bool, status: int = 200) -> None:
                self.send_response(status)
                if status == 404:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.end_headers()
                if body:
                    self.wfile.write(content)

        return Handler
