"""tools/make_shards.py in real processes: what it writes, what it leaves out, and that dying does not matter."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import webdataset
from PIL import Image

from jitscale.data import packing_job
from jitscale.data.images import center_crop, decode
from jitscale.data.manifest import BadInput, Manifest
from jitscale.data.packing_job import PackingJob, PackingOptions, default_most_bad
from jitscale.data.shards import ShardSet
from jitscale.data.sources import SourceTable, find_sources
from jitscale.data.tar_index import scan_tar
from jitscale.errors import DataError
from jitscale.keyed_random import Purpose, permutation
from tests.distributed.processes import group_ended

ROOT = Path(__file__).parents[2]
RESOLUTION = 16
CLASSES = ["ant", "bee", "cat"]
PER_CLASS = 14
PER_SHARD = 4
SLOW = ("--samples-per-shard", "2")


def pixels(number: int, height: int = 20, width: int = 24) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def stored(picture: Image.Image | npt.NDArray[np.uint8], form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(stream, form)
    return stream.getvalue()


def tar_bytes(*members: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def write_tree(folder: Path, *, dirty: bool, size: int = 20) -> Path:
    """Images in folders of classes; of the dirty ones two cannot be used."""
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(PER_CLASS):
            image = pixels(label * PER_CLASS + number, size, size + number)
            (folder / name / f"{number:02d}.png").write_bytes(stored(image))
    if dirty:
        (folder / "ant" / "03.png").write_bytes(stored(pixels(3))[:100])
        (folder / "cat" / "05.png").write_bytes(b"no image")
        (folder / "bee" / "07.png").write_bytes(stored(pixels(5, 8, 9)))  # smaller than the resolution
    return folder


def command(source: Path | str, output: Path, *more: str, codec: str = "raw") -> list[str]:
    sizes = ["--resolution", str(RESOLUTION), "--samples-per-shard", str(PER_SHARD), "--workers", "2"]
    tool = [sys.executable, str(ROOT / "tools" / "make_shards.py"), "--input", str(source), "--output", str(output)]
    return [*tool, "--codec", codec, *sizes, *more]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """In a process group of its own, as a shell or a scheduler starts it."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, output, and what was said about errors without the progress bar."""
    out, err = process.communicate(timeout=120)
    said = (line for line in err.splitlines() if "image/s" not in line and "s/image" not in line)
    said = (line for line in err.splitlines() if "image/s" not in line and "s/image" not in line)
    return process.returncode, out, "\n".join(said).strip()


def packed(source: Path | str, output: Path, *more: str, codec: str = "raw") -> Manifest:
    code, _, errors = finish(start(command(source, output, *more, codec=codec)))
    assert (code, errors) == (0, "")
    return Manifest.read(output / "manifest.json")


def refused(*arguments: str) -> str:
    """The one line that a wrong command gets."""
    code, _, errors = finish(start(list(arguments)))
    assert code == 2, errors
    assert errors.startswith("error: ")
    assert "\n" not in errors
    return errors


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too; without packing.json, which names the input."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "packing.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def samples(folder: Path) -> dict[int, dict[str, bytes]]:
    """All members of all shards: number of the input to extension to content."""
    found: dict[int, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                key, extension = member.name.split(".")
                content = archive.extractfile(member)
                assert content is not None
                found.setdefault(int(key), {})[extension] = content.read()
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("input") / "photos", dirty=True)


@pytest.fixture(scope="module")
def clean(tree: Path) -> Path:
    """What one command that nothing disturbed makes of `tree`."""
    output = tree.parent / "clean"
    packed(tree, output)
    return output


# What is written


def test_folders_become_shards(tree: Path, clean: Path) -> None:
    manifest = Manifest.read(clean / "manifest.json")
    total = len(CLASSES) * PER_CLASS
    assert (manifest.codec, manifest.resolution, manifest.crop) == ("raw", RESOLUTION, "adm")
    assert (manifest.num_classes, manifest.class_names, manifest.enlarged) == (3, CLASSES, 1)
    assert manifest.total == total - 2
    assert manifest.bad == [
        BadInput(f"{tree}/ant/03.png", manifest.bad[0].reason),
        BadInput(f"{tree}/cat/05.png", "cannot be decoded as png (none of PNG, WEBP, JPEG)"),
    ]
    written = samples(clean)
    assert sorted(written) == [number for number in range(total) if number not in (3, 2 * PER_CLASS + 5)]
    for number, sample in written.items():
        file = tree / CLASSES[number // PER_CLASS] / f"{number % PER_CLASS:02d}.png"
        np.testing.assert_array_equal(decode(sample["npy"], "npy"), center_crop(np.array(Image.open(file)), RESOLUTION))
        assert sample["cls"] == str(number // PER_CLASS).encode()
    ends = (".tar", ".index.npy", ".keys.npy")
    expected = {f"shard-{shard:06d}{end}" for shard in range(-(-total // PER_SHARD)) for end in ends}
    assert set(contents(clean)) == expected | {"manifest.json"}
    assert ShardSet.open(clean, 3).num_samples == manifest.total


def test_the_order_is_a_global_shuffle(tree: Path, clean: Path, tmp_path: Path) -> None:
    def order(folder: Path) -> list[list[int]]:
        return [[int(Path(name).stem) for name in names(path) if name.endswith(".npy")] for path in tars(folder)]

    def tars(folder: Path) -> list[Path]:
        return sorted(folder.glob("*.tar"))

    def names(path: Path) -> list[str]:
        with tarfile.open(path) as archive:
            return archive.getnames()

    total, bad = len(CLASSES) * PER_CLASS, (3, 2 * PER_CLASS + 5)
    whole = permutation(total, 0, Purpose.PACKING_ORDER).tolist()
    slices = [whole[first : first + PER_SHARD] for first in range(0, total, PER_SHARD)]
    assert order(clean) == [[number for number in numbers if number not in bad] for numbers in slices]
    packed(tree, tmp_path / "other", "--seed", "1")
    assert order(tmp_path / "other") != order(clean)
    assert samples(tmp_path / "other") == samples(clean)


def test_imagenet_is_packed_in_place(tmp_path: Path) -> None:
    """A tar of tars with the oddities of the real one: a PNG and a CMYK JPEG that are called .JPEG; and a cut file."""
    ordinary = stored(pixels(1, 40, 50), "JPEG")
    cmyk = stored(Image.fromarray(pixels(2, 30, 30)).convert("CMYK"), "JPEG")
    png = stored(pixels(3, 20, 33))
    inner = {
        "n02": tar_bytes(("n02_1.JPEG", png), ("n02_2.JPEG", ordinary[: len(ordinary) // 2])),
        "n01": tar_bytes(("n01_2.JPEG", cmyk), ("n01_1.JPEG", ordinary)),
    }
    source = tmp_path / "train.tar"
    source.write_bytes(tar_bytes(*[(f"{name}.tar", data) for name, data in inner.items()]))
    at_bad = source.read_bytes().index(ordinary[: len(ordinary) // 2], source.read_bytes().index(png))

    manifest = packed(source, tmp_path / "raw")
    written = samples(tmp_path / "raw")
    assert (manifest.class_names, sorted(written)) == (["n01", "n02"], [0, 1, 2])
    assert [bad.source for bad in manifest.bad] == [f"{source}: byte {at_bad}"]
    for number, (data, label) in enumerate([(ordinary, b"0"), (cmyk, b"0"), (png, b"1")]):
        image = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(decode(written[number]["npy"], "npy"), center_crop(image, RESOLUTION))
        assert written[number]["cls"] == label

    original = packed(source, tmp_path / "original", codec="original")
    assert (original.codec, original.resolution, original.crop) == ("original", None, None)
    assert samples(tmp_path / "original") == {
        0: {"jpg": ordinary, "cls": b"0"},
        1: {"jpg": cmyk, "cls": b"0"},
        2: {"png": png, "cls": b"1"},
    }
    assert ShardSet.open(tmp_path / "original", 2, RESOLUTION).num_samples == 3
    assert {path.name for path in tmp_path.iterdir()} == {"train.tar", "raw", "original"}


def test_folders_and_a_tar_of_tars_give_the_same_shards(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "in", dirty=False)
    inner = {name: [(path.name, path.read_bytes()) for path in (tree / name).iterdir()] for name in reversed(CLASSES)}
    source = tmp_path / "in.tar"
    source.write_bytes(tar_bytes(*[(f"{name}.tar", tar_bytes(*members)) for name, members in inner.items()]))
    packed(source, tmp_path / "from_tar")
    packed(tree, tmp_path / "from_folders", "--workers", "1")
    assert contents(tmp_path / "from_tar") == contents(tmp_path / "from_folders")


@pytest.mark.parametrize("codec", ["raw", "png", "webp", "jpeg"])
def test_webdataset_both_ways(tmp_path: Path, codec: str) -> None:
    """Its tars are packed, and it reads what was packed. Class names become numbers."""
    with webdataset.ShardWriter(str(tmp_path / "theirs-%04d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(6):
            writer.write({"__key__": f"k{number}", "png": pixels(number), "cls": CLASSES[number % 3]})
    names = tmp_path / "names.txt"
    names.write_text("cat\nbee\nant\n")
    pattern = str(tmp_path / "theirs-{0000..0001}.tar")
    manifest = packed(pattern, tmp_path / "ours", "--class-names", str(names), codec=codec)
    assert manifest.class_names == ["cat", "bee", "ant"]
    urls = sorted(str(path) for path in (tmp_path / "ours").glob("*.tar"))
    extension = {"raw": "npy", "jpeg": "jpg"}.get(codec, codec)
    theirs = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("__key__", extension, "cls")
    read = {int(key): (image, label) for key, image, label in theirs}
    assert {number: label for number, (_, label) in read.items()} == {0: 2, 1: 1, 2: 0, 3: 2, 4: 1, 5: 0}
    for number, (image, _) in read.items():
        expected = center_crop(pixels(number), RESOLUTION)
        if codec == "jpeg":
            assert np.abs(image.astype(int) - expected).mean() < 12
        else:
            np.testing.assert_array_equal(image, expected)
    again = packed(tmp_path / "ours" / "*.tar", tmp_path / "again")  # raw members are images as well
    assert (again.total, again.num_classes, again.class_names) == (6, 3, None)


def test_tables_with_paths_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in range(3):
        (tmp_path / "data" / f"{number}.png").write_bytes(stored(pixels(number)))
    rows = [("data/2.png", 4), ("data/0.png", 1), (str(tmp_path / "data" / "1.png"), 0), ("data/gone.png", 2)]
    (tmp_path / "a.csv").write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in rows))
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"path": path, "label": label}) + "\n" for path, label in rows)
    )
    for name in ("a.csv", "a.jsonl"):
        output = tmp_path / f"{name}.out"
        manifest = packed(tmp_path / name, output)
        written = samples(output)
        assert manifest.bad == [BadInput(f"{tmp_path}/data/gone.png", "cannot be read (No such file or directory)")]
        assert (manifest.num_classes, manifest.class_names) == (5, None)
        for number, (image, label) in enumerate([(2, 4), (0, 1), (1, 0)]):
            expected = center_crop(pixels(image), RESOLUTION)
            np.testing.assert_array_equal(decode(written[number]["npy"], "npy"), expected)
            assert written[number]["cls"] == str(label).encode()


def test_images_without_labels(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.png").write_bytes(stored(pixels(number)))
    os.mkfifo(tmp_path / "in" / "pipe.png")
    manifest = packed(tmp_path / "in", tmp_path / "out", codec="webp")
    assert (manifest.num_classes, manifest.class_names, manifest.total) == (0, None, 3)
    assert manifest.bad == [BadInput(f"{tmp_path}/in/pipe.png", "is no regular file")]
    assert {extension for sample in samples(tmp_path / "out").values() for extension in sample} == {"webp"}
    assert ShardSet.open(tmp_path / "out", 0).num_samples == 3


def test_names_in_tars_are_no_paths(tmp_path: Path) -> None:
    inside = tmp_path / "a" / "b" / "c"
    inside.mkdir(parents=True)
    image = stored(pixels(1))
    members = [("../../x.png", image), ("/../../y.png", image), (f"{tmp_path}/z.png", image)]
    (inside / "in.tar").write_bytes(tar_bytes(*members))
    (inside / "inner.tar").write_bytes(tar_bytes(("../../n01.tar", tar_bytes(*members))))
    for name in ("in", "inner"):
        assert packed(inside / f"{name}.tar", inside / name, codec="original").total == 3
        assert {key for sample in samples(inside / name).values() for key in sample} <= {"png", "cls"}
    assert Manifest.read(inside / "inner" / "manifest.json").class_names == ["n01"]
    outside = {path for path in tmp_path.rglob("*") if inside not in (path, *path.parents)}
    assert outside == {tmp_path / "a", tmp_path / "a" / "b"}


# Parts, interruptions


def test_parts_at_once_do_what_one_does(tree: Path, clean: Path, tmp_path: Path) -> None:
    """They begin together, so that all make a plan, and end about together, so that several finish."""
    parts = [start(command(tree, tmp_path / "out", "--part", f"{part}/3", "--workers", "1")) for part in (1, 2, 3)]
    ends = [finish(part) for part in parts]
    assert [code for code, _, _ in ends] == [0, 0, 0], ends
    assert any("done:" in out for _, out, _ in ends)
    assert contents(tmp_path / "out") == contents(clean)


def test_parts_in_turn_do_what_one_does(tree: Path, clean: Path, tmp_path: Path) -> None:
    """From other folders, too: the plan knows what a relative path meant."""
    output = tmp_path / "out"
    here = os.path.relpath(tree, ROOT)
    code, out, _ = finish(start(command(here, output, "--part", "2/2")))
    assert (code, (output / "manifest.json").exists()) == (0, False)
    assert "part 2/2 is done; 6 of 11 shards are left to other parts" in out
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
    (clean / ".packing").mkdir()  # as if killed between the manifest and this
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
    assert finish(start(command(tree, output, "--part", "1/3")))[0] == 0
    before = contents(output)
    message = refused(*command(tree, output, "--seed", "4", codec="webp"))
    assert "was begun with --codec raw --seed 0, not with --codec webp --seed 4; give the same options" in message
    assert "--input" in refused(*command(tree / "ant", output))
    assert contents(output) == before
    (output / ".packing" / "inputs.npz").write_bytes(b"")
    assert "inputs.npz is not what plan.json describes; remove it" in refused(*command(tree, output)).replace(")", "")


def test_a_shard_that_got_lost_is_written_again(tree: Path, clean: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert finish(start(command(tree, output, "--part", "1/3")))[0] == 0
    (output / "shard-000000.tar").write_bytes(b"")
    (output / "shard-000003.index.npy").unlink()
    (output / ".packing" / "shard-000006.json").write_text("{")
    packed(tree, output)
    assert contents(output) == contents(clean)


def meanwhile(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Let something happen while a task looks for its images."""

    def find(*arguments: Any) -> SourceTable:
        monkeypatch.undo()
        action()
        return find_sources(*arguments)

    monkeypatch.setattr(packing_job, "find_sources", find)


def test_of_two_plans_the_first_holds(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = PackingOptions([str(tree)], "raw", RESOLUTION, PER_SHARD, 0, None)
    theirs = replace(ours, seed=5)
    for number, (first, second) in enumerate([(ours, ours), (theirs, ours)]):
        output = tmp_path / str(number)
        meanwhile(monkeypatch, partial(PackingJob.begin, output, first))
        if first == second:
            assert PackingJob.begin(output, second).num_shards == 11
        else:
            with pytest.raises(DataError, match="was begun with --seed 5, not with --seed 0"):
                PackingJob.begin(output, second)
        plan = json.loads((output / ".packing" / "plan.json").read_text())
        assert plan["options"]["seed"] == first.seed
        assert {path.name for path in output.rglob("*")} == {".packing", "plan.json", "inputs.npz"}


def test_a_task_that_comes_too_late_finds_the_job_done(
    tree: Path, clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Others planned, packed and removed their plan while it looked for its images."""
    spec = importlib.util.spec_from_file_location("make_shards", ROOT / "tools" / "make_shards.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    line = command(tree, tmp_path / "out")
    meanwhile(monkeypatch, lambda: packed(tree, tmp_path / "out"))
    monkeypatch.setattr(sys, "argv", line[1:])
    try:
        assert tool.main() == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert "is there already" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(clean)


def committed(output: Path) -> dict[str, int]:
    """Finished shards, and when they were written."""
    records = output.glob(".packing/shard-*.json")
    tars = [output / f"{record.stem}.tar" for record in records]
    return {tar.name: tar.stat().st_mtime_ns for tar in tars}


def begun(process: subprocess.Popen[str], output: Path, shards: int) -> None:
    """Wait until so many shards are finished, or the process is."""
    while process.poll() is None and len(committed(output)) < shards:
        time.sleep(0.002)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An input that takes a while (21 shards, about 0.1 s each), and what an undisturbed command makes of it."""
    tree = write_tree(tmp_path_factory.mktemp("slow") / "photos", dirty=True)
    large = [stored(pixels(number, 1400, 1300 + number)) for number in range(4)]
    for number, path in enumerate(sorted(tree.rglob("*.png"))):
        if path.stat().st_size > 500:  # the spoiled ones stay
            path.write_bytes(large[number % 4])
    packed(tree, tree.parent / "clean", *SLOW)
    return tree, tree.parent / "clean"


def kill_and_go_on(tree: Path, output: Path, kills: int, rng: random.Random) -> list[int]:
    """Kill the whole group at random moments until the job is done, at most `kills` times; finished shards at each."""
    killed = []
    while not (output / "manifest.json").exists():
        process = start(command(tree, output, *SLOW))
        before = committed(output)
        if len(killed) < kills:
            if killed and rng.random() < 0.8:
                begun(process, output, len(before) + rng.randrange(1, 4))
                time.sleep(rng.uniform(0.0, 0.1))
            else:  # while it starts, maybe while the plan is made
                time.sleep(rng.uniform(0.1, 0.5))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                killed.append(len(committed(output)))
            for path in output.glob("*.tar"):
                scan_tar(path)  # what has its name is whole
        finish(process)
        after = committed(output)
        if not (output / "manifest.json").exists():
            assert {name: after.get(name) for name in before} == before, "a finished shard was written again"
    code, _, errors = finish(start(command(tree, output, *SLOW)))  # what a kill after the manifest left is removed now
    assert (code, errors) == (0, "")
    return killed


def test_a_killed_job_ends_as_if_nothing_had_happened(slow: tuple[Path, Path], tmp_path: Path) -> None:
    tree, clean = slow
    killed = kill_and_go_on(tree, tmp_path / "out", 3, random.Random(1))
    assert len(killed) == 3
    assert any(0 < finished < 21 for finished in killed), killed
    assert contents(tmp_path / "out") == contents(clean)


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
    """The forks of its server."""
    return [pid for child in children_of(process.pid) for pid in children_of(child)]


def test_a_worker_that_dies_is_named_and_nothing_is_lost(slow: tuple[Path, Path], tmp_path: Path) -> None:
    tree, clean = slow
    process = start(command(tree, tmp_path / "out", *SLOW))
    begun(process, tmp_path / "out", 2)
    victim = workers_of(process)[0]
    os.kill(victim, signal.SIGKILL)
    code, _, errors = finish(process)
    assert code == 2
    assert errors.startswith(f"error: worker process {victim}: was killed by SIGKILL (often: too little memory)")
    assert "give the same command again to go on, maybe with fewer --workers than 2" in errors
    assert "\n" not in errors
    assert group_ended(process.pid)
    before = committed(tmp_path / "out")
    assert len(before) >= 2
    packed(tree, tmp_path / "out", *SLOW)
    assert contents(tmp_path / "out") == contents(clean)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_cleanly(slow: tuple[Path, Path], tmp_path: Path, number: signal.Signals) -> None:
    """To the whole group, as a terminal and some schedulers send it."""
    tree, clean = slow
    process = start(command(tree, tmp_path / "out", *SLOW))
    begun(process, tmp_path / "out", 1)
    os.killpg(process.pid, number)
    code, _, errors = finish(process)
    assert code == 75, errors
    assert errors == f"{tmp_path}/out: stopped by {number.name}; give the same command again to go on"
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


# What is refused


def test_too_many_bad_images_stop_the_job(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "in", dirty=False)
    for number in range(PER_CLASS - 2):
        (tree / "bee" / f"{number:02d}.png").write_bytes(b"no image")
    output = tmp_path / "out"
    message = refused(*command(tree, output))
    count = int(message.removeprefix(f"error: {output}: ").split()[0])
    assert 10 < count <= PER_CLASS - 2
    assert f"{count} of 42 images cannot be used, the limit is 10 ({tree}/bee/" in message
    assert f"--max-bad {count} or more" in message
    before = committed(output)
    manifest = packed(tree, output, "--max-bad", str(PER_CLASS - 2))
    assert len(manifest.bad) == PER_CLASS - 2
    assert all((output / name).stat().st_mtime_ns == when for name, when in before.items())
    packed(tree, tmp_path / "at_once", "--max-bad", str(PER_CLASS - 2))
    assert contents(tmp_path / "at_once") == contents(output)


def test_a_job_of_nothing_but_bad_images_stops_long_before_its_end(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(600):
        (tmp_path / "in" / f"{number}.png").write_bytes(b"no image")
    message = refused(*command(tmp_path / "in", tmp_path / "out", "--samples-per-shard", "1000"))
    assert int(message.removeprefix(f"error: {tmp_path}/out: ").split()[0]) < 100


def test_bad_images_of_other_parts_count(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "in", dirty=False)
    for name in ("ant", "bee", "cat"):
        for number in range(PER_CLASS - 1):
            (tree / name / f"{number:02d}.png").write_bytes(b"no image")
    output = tmp_path / "out"
    assert finish(start(command(tree, output, "--part", "1/2", "--max-bad", "100")))[0] == 0
    found = len(json.loads(next(output.glob(".packing/shard-*.json")).read_text())["bad"])
    assert found
    message = refused(*command(tree, output, "--part", "2/2", "--max-bad", "15"))
    assert len(committed(output)) == 6  # not one of part 2
    assert "the limit is 15" in message


def test_how_many_may_be_bad_by_default() -> None:
    assert [default_most_bad(images) for images in (1, 100_000, 110_000, 1_281_167)] == [10, 10, 11, 128]


def test_nothing_but_bad_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("path\ngone.png\n")
    assert "not one of 1 images can be used" in refused(*command(tmp_path / "a.csv", tmp_path / "out"))


def test_mistakes_get_one_line(tree: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("x.png,1\n")
    assert "no/where: there is no such file or folder" in refused(*command("no/where", output))
    assert "empty: holds neither images" in refused(*command(tmp_path / "empty", output))
    assert "line 1: no column 'path'" in refused(*command(tmp_path / "a.csv", output))
    assert "'0/4' is not I/N" in refused(*command(tree, output, "--part", "0/4"))
    assert "'5/4' is not I/N" in refused(*command(tree, output, "--part", "5/4"))
    assert "'gif' (choose from" in refused(*command(tree, output, codec="gif"))
    assert "resolution 0: is not in 1..13377" in refused(*command(tree, output, "--resolution", "0"))
    assert "'0' is not a positive integer" in refused(*command(tree, output, "--workers", "0"))
    assert "required: --input, --output" in refused(*command(tree, output)[:2])
    assert list(output.glob("**/*.tar")) == []
    (tmp_path / "file").write_bytes(b"")
    assert "cannot be written to (Not a directory)" in refused(*command(tree, tmp_path / "file" / "out"))
    (output / "old.tar").write_bytes(b"")
    assert "old.tar: is there, but no job that wrote it" in refused(*command(tree, output))


def test_what_does_not_fit_is_refused_before_it_is_written(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("path\n" + "x.png\n" * 200_000)
    message = refused(*command(tmp_path / "a.csv", tmp_path / "out", "--resolution", "13000"))
    assert "101TB to write" in message
    options = PackingOptions([str(tmp_path / "in")], "raw", RESOLUTION, PER_SHARD, 0, None)
    write_tree(tmp_path / "in", dirty=False)
    job = PackingJob.begin(tmp_path / "exact", options)
    needed = job.bytes_to_write()
    job.run(job.shards_of(1, 1), 1, 0, lambda images, stored_bytes: None)
    manifest = job.finish(0)
    assert manifest is not None
    assert needed == sum(shard.bytes for shard in manifest.shards)


def test_torch_is_loaded_once_for_all_workers(slow: tuple[Path, Path], tmp_path: Path) -> None:
    """webdataset imports it: 200 MB in each worker, if they did not share that memory. The main process is without."""
    process = start(command(slow[0], tmp_path / "out", *SLOW))
    begun(process, tmp_path / "out", 1)
    for pid in workers_of(process):
        assert "libtorch" in Path(f"/proc/{pid}/maps").read_text()
        sizes = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]]
        assert sum(int(size) for name, size, *_ in sizes if name.startswith("Private_")) < 150_000  # kB
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
    process.kill()
    finish(process)


def test_help_shows_the_usual_commands() -> None:
    code, out, _ = finish(start([sys.executable, str(ROOT / "tools" / "make_shards.py"), "--help"]))
    assert code == 0
    assert "ILSVRC2012_img_train.tar" in out
    assert "--part $SLURM_ARRAY_TASK_ID/16" in out
