"""HTTP servers: one serves a folder, another one counts its requests and fails as a test demands."""

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from jitscale.data.manifest import ShardRecord

PATIENCE = 20  # in seconds; a test that waits longer hangs


@contextmanager
def answering(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Answer requests with `handler`; yields the server's URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def serving(folder: Path, fetched: list[str] | None = None, only_with: str = "") -> Iterator[str]:
    """Serve the files of `folder`. Yields the server's URL, and appends the path of each GET to `fetched`.

    A request is refused if neither its Authorization is `only_with` nor its path ends with `only_with`.
    """

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))  # type: ignore[arg-type]

        def do_GET(self) -> None:
            if fetched is not None:
                fetched.append(self.path)
            if only_with and self.headers["Authorization"] != only_with and not self.path.endswith(only_with):
                self.send_error(401)
                return
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with answering(Handler) as address:
        yield address


class Storage:
    """An HTTP server that counts its requests. A test can order how it answers the next requests for a path."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.gets: Counter[str] = Counter()
        self.orders: dict[str, list[str]] = {}  # path -> orders for its next requests; after them, the file is served
        self.release = threading.Event()  # ends a "hold"
        self.held = threading.Semaphore(0)  # counts the responses that wait in the middle of a "hold"
        self._lock = threading.Lock()
        storage = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                storage.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                pass  # Tests kill clients on purpose.

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.lstrip("/")
        with self._lock:
            self.gets[name] += 1
            order = self.orders[name].pop(0) if self.orders.get(name) else "serve"
        data = self.files.get(name)
        if order.isdigit() or data is None:
            request.send_response(int(order) if order.isdigit() else 404)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if order == "wrong":
            data = data[:-1] + bytes([data[-1] ^ 1])
        elif order == "short":
            data = data[:-1]
        elif order == "long":
            data += b"x"
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        half = len(data) // 2
        request.wfile.write(data[:half])
        if order == "cut":
            request.close_connection = True
            return
        if order == "hold":
            self.held.release()
            self.release.wait(PATIENCE)
        elif order == "slow":
            time.sleep(0.3)
        request.wfile.write(data[half:])

    def add(self, name: str, data: bytes) -> tuple[str, ShardRecord]:
        self.files[name] = data
        return f"{self.url}/{name}", record_of(name, data)

    def shard(self, number: int = 0, size: int = 300_000) -> tuple[str, ShardRecord]:
        """A shard of `size` bytes with incompressible content."""
        return self.add(f"shard-{number}.tar", np.random.default_rng([number, size]).bytes(size))


def record_of(name: str, data: bytes) -> ShardRecord:
    return ShardRecord(name, 3, len(data), hashlib.sha256(data).hexdigest())
