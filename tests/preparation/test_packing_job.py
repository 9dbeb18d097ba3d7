"""Packing jobs in several parts that are killed, stopped and continued. A kill never changes the output."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jitscale.data.manifest import Manifest
from jitscale.data.tar_index import scan_tar
from jitscale.errors import DataError
from jitscale.preparation import packing_job, packing_plan, processes
from jitscale.preparation.finding import find_sources
from jitscale.preparation.packing_job import PackingJob
from jitscale.preparation.packing_plan import PackingOptions
from jitscale.preparation.sources import SourceTable
from tests.preparation.packing_jobs import (
    PER_SHARD,
    RESOLUTION,
    SLOW,
    TRANSPARENT,
    alone,
    command,
    committed,
    contents,
    finish,
    packed,
    refused,
    start,
    write_tree,
)
from tests.support import ROOT
from tests.support.pictures import file_bytes, noise
from tests.support.processes import group_ended
from tests.support.tools import run_tool


def test_parallel_parts_give_the_output_of_one_part(tree: Path, clean: Path, tmp_path: Path) -> None:
    """The parts begin together, so each of them makes a plan.

    They end about together, so several of them finish the job.
    """
    parts = [start(command(tree, tmp_path / "out", "--part", f"{part}/3", "--workers", "1")) for part in (1, 2, 3)]
    ends = [finish(part) for part in parts]
    assert [code for code, _, _ in ends] == [0, 0, 0], ends
    assert any("done:" in out for _, out, _ in ends)
    assert contents(tmp_path / "out") == contents(clean)


@pytest.mark.slow
def test_sequential_parts_give_the_output_of_one_part(tree: Path, clean: Path, tmp_path: Path) -> None:
    """The second part starts in another folder: the plan knows the absolute path of the input."""
    output = tmp_path / "out"
    here = os.path.relpath(tree, ROOT)
    second = alone(here, output, "--part", "2/2")
    assert (second.code, (output / "manifest.json").exists()) == (0, False)
    assert "part 2/2 is done; 6 of 11 shards are left to other parts" in second.out
    process = subprocess.run(
        command(tree.name, output, "--part", "1/2"),
        cwd=tree.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "done: 40 images in 11 shards" in process.stdout
    for name in contents(clean).keys() - {"manifest.json"}:
        assert (output / name).read_bytes() == (clean / name).read_bytes()
    assert Manifest.read(output / "manifest.json").bad[0].source == f"{here}/ant/03.png"


def test_a_finished_job_is_left_alone(tree: Path, clean: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in clean.iterdir()}
    (clean / ".packing").mkdir()  # as if killed after the manifest and before the removal of this folder
    (clean / ".shard-000001.tar.host.1.partial").write_bytes(b"")
    code, out, errors = finish(start(command(tree, clean, "--part", "2/7")))
    assert (code, errors) == (0, "")
    assert "is there already: 40 images in 11 shards" in out
    assert {path: path.stat().st_mtime_ns for path in clean.iterdir()} == before
    assert "another --codec (codec raw, resolution 16" in refused(*command(tree, clean, codec="png"))
    assert "another --resolution" in refused(*command(tree, clean, "--resolution", "32"))
    assert "another --samples-per-shard" in refused(*command(tree, clean, "--samples-per-shard", "5"))
    assert "was begun with --seed 0, not with --seed 5" in refused(*command(tree, clean, "--seed", "5"))
    assert "not with --input" in refused(*command(tree / "ant", clean))
    lost = clean / "shard-000002.tar"
    lost.rename(clean / "elsewhere")
    assert "shard-000002.tar: missing, without its index, or of another size (1 of 11" in refused(*command(tree, clean))
    (clean / "elsewhere").rename(lost)


def test_a_job_is_not_continued_with_other_options(tree: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert alone(tree, output, "--part", "1/3").code == 0
    before = contents(output)
    message = refused(*command(tree, output, "--seed", "4", codec="webp"))
    assert "was begun with --codec raw --seed 0, not with --codec webp --seed 4; give the same options" in message
    assert "--input" in refused(*command(tree / "ant", output))
    assert contents(output) == before
    (output / ".packing" / "inputs.npz").write_bytes(b"")
    assert "inputs.npz is not what plan.json describes; remove it" in refused(*command(tree, output)).replace(")", "")


@pytest.mark.parametrize("content", ["", '{"a"', "5", "[" * 200_000, '{"options": {"input": 1}, "root": "/"}'])
def test_damaged_files_of_a_job_are_reported(tree: Path, tmp_path: Path, content: str) -> None:
    options = PackingOptions([str(tree)], "raw", RESOLUTION, PER_SHARD, 0)
    PackingJob(tmp_path, options)
    (tmp_path / ".packing" / "plan.json").write_text(content)
    with pytest.raises(DataError, match=r"\.packing: cannot be read \(.*\); remove it and start again"):
        PackingJob(tmp_path, options)
    manifest = Manifest(codec="raw", resolution=RESOLUTION, num_classes=0, class_names=None, total=0, shards=[])
    manifest.write(tmp_path / "manifest.json")
    (tmp_path / "packing.json").write_text(content)
    with pytest.raises(DataError, match=r"packing.json: cannot be read \(.*\); remove it: the shards do not need it"):
        packing_job.finished(tmp_path, options)
    (tmp_path / "packing.json").unlink()
    assert packing_job.finished(tmp_path, options) == manifest


def test_a_lost_shard_is_written_again(tree: Path, clean: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert alone(tree, output, "--part", "1/3").code == 0
    (output / "shard-000000.tar").write_bytes(b"")
    (output / "shard-000003.index.npy").unlink()
    (output / ".packing" / "shard-000006.json").write_text("{")
    (output / ".packing" / "shard-000009.json").write_text("[" * 200_000)
    packed(tree, output)
    assert contents(output) == contents(clean)


def meanwhile(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Run `action` while a task looks for its images."""

    def find(*arguments: Any) -> SourceTable:
        monkeypatch.undo()
        action()
        return find_sources(*arguments)

    monkeypatch.setattr(packing_plan, "find_sources", find)


def test_the_first_of_two_plans_is_kept(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = PackingOptions([str(tree)], "raw", RESOLUTION, PER_SHARD, 0)
    theirs = replace(ours, seed=5)
    for number, (first, second) in enumerate([(ours, ours), (theirs, ours)]):
        output = tmp_path / str(number)
        meanwhile(monkeypatch, partial(PackingJob, output, first))
        if first == second:
            assert len(PackingJob(output, second).shards) == 11
        else:
            with pytest.raises(DataError, match="was begun with --seed 5, not with --seed 0"):
                PackingJob(output, second)
        plan = json.loads((output / ".packing" / "plan.json").read_text())
        assert plan["options"]["seed"] == first.seed
        assert {path.name for path in output.rglob("*")} == {".packing", "plan.json", "inputs.npz"}


def test_a_late_task_finds_the_job_done(
    tree: Path, clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tasks planned, packed and removed their plan while this one looked for its images."""
    meanwhile(monkeypatch, lambda: packed(tree, tmp_path / "out"))
    finished = run_tool("make_shards", *command(tree, tmp_path / "out")[2:])
    assert finished.code == 0
    assert "is there already" in finished.out
    assert contents(tmp_path / "out") == contents(clean)


def begun(process: subprocess.Popen[str], output: Path, shards: int) -> None:
    """Wait until this many shards are finished, or until the process ends."""
    while process.poll() is None and len(committed(output)) < shards:
        time.sleep(0.002)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An input that takes a while (21 shards, about 0.1 s each), and the output of an undisturbed command."""
    tree = write_tree(tmp_path_factory.mktemp("slow") / "photos", dirty=True)
    large = [file_bytes(noise(number, 1400, 1300 + number)) for number in range(4)]
    for number, path in enumerate(sorted(tree.rglob("*.png"))):
        # The damaged images stay too.
        if path.stat().st_size > 500 and int(path.stem) != TRANSPARENT:
            path.write_bytes(large[number % 4])
    packed(tree, tree.parent / "clean", *SLOW)
    return tree, tree.parent / "clean"


def kill_and_go_on(tree: Path, output: Path, kills: int, rng: random.Random) -> list[int]:
    """Kill the whole group at random moments until the job is done, at most `kills` times.

    Returns the number of finished shards at each kill.
    """
    killed = []
    while not (output / "manifest.json").exists():
        process = start(command(tree, output, *SLOW))
        before = committed(output)
        if len(killed) < kills:
            if killed and rng.random() < 0.8:
                begun(process, output, len(before) + rng.randrange(1, 4))
                time.sleep(rng.uniform(0.0, 0.1))
            else:  # A kill during the start may hit the making of the plan.
                time.sleep(rng.uniform(0.1, 0.5))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                killed.append(len(committed(output)))
            for path in output.glob("*.tar"):
                scan_tar(path)  # A shard with its final name is complete.
        finish(process)
        after = committed(output)
        if not (output / "manifest.json").exists():
            assert {name: after.get(name) for name in before} == before, "a finished shard was written again"
    # This call removes leftovers of a kill after the manifest.
    code, _, errors = finish(start(command(tree, output, *SLOW)))
    assert (code, errors) == (0, "")
    return killed


def test_a_killed_job_ends_with_the_same_output(slow: tuple[Path, Path], tmp_path: Path) -> None:
    tree, clean = slow
    killed = kill_and_go_on(tree, tmp_path / "out", 3, random.Random(1))
    assert len(killed) == 3
    assert any(0 < finished < 21 for finished in killed), killed
    assert contents(tmp_path / "out") == contents(clean)
    assert Manifest.read(tmp_path / "out" / "manifest.json").transparent == 3, "the commit records give the number"


@pytest.mark.slow
def test_twenty_kills(slow: tuple[Path, Path], tmp_path: Path) -> None:
    tree, clean = slow
    killed: list[int] = []
    jobs = 0
    while len(killed) < 20:
        killed += kill_and_go_on(tree, tmp_path / str(jobs), 20 - len(killed), random.Random(100 + jobs))
        assert contents(tmp_path / str(jobs)) == contents(clean)
        jobs += 1
    assert sum(0 < finished < 21 for finished in killed) >= 5, killed


def children_of(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The worker processes, which are forks of the job's server."""
    return [pid for child in children_of(process.pid) for pid in children_of(child)]


@pytest.mark.slow
def test_torch_is_loaded_once_for_all_workers(slow: tuple[Path, Path], tmp_path: Path) -> None:
    """webdataset imports torch: 200 MB in each worker, if the memory were not shared. The main process has no torch."""
    process = start(command(slow[0], tmp_path / "out", *SLOW))
    begun(process, tmp_path / "out", 1)
    for pid in workers_of(process):
        assert "libtorch" in Path(f"/proc/{pid}/maps").read_text()
        sizes = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]]
        assert sum(int(size) for name, size, *_ in sizes if name.startswith("Private_")) < 150_000  # in kB
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
    process.kill()
    finish(process)


def test_a_worker_that_dies_is_named_and_nothing_is_lost(slow: tuple[Path, Path], tmp_path: Path) -> None:
    tree, clean = slow
    process = start(command(tree, tmp_path / "out", *SLOW))
    begun(process, tmp_path / "out", 2)
    victim = workers_of(process)[0]
    os.kill(victim, signal.SIGKILL)
    code, _, errors = finish(process)
    assert code == 2
    assert errors.startswith(f"error: worker process {victim}: was killed by SIGKILL (often: too little memory)")
    assert "the same command continues; maybe use fewer --workers than 2" in errors
    assert "\n" not in errors
    assert group_ended(process.pid)
    before = committed(tmp_path / "out")
    assert len(before) >= 2
    packed(tree, tmp_path / "out", *SLOW)
    assert contents(tmp_path / "out") == contents(clean)


def test_the_killed_process_is_named_although_others_have_exit_codes() -> None:
    team = [SimpleNamespace(pid=pid, exitcode=code) for pid, code in ((1, 255), (2, -signal.SIGKILL), (3, 255))]
    assert processes._death(team).pid == 2  # type: ignore[arg-type]


def leave_slowly(folder: Path) -> None:
    try:
        (folder / "begun").touch()
        time.sleep(60)
    finally:
        time.sleep(0.3)
        (folder / "left").touch()


def test_a_second_signal_does_not_interrupt_the_end_of_a_worker(tmp_path: Path) -> None:
    """The first signal comes from the scheduler, the second one from the main process."""
    worker = multiprocessing.get_context("fork").Process(target=processes._run, args=(leave_slowly, tmp_path))
    worker.start()
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    worker.terminate()
    time.sleep(0.1)
    worker.terminate()
    worker.join()
    assert (worker.exitcode, (tmp_path / "left").exists()) == (0, True)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_stops_cleanly(slow: tuple[Path, Path], tmp_path: Path, number: signal.Signals) -> None:
    """The signal goes to the whole group, as a terminal and some schedulers send it."""
    tree, clean = slow
    process = start(command(tree, tmp_path / "out", *SLOW))
    begun(process, tmp_path / "out", 1)
    os.killpg(process.pid, number)
    code, _, errors = finish(process)
    assert code == 75, errors
    assert errors == f"{tmp_path}/out: stopped by {number.name}; the same command continues"
    assert group_ended(process.pid)
    assert not list((tmp_path / "out").glob(".shard-*.partial"))
    packed(tree, tmp_path / "out", *SLOW)
    assert contents(tmp_path / "out") == contents(clean)


def test_workers_end_when_the_main_process_is_killed(slow: tuple[Path, Path], tmp_path: Path) -> None:
    process = start(command(slow[0], tmp_path / "out", *SLOW))
    begun(process, tmp_path / "out", 1)
    process.kill()
    finish(process)
    assert group_ended(process.pid)
    assert not (tmp_path / "out" / "manifest.json").exists()
