"""A server with the interface of the Hugging Face hub for `snapshot_download`.

It serves one repository from a folder.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.support.servers import answering

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub_of(folder: Path, name: str, fetched: list[str], revisions: tuple[str, ...] = ("main",)) -> Iterator[str]:
    """Serve the files of `folder` as the repository `name`.

    Yields the endpoint, and appends each sent file to `fetched`.
    """
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if not path.startswith((f"/api/models/{name}", f"/{name}/resolve/")):
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif path.startswith("/api/"):
                revision = unquote(path.split("/")[6]) if path.count("/") > 5 else "main"
                if revision not in (*revisions, COMMIT):
                    self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                elif "/tree/" in path:
                    entries = [
                        {"type": "file", "path": file, "oid": self.etag(file), "size": (folder / file).stat().st_size}
                        for file in files
                    ]
                    self.answer(200, json.dumps(entries).encode())
                else:
                    found = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
                    self.answer(200, json.dumps(found).encode())
            else:
                file = unquote(path.split(f"/{name}/resolve/")[1].split("/", 1)[1])
                if self.command == "GET":
                    fetched.append(file)
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{self.etag(file)}"'}
                self.answer(200, (folder / file).read_bytes(), headers)

        def etag(self, file: str) -> str:
            return hashlib.sha1((folder / file).read_bytes(), usedforsecurity=False).hexdigest()

        def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with answering(Handler) as address:
        yield address
