"""The statistics of real images: computed once, kept, and resumed after a kill, by any number of ranks."""

import json
import shutil
import time
from typing import Any

import numpy as np
import pytest

from jitscale.files import exclusive
from jitscale.preparation.array_shards import write_shards
from jitscale.preparation.digits import DIGIT_CLASSES, digit_images
from tests.support.evaluations import Evaluation
from tests.support.processes import run_ranks, start_ranks
from tests.support.runs import zero_samples


def test_concurrent_runs_compute_real_images_once(evaluation: Evaluation, alone: dict[str, Any]) -> None:
    """Both runs wait while a third one holds the lock, as a computing run does. Then one of them computes."""
    (name,) = (path.name for path in (evaluation.folder / "shards/real_images").iterdir() if path.name.startswith("d"))
    shards = evaluation.folder / "side_by_side_shards"
    shutil.copytree(evaluation.folder / "shards", shards, ignore=shutil.ignore_patterns("real_images"))
    folder = shards / "real_images" / name
    folder.mkdir(parents=True)
    commands = [evaluation.command(f"side_{side}", f"evaluation.reference={shards}") for side in "ab"]
    with exclusive(folder / ".lock", ""):
        ranks = [rank for command in commands for rank in start_ranks(2, *command)]
        said = ""
        while said.count("another run computes the statistics of these real images; waiting") < 1:
            line = ranks[0].stdout.readline()  # type: ignore[union-attr]
            assert line, said
            said += line
        assert not (folder / "facts.json").exists()
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 4, outputs
    assert sum("real images, digits" in output for output in (said + outputs[0], outputs[2])) == 1
    assert {path.name for path in folder.iterdir()} == {".lock", "statistics.npz", "features.npy", "facts.json"}
    for side in "ab":
        result = json.loads((evaluation.folder / f"side_{side}/result.json").read_text())
        source = {"source": str(shards)}
        assert {**result, "reference": {**result["reference"], **source}} == {
            **alone,
            "reference": {**alone["reference"], **source},
        }
    (folder / "features.npy").write_bytes((folder / "features.npy").read_bytes()[:-1] + b"x")
    assert "features.npy has changed since it was written" in run_ranks(1, *commands[0], expect=2)


@pytest.mark.slow
def test_real_images_resume_after_a_kill(evaluation: Evaluation, alone: dict[str, Any]) -> None:
    """Finished parts are not computed again, even by another number of ranks. The result is bit-equal."""
    shards = evaluation.folder / "killed_shards"
    images, labels = digit_images(16)
    write_shards(images[:900], labels[:900], shards, samples_per_shard=300, class_names=DIGIT_CLASSES)
    asked = f"evaluation.reference={shards}"
    whole = evaluation.run("whole", asked, f"evaluation.cache_dir={evaluation.folder / 'whole_cache'}")

    ranks = start_ranks(2, *evaluation.command("killed", asked))
    while len(parts := sorted(shards.glob("real_images/*/part_*.npz"))) < 2:
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.001)
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.communicate()
    assert len(list(shards.glob("real_images/*/part_*.npz"))) < 8, "the kill came in the middle of the parts"
    shutil.copytree(shards, evaluation.folder / "changed_shards")
    result = evaluation.run("killed", asked, world_size=3)
    assert result == whole
    left = {path.name for path in shards.glob("real_images/*/*")}
    assert left == {".lock", "statistics.npz", "features.npy", "facts.json"}, "the parts are removed at the end"
    (changed,) = (evaluation.folder / "changed_shards").glob(f"real_images/*/{parts[0].name}")
    content = dict(np.load(changed))
    np.savez(changed, **{**content, "features/real_features_sum": content["features/real_features_sum"] + 100.0})
    other = evaluation.run("changed", f"evaluation.reference={evaluation.folder / 'changed_shards'}")
    assert other["fid_floor"] > whole["fid_floor"], "a finished part is used without change"


def test_real_images_are_kept_in_a_writable_folder(evaluation: Evaluation, alone: dict[str, Any]) -> None:
    """They lie in evaluation.cache_dir, or in the run's folder if the folder of the shards is not writable."""
    shards = evaluation.folder / "unwritable_shards"
    shutil.copytree(evaluation.folder / "shards", shards, ignore=shutil.ignore_patterns("real_images"))
    (shards / "real_images").write_text("a file, where even root can make no folder")
    own = evaluation.run("own_cache", f"evaluation.reference={shards}")
    assert list((evaluation.folder / "own_cache/evaluation/real_images").glob("digits_*/facts.json"))
    asked = evaluation.folder / "asked_for"
    there = evaluation.run("asked", f"evaluation.reference={shards}", f"evaluation.cache_dir={asked}")
    assert list(asked.glob("digits_*/facts.json"))
    assert own["fid"] == there["fid"] == alone["fid"]
    command = evaluation.command("bad", f"evaluation.cache_dir={shards / 'real_images' / 'below'}")
    assert "cannot be used" in run_ranks(1, *command, expect=2)


def test_a_bad_reference_image_on_another_rank_is_reported(evaluation: Evaluation) -> None:
    """Rank 1 has the block of the bad image. Rank 0 must neither wait for ever nor lose the message."""
    folder = evaluation.folder / "bad_reference"
    shutil.copytree(evaluation.folder / "shards", folder, ignore=shutil.ignore_patterns("real_images"))
    tar = sorted(folder.glob("*.tar"))[0]
    zero_samples(tar, slice(9, 10))
    offset = np.load(tar.with_suffix(".index.npy"))[9]["offset"]
    command = evaluation.command("bad", f"evaluation.reference={folder}")
    said = run_ranks(2, *command, expect=2)
    assert f"error: {tar}: byte {offset}: sample 9 cannot be decoded" in said
