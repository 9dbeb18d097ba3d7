"""Processes of `python COMMAND...` that need not import torch and DeepSpeed again.

These imports take nine seconds of a processor, and the tests start several hundred ranks. One process imports them,
and each rank is a fork of it: a process with its own environment, output, signals and exit code. It runs the command
as the interpreter would.

    python -m tests.support.forking SOCKET   (started by `Process`, once for all processes of pytest)
"""

import array
import atexit
import contextlib
import errno
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tests.support import ROOT

PYTHONPATH = f"{ROOT}{os.pathsep}{ROOT / 'tools'}"
# the size of a request with the command and the environment; a datagram holds at most about 200 KiB
MESSAGE_BYTES = 2**17
# Modules that a training run imports, at once or later. Modules of the project that run as `__main__` are left out.
WARM = (
    "jitscale.evaluation.requirements",
    "jitscale.training.trainer",
    "deepspeed",
    "torch._inductor.compile_fx",
    "torch._dynamo.testing",
    "torch.nn.attention.flex_attention",
    "torchmetrics",
)


class Process:
    """A fork that runs `python COMMAND...`; used like `subprocess.Popen`.

    Args:
        command: the interpreter's arguments: `-m MODULE ...`, `-c CODE ...` or `FILE ...`.
        env: the whole environment; None: that of this process.
        cwd: the working directory.
        start_new_session: the process leads a session of its own.

    `stdout` gives its standard output and its standard error.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: dict[str, str] | None = None,
        *,
        cwd: Path = ROOT,
        start_new_session: bool = False,
    ) -> None:
        self.args = list(command)
        self.returncode: int | None = None
        read, write = os.pipe()
        self._status, theirs = socket.socketpair()
        environment = {**os.environ, "PYTHONPATH": PYTHONPATH} if env is None else env
        wanted = {"command": self.args, "env": environment, "cwd": str(cwd), "new_session": start_new_session}
        request = json.dumps(wanted).encode()
        assert len(request) <= MESSAGE_BYTES, "the request is too large for a datagram"
        rights = array.array("i", [theirs.fileno(), write])
        _server().sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        theirs.close()
        os.close(write)
        self.stdout = open(read, encoding="utf-8")  # noqa: SIM115 (closed with the object, as Popen's)
        self.pid = int(self._line())

    def _line(self) -> str:
        """The next line from the parent of the fork: first the process id, then the exit code."""
        line = b""
        while not line.endswith(b"\n"):
            part = self._status.recv(1)
            assert part, "the process that forks has ended"
            line += part
        return line.decode()

    def poll(self) -> int | None:
        """The exit code (a negative one is a signal), or None while it runs."""
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the process ends.

        Raises:
            subprocess.TimeoutExpired: it runs after `timeout` seconds.
        """
        if self.returncode is None:
            self._status.settimeout(timeout or (None if timeout is None else 1e-3))
            try:
                self.returncode = int(self._line())
            except TimeoutError as error:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0) from error
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Return its output until its end. Its children may keep the output open longer.

        Raises:
            subprocess.TimeoutExpired: it runs after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.append(self.stdout.read()), daemon=True)
        reader.start()
        reader.join(timeout)
        if reader.is_alive():
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        self.wait(None if deadline is None else max(deadline - time.monotonic(), 1.0))
        return said[0], None

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


@functools.cache
def _server() -> socket.socket:
    """The connection to the process that forks. It serves all processes of one pytest, and ends with the last one."""
    # The address is abstract, so no file is made.
    address = f"\0jitscale-tests-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
    log = Path(tempfile.gettempdir(), f"{address[1:]}.log")
    ours, listener = (socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2))
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:  # Another process of this pytest may have started the server.
            raise
    else:
        _start_server(listener, log)
    listener.close()
    for _ in range(100):
        with contextlib.suppress(ConnectionRefusedError):  # The socket may be bound, but not listening yet.
            ours.connect(address)
            break
        time.sleep(0.1)
    if not ours.recv(16):
        raise RuntimeError(f"the process that forks did not start: {log.read_text()}")
    atexit.register(ours.close)
    return ours


def _start_server(listener: socket.socket, log: Path) -> None:
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forking", str(listener.fileno())],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    atexit.register(log.unlink, missing_ok=True)
    atexit.register(server.wait)


def _serve(listener: socket.socket) -> dict[str, object]:
    """Fork at each request. Return the request in the fork."""
    for module in WARM:
        importlib.import_module(module)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, "a fork keeps only the thread that forks, so no import may start another thread"
    gc.freeze()  # Garbage collections in a fork ignore older objects, so their memory stays shared.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # No process waits for the parents of the forks.
    sys.stdout.flush()
    sys.stderr.flush()
    connections: list[socket.socket] = []
    while True:
        for ready in select.select([listener, *connections], [], [])[0]:
            if ready is listener:
                connections.append(listener.accept()[0])
                connections[-1].send(b"ready")
                continue
            data, passed, _, _ = socket.recv_fds(ready, MESSAGE_BYTES, 2)
            if not data:  # A process of pytest has ended.
                ready.close()
                connections.remove(ready)
            elif os.fork() == 0:
                for connection in (listener, *connections):
                    connection.close()
                status, output = passed
                request: dict[str, object] = json.loads(data)
                _fork(status, output, new_session=bool(request["new_session"]))
                return request
            for descriptor in passed:
                os.close(descriptor)
        if not connections:
            os._exit(0)


def _fork(status: int, output: int, *, new_session: bool) -> None:
    """Return in a child with its own output. The parent reports the child's process id and exit code, and ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child:
        os.close(output)
        os.write(status, f"{child}\n".encode())
        # Ctrl-C in the terminal must not stop the parent: it reports the end of the child.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _, code = os.waitpid(child, 0)
        os.write(status, f"{os.waitstatus_to_exitcode(code)}\n".encode())
        os._exit(0)
    os.close(status)
    for standard in (1, 2):
        os.dup2(output, standard)
    os.close(output)
    if new_session:
        os.setsid()


def _run(command: list[str], env: dict[str, str], cwd: str) -> None:
    """Run the command as `python COMMAND...` does."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    # The program's folder comes first, then PYTHONPATH. `_server` has put the root on the path of this process.
    sys.path[:2] = [os.getcwd(), *env.get("PYTHONPATH", "").split(os.pathsep)]
    kind, *rest = command
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = command
        sys.path[0] = str(Path(kind).resolve().parent)
        runpy.run_path(kind, run_name="__main__")


def _main() -> NoReturn:
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    _run(request["command"], request["env"], request["cwd"])  # type: ignore[arg-type]
    sys.exit()


if __name__ == "__main__":
    _main()
