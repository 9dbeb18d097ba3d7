"""A real Slurm with several nodes on one machine, for the tests. It needs root and Debian's packages (packages.sh).

Each node is a slurmd in namespaces of its own (network, host name, mounts): it has an address, a name, and a small
disk at `scratch` of its own. Nothing is left behind: processes are ended by their recorded pids, and the next start
removes the leftovers of a killed test run.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path("/tmp/jitscale-test-slurm")
BRIDGE, NETWORK = "jsbridge", "10.77.1"
CPUS, MEMORY_MIB, GPUS = 4, 8000, 2
CLIENT_SECONDS = 20.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


class SlurmCluster:
    """munged, slurmctld, optionally slurmdbd, and one slurmd for each node.

    Partitions: `batch` (default) and `urgent`. Jobs of `urgent` take nodes from `batch` and requeue its jobs.

    Attributes:
        folder: the folder of logs and state.
        nodes: the names of the nodes.
        scratch: the path at which every node has a disk of its own.
    """

    def __init__(self, nodes: int = 4, *, accounting: bool = False) -> None:
        self.folder = FOLDER
        self.nodes = [f"jsnode{number}" for number in range(1, nodes + 1)]
        self.scratch = FOLDER / "scratch"
        self._accounting = accounting
        self._ports = {name: _free_port() for name in ("slurmctld", "slurmd", "slurmdbd")}

    @property
    def environment(self) -> dict[str, str]:
        """The environment for clients of this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    # --- start and stop ---

    def start(self) -> None:
        """Start everything, and wait until all nodes are idle."""
        remove_leftovers()
        for name in ("state", "spool", "log", "pid", "dev", "scratch"):
            (self.folder / name).mkdir(parents=True)
        self._make_network()
        self._write_configuration()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._daemon(
            "munged",
            f"--key-file={key}",
            f"--socket={self.folder / 'munge.socket'}",
            f"--pid-file={self.folder / 'pid/munged'}",
            f"--log-file={self.folder / 'log/munged'}",
            f"--seed-file={self.folder / 'munge.seed'}",
        )
        if self._accounting:
            self._start_accounting()
        self._daemon("slurmctld")
        for node in self.nodes:
            self.start_node(node)
        self._until(lambda: set(self.node_states().values()) == {"idle"}, 60, "nodes are not idle")

    def stop(self) -> None:
        """End all jobs and daemons, and remove everything."""
        remove_leftovers()

    def __enter__(self) -> SlurmCluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- clients ---

    def run(self, *command: str, check: bool = True, env: Mapping[str, str] | None = None) -> str:
        """The output of a client command."""
        finished = subprocess.run(
            command,
            env={**self.environment, **(env or {})},
            capture_output=True,
            text=True,
            timeout=CLIENT_SECONDS,
            check=False,
        )
        assert not check or finished.returncode == 0, f"{command}: {finished.stderr}"
        return finished.stdout + ("" if check else finished.stderr)

    def sbatch(self, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """Submit a job; returns its id."""
        return self.run("sbatch", "--parsable", *arguments, env=env).strip()

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", job)))

    def wait(self, job: str, *, until: Sequence[str] = ENDED, seconds: float = 120) -> str:
        """Wait until the job has one of the states; returns the state."""
        self._until(lambda: self.job(job)["JobState"] in until, seconds, f"job {job} is not {until}")
        return self.job(job)["JobState"]

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait until `condition` holds."""
        self._until(condition, seconds, what)

    def node_states(self) -> dict[str, str]:
        """The state of each node, as sinfo shows it."""
        lines = self.run("sinfo", "--noheader", "--Node", "--partition=batch", "--format=%N %T", check=False)
        return dict(line.split() for line in lines.splitlines() if len(line.split()) == 2)

    # --- failures ---

    def start_node(self, node: str) -> None:
        """Power the node on."""
        script = (
            f"hostname {node}; mount -t tmpfs -o size=16m none {self.scratch}; "
            f"mount --bind {self.folder / 'hosts'} /etc/hosts; exec slurmd -N {node}"
        )
        self._daemon("nsenter", f"--net=/run/netns/{node}", "unshare", "--uts", "--mount", "bash", "-c", script)

    def kill_node(self, node: str) -> None:
        """Power the node off: slurmd, steps and tasks are gone at once."""
        for pid in _output("ip", "netns", "pids", node).split():
            _kill(int(pid))

    @contextmanager
    def unplugged(self, node: str) -> Iterator[None]:
        """The node's network cable is unplugged; its processes live on."""
        _run("ip", "link", "set", _cable(node), "down")
        try:
            yield
        finally:
            _run("ip", "link", "set", _cable(node), "up")

    @contextmanager
    def unwritable_scratch(self, node: str) -> Iterator[None]:
        """The node's own disk is read-only."""
        pid = (self.folder / "pid" / node).read_text().strip()
        remount = ["nsenter", f"--target={pid}", "--mount", "mount", "-o"]
        _run(*remount, "remount,ro", str(self.scratch))
        try:
            yield
        finally:
            _run(*remount, "remount,rw", str(self.scratch))

    def tasks(self, node: str, pattern: str) -> list[int]:
        """The pids of processes on a node whose command line matches, such as the ranks of a job."""
        found = []
        for pid in _output("ip", "netns", "pids", node).split():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # The process has ended in the meantime.
            if re.search(pattern, command) and not command.startswith(("srun", "slurmstepd")):
                found.append(int(pid))
        return found

    # --- parts ---

    def _make_network(self) -> None:
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "address", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        hosts = ["127.0.0.1 localhost"]
        for number, node in enumerate(self.nodes, 1):
            _run("ip", "netns", "add", node)
            _run("ip", "link", "add", _cable(node), "type", "veth", "peer", "name", "eth0", "netns", node)
            _run("ip", "link", "set", _cable(node), "master", BRIDGE, "up")
            _run("ip", "-n", node, "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            # There is no default route: name look-ups then fail at once, not after seconds.
            for device in ("lo", "eth0"):
                _run("ip", "-n", node, "link", "set", device, "up")
            hosts.append(f"{NETWORK}.{number} {node}")
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")

    def _write_configuration(self) -> None:
        folder, controller = self.folder, socket.gethostname().split(".")[0]
        for number in range(GPUS):
            # Slurm needs character devices here.
            os.mknod(folder / f"dev/gpu{number}", 0o666 | 0o020000, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/dev/gpu[0-{GPUS - 1}]\n")
        accounting = (
            f"""
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={NETWORK}.254
AccountingStoragePort={self._ports["slurmdbd"]}
AccountingStoragePass={folder}/munge.socket"""
            if self._accounting
            else ""
        )
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={node} NodeAddr={NETWORK}.{number} Port={self._ports['slurmd']} CPUs={CPUS} "
            f"RealMemory={MEMORY_MIB} Gres=gpu:{GPUS} State=UNKNOWN"
            for number, node in enumerate(self.nodes, 1)
        )
        # cred_expire: the number of seconds until a requeued job may start again (Slurm's own default is 120).
        # FirstJobId: job ids of another cluster must not repeat, because folders are named after them.
        (folder / "slurm.conf").write_text(
            f"""ClusterName=jitscale
SlurmctldHost={controller}({NETWORK}.254)
SlurmctldPort={self._ports["slurmctld"]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/pid/slurmctld
SlurmdPidFile={folder}/pid/%n
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=5
FirstJobId={int(time.time()) % 60_000_000 + 1000}
MinJobAge=86400
DefMemPerCPU=500
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5{accounting}
{nodes}
PartitionName=batch Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""
        )

    def _start_accounting(self) -> None:
        folder = self.folder
        # The path of this socket is compiled into libmariadb.
        data, endpoint = folder / "mysql", Path("/run/mysqld/mysqld.sock")
        data.mkdir()
        shutil.chown(data, "mysql")
        endpoint.parent.mkdir(exist_ok=True)
        shutil.chown(endpoint.parent, "mysql")
        install = ["mariadb-install-db", "--no-defaults", "--user=mysql", f"--datadir={data}", "--skip-test-db"]
        _run(*install, "--auth-root-authentication-method=normal")
        with (folder / "log/mariadbd").open("w") as log:
            server = subprocess.Popen(
                [
                    *("mariadbd", "--no-defaults", "--user=mysql", f"--datadir={data}", f"--socket={endpoint}"),
                    *("--skip-networking", "--innodb-buffer-pool-size=64M", "--skip-log-bin"),
                    *("--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=0"),
                ],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        (folder / "pid/mariadbd").write_text(str(server.pid))
        ping = ["mariadb-admin", "--no-defaults", "-uroot", f"--socket={endpoint}", "ping"]
        answers = lambda: subprocess.run(ping, capture_output=True, check=False).returncode == 0  # noqa: E731
        self._until(answers, 60, "mariadbd does not answer")
        configuration = folder / "slurmdbd.conf"
        configuration.write_text(
            f"""AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost={socket.gethostname().split(".")[0]}
DbdAddr={NETWORK}.254
DbdPort={self._ports["slurmdbd"]}
SlurmUser=root
LogFile={folder}/log/slurmdbd
PidFile={folder}/pid/slurmdbd
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=jitscale_test
"""
        )
        configuration.chmod(0o600)
        self._daemon("slurmdbd")
        self._until(lambda: _connects(f"{NETWORK}.254", self._ports["slurmdbd"]), 60, "slurmdbd does not answer")

    def _daemon(self, *command: str) -> None:
        finished = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert finished.returncode == 0, f"{command[0]}: {finished.stderr}"

    def _until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what} after {seconds:.0f} s\n{self._state()}"
            time.sleep(0.3)

    def _state(self) -> str:
        """Jobs, nodes and the ends of the logs, for messages."""
        parts = [self.run("squeue", check=False), self.run("sinfo", "--Node", "--long", check=False)]
        for log in sorted((self.folder / "log").iterdir()):
            parts += [f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-8:]]
        return "\n".join(parts)


def remove_leftovers() -> None:
    """End all processes of a cluster of these tests, from this run or a killed one, and remove its files."""
    if (FOLDER / "slurm.conf").exists() and _alive_by_file(FOLDER / "pid/slurmctld", "slurmctld"):
        environment = {**os.environ, "SLURM_CONF": str(FOLDER / "slurm.conf")}
        for options in (["--state=PENDING"], ["--full", "--signal=KILL"], []):
            subprocess.run(
                ["scancel", "--quiet", "--user=root", *options], env=environment, timeout=CLIENT_SECONDS, check=False
            )
    names = _output("ip", "netns", "list").split()
    for node in (name for name in names if re.fullmatch(r"jsnode\d+", name)):
        for pid in _output("ip", "netns", "pids", node).split():
            _kill(int(pid))
        if Path(f"/sys/class/net/{_cable(node)}").exists():
            _run("ip", "link", "delete", _cable(node))
        _run("ip", "netns", "delete", node)
    if Path(f"/sys/class/net/{BRIDGE}").exists():
        _run("ip", "link", "delete", BRIDGE)
    for name in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
        pid = _alive_by_file(FOLDER / "pid" / name, name)
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + 10
            while _alive_by_file(FOLDER / "pid" / name, name) and time.monotonic() < deadline:
                time.sleep(0.1)
            _kill(pid)
    shutil.rmtree(FOLDER, ignore_errors=True)


def _alive_by_file(file: Path, command: str) -> int | None:
    """The pid in the file, if a process with that name still has it."""
    try:
        pid = int(file.read_text())
        status = Path(f"/proc/{pid}/status").read_text()
    except (OSError, ValueError):
        return None
    is_zombie = re.search(r"^State:\s+Z", status, re.MULTILINE)
    return pid if re.search(rf"^Name:\s+{command[:15]}", status) and not is_zombie else None


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # It has ended by itself.


def _cable(node: str) -> str:
    """The host's end of a node's network cable."""
    return f"jscable{node.removeprefix('jsnode')}"


def _connects(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=1):
            return True
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _run(*command: str) -> None:
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, f"{' '.join(command)}: {finished.stderr}"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=CLIENT_SECONDS, check=False).stdout
