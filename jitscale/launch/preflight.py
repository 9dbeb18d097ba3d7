"""Check the machine of every rank before the first step.

    srun python -m jitscale.launch.preflight --config configs/jit_h_256.yaml data.shards=/data/imagenet_256

Each rank checks its own machine. Then all ranks compare their results. A fault is printed in one line that names the
node, and every rank ends with exit code 1. If there are several nodes and all have the same fault, it is an error in
the configuration, and the exit code is 2. If the storage fails on all nodes, the line names no node, and the exit code
is 1. If some ranks do not connect, the others name them.
"""

import errno
import hashlib
import os
import socket
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

import jitscale
from jitscale import parallel
from jitscale.command import Parser, path_text
from jitscale.config import Config, load_config, to_yaml
from jitscale.data.shards import open_training_shards
from jitscale.errors import ExitCode, StorageError, UserError, exit_with_message, first_line, is_wrong_path
from jitscale.evaluation.choice import settle_for_training
from jitscale.evaluation.requirements import measurable_config
from jitscale.launcher_environment import adopt_launcher_environment, positive_setting
from jitscale.parallel import World
from jitscale.progressive import stages_of

FAULT = "preflight: node"  # beginning of a line about one node
SHARED_FAULT = "preflight: all nodes"  # beginning of a line about a temporary fault of all nodes
WAIT_SECONDS = 120.0  # for the slowest rank
COMPARISON_LIMIT = timedelta(minutes=10)  # limit for one collective; rank 0 may download weights of a feature network
BANDWIDTH_BYTES = 64 * 2**20
DISK_BYTES = 2**20
PRODUCT_SIZE = 1024


class Fault(NamedTuple):
    """A fault that a check found on a node. The same fault of another rank compares as equal."""

    message: str  # without names that differ between ranks
    is_users: bool = False  # an error that the user can correct
    may_pass: bool = False  # the storage fails


@dataclass(frozen=True)
class Finding:
    """The result of one rank: faults of its node, and values that must be equal on all ranks (code, config, device)."""

    node: str
    faults: tuple[Fault, ...]
    code: str
    config: str
    device: str
    mistake: str = ""  # an error of the user's that other ranks may not see


def main(arguments: list[str] | None = None) -> int:
    """Check, compare, print; returns the process's exit code."""
    parser = Parser(__doc__, prog="python -m jitscale.launch.preflight")
    parser.add_argument("--config", type=path_text, required=True, metavar="FILE", help="the run's YAML file")
    parser.add_argument("--work", choices=("train", "evaluate"), default="train", help="default: %(default)s")
    parser.add_overrides("the run's settings")
    options = parser.parse_intermixed_args(arguments)

    world_size = adopt_launcher_environment()
    rank = int(os.environ["RANK"])
    config = load_config(options.config, options.overrides, world_size=world_size)
    on_gpu = config.run.device != "cpu" and torch.cuda.is_available()
    finding = Finding(
        node=socket.gethostname(),
        faults=faults_of(config),
        code=_hash_of_code(),
        config=hashlib.sha256(to_yaml(config).encode()).hexdigest(),
        device="cuda" if on_gpu else "cpu",
        mistake=parallel.shared_gpu() if on_gpu else "",
    )

    limit = timedelta(seconds=positive_setting("JITSCALE_PREFLIGHT_SECONDS", WAIT_SECONDS))
    store = _rendezvous(rank, world_size, limit)
    if store is None:
        return ExitCode.FAILED
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=COMPARISON_LIMIT)
    findings = parallel.gather_objects(finding)
    if wrong := mistakes(findings):
        raise UserError("; ".join(wrong))
    if passing := met_everywhere(findings, may_pass=True):
        if rank == 0:
            print(f"{SHARED_FAULT}: {'; '.join(passing)}", flush=True)
        return ExitCode.FAILED
    problems = compare(findings)
    if rank == 0:
        for node, what in problems:
            print(f"{FAULT} {node}: {what}", flush=True)
    if problems:
        return ExitCode.FAILED
    if options.work == "train":  # an evaluation makes these checks itself
        world = World(rank, world_size, int(os.environ["LOCAL_RANK"]), torch.device("cpu"))
        settled, _ = settle_for_training(config)
        measurable_config(settled, world)
    slowest = min(parallel.gather_objects(_bandwidth(parallel.choose_device(config.run.device), limit)))
    if rank == 0:
        where = f"{world_size} ranks on {len({finding.node for finding in findings})} nodes"
        speed = f"all-reduce of {BANDWIDTH_BYTES // 2**20} MiB at {slowest:.2f} GB/s"
        print(f"preflight: {where} are fit; {speed}", flush=True)
    parallel.barrier()  # rank 0 must not leave first: it serves the store of all ranks
    parallel.stop()
    return ExitCode.DONE


def faults_of(config: Config) -> tuple[Fault, ...]:
    """The faults of this rank's GPU, of the folders that it writes to, and of the shards."""
    faults = []
    for check in (_gpu, _folders, _shards):
        try:
            check(config)
        except (UserError, OSError, RuntimeError) as error:
            may_pass = isinstance(error, StorageError) and not error.is_wrong
            faults.append(Fault(" ".join(str(error).split()), isinstance(error, UserError) and not may_pass, may_pass))
    return tuple(faults)


def mistakes(findings: list[Finding]) -> list[str]:
    """The faults that would also occur on other nodes."""
    if settings := sorted({finding.mistake for finding in findings if finding.mistake}):
        return settings[:1]  # the same on all nodes
    return met_everywhere(findings, may_pass=False)


def met_everywhere(findings: list[Finding], *, may_pass: bool) -> list[str]:
    """The faults that are not caused by a node: either the temporary ones (`may_pass`) or the others.

    If there are several nodes and all ranks have the same fault, no single node is the cause. In a job with one node,
    the node may be the cause.
    """
    several = len({finding.node for finding in findings}) > 1
    everywhere = set.intersection(*(set(finding.faults) for finding in findings))
    return sorted(fault.message for fault in everywhere if fault.may_pass == may_pass and (several or fault.is_users))


def compare(findings: list[Finding]) -> list[tuple[str, str]]:
    """(node, fault) for each fault of a rank's machine, and for each value that differs from the majority."""
    problems = [(finding.node, fault.message) for finding in findings for fault in finding.faults]
    for name, what in (("code", "code"), ("config", "configuration"), ("device", "kind of device (cuda or cpu)")):
        common, _ = Counter(getattr(finding, name) for finding in findings).most_common(1)[0]
        other = f"another {what} than most ranks have; install and mount the same there"
        problems += [(finding.node, other) for finding in findings if getattr(finding, name) != common]
    return list(dict.fromkeys(problems))


def _rendezvous(rank: int, world_size: int, limit: timedelta) -> TCPStore | None:
    """Wait for all ranks. If some do not connect, print a line about each of them and return None."""
    listed = (os.environ.get("JITSCALE_NODES") or "unknown").split(",")  # the supervisor sets it
    if world_size % len(listed):
        listed = ["unknown"]
    nodes = [node for node in listed for _ in range(world_size // len(listed))]
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with parallel.waiting_for_ranks():
        try:
            store = TCPStore(address, port, world_size, is_master=rank == 0, wait_for_workers=False, timeout=limit)
        except dist.DistError as error:  # rank 0 did not start, or its port is in use
            what = f"rank 0 does not serve {parallel.meeting_place()} ({first_line(error)})"
            print(f"{FAULT} {nodes[0]}: {what}", flush=True)
            return None
        try:
            store.set(f"here/{rank}", "")
            deadline = time.monotonic() + limit.total_seconds()
            missing = set(range(world_size))
            while missing and time.monotonic() < deadline:
                missing -= {other for other in missing if store.check([f"here/{other}"])}
                time.sleep(0.05)
        except dist.DistError:  # rank 0 has timed out first, and has printed the missing ranks
            return None
    if rank == 0:
        for other in sorted(missing):
            what = f"rank {other} did not connect within {limit.total_seconds():.0f} s"
            print(f"{FAULT} {nodes[other]}: {what}", flush=True)
    return None if missing else store


def _gpu(config: Config) -> None:
    """Check that a matrix product on the rank's GPU is right."""
    if config.run.device == "auto" and os.environ.get("CUDA_VISIBLE_DEVICES") and not torch.cuda.is_available():
        if torch.version.cuda is None:
            return  # a CPU build
        visible = os.environ["CUDA_VISIBLE_DEVICES"]
        raise RuntimeError(f"CUDA_VISIBLE_DEVICES={visible}, but PyTorch sees no GPU; look at nvidia-smi on this node")
    device = parallel.choose_device(config.run.device)
    if device.type != "cuda":
        return
    torch.cuda.set_device(device)
    torch.manual_seed(0)
    a, b = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE)
    error = ((a.to(device) @ b.to(device)).cpu() - a @ b).norm() / (a @ b).norm()
    if not error < 1e-2:
        raise RuntimeError(f"GPU {device.index} computes wrong products (error {float(error):.2g}); drain the node")


def _folders(config: Config) -> None:
    """Check that the run's folders can be written and read back."""
    content = os.urandom(DISK_BYTES)
    for folder in map(Path, filter(None, (config.run.dir, tempfile.gettempdir(), config.data.cache_dir))):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                file.seek(0)
                if file.read() != content:
                    raise RuntimeError(f"{folder}: returns other bytes than were written; drain the node")
        except OSError as error:
            # The message leaves out the name of the temporary file, which differs between ranks.
            remedy = "make room there, or choose another run.dir, TMPDIR or data.cache_dir"
            what = f"{folder}: cannot be written ({error.strerror}); {remedy}"
            if is_wrong_path(error) or error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise RuntimeError(what) from error  # a full disk does not become free by waiting
            raise StorageError.of(error, what) from error


def _shards(config: Config) -> None:
    """Check that the manifests and a first image can be read."""
    for stage in stages_of(config) if config.data.shards else ():
        open_training_shards(stage)


def _hash_of_code() -> str:
    """The hash of the package's source files."""
    digest, root = hashlib.sha256(), Path(jitscale.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _bandwidth(device: torch.device, limit: timedelta) -> float:
    """Bytes of an all-reduce divided by its time, in GB/s; the best of three."""
    # A second group in the same process: another rendezvous would need the port, which the store still uses.
    group = dist.new_group(backend="nccl", timeout=limit) if device.type == "cuda" else None
    values = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    best = float("inf")
    for _ in range(3):
        parallel.barrier()
        started = time.perf_counter()
        dist.all_reduce(values, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return BANDWIDTH_BYTES / best / 1e9


if __name__ == "__main__":
    exit_with_message(main)
