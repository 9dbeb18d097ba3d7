"""A run stores the names of its classes. Data that number them differently are refused by every command.

The tars are the same under every order: only the manifest holds the names, as for tars that were only indexed.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jitscale.checkpoints.format import Checkpoint, complete_checkpoints
from jitscale.data.class_order import refuse_other_classes
from jitscale.data.manifest import MANIFEST
from jitscale.errors import DataError
from jitscale.preparation.array_shards import write_shards
from jitscale.preparation.digits import digit_images
from tests.support.processes import run_ranks
from tests.support.tiny import model_yaml
from tools.convert_checkpoint import main as convert
from tools.sample import main as sample

CONFIG = f"""
{model_yaml()}
data: {{batch_size: 8, num_workers: 0, window: 16}}
engine: {{precision: fp32}}
ema: {{decays: [0.9]}}
evaluation: {{features: digits, weights: model, num_images: 16, block_size: 16, steps: 1, method: euler, at_end: false}}
run: {{max_steps: 1, device: cpu}}
"""
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SWAPPED = [*NAMES[:3], "four", "three", *NAMES[5:]]
DIFFERENCE = "class 3 is 'four' here and 'three' in {}"


class Runs:
    """Runs on digits. One of them is trained."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        images, labels = digit_images(16)
        write_shards(images[:64], labels[:64], folder / "shards", samples_per_shard=64, class_names=NAMES)
        self.renamed("swapped", SWAPPED)
        (folder / "config.yaml").write_text(CONFIG)
        self.train(f"run.dir={self.run}")

    def renamed(self, name: str, names: list[str] | None) -> None:
        """The same tars, with a manifest that orders the class names differently."""
        shutil.copytree(self.folder / "shards", self.folder / name)
        path = self.folder / name / MANIFEST
        path.write_text(json.dumps({**json.loads(path.read_text()), "class_names": names}))

    def train(self, *overrides: str, shards: str = "shards", expect: int = 0) -> str:
        data = f"data.shards={self.folder / shards}"
        return run_ranks(1, "-m", "jitscale.train", "--config", str(self.folder / "config.yaml"), data, *overrides,
                         expect=expect)  # fmt: skip

    def evaluate(self, *overrides: str, expect: int = 0) -> str:
        return run_ranks(1, "-m", "jitscale.evaluate", "--run", str(self.run), *overrides, expect=expect)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("order"))


def newest(run: Path) -> Checkpoint:
    return Checkpoint(complete_checkpoints(run)[-1])


def test_a_checkpoint_holds_the_names(runs: Runs) -> None:
    assert newest(runs.run).class_names == NAMES


def test_a_resume_on_data_of_another_order_is_refused(runs: Runs) -> None:
    """The same tars are refused too, also if new shards are accepted."""
    images = np.zeros((16, 16, 16, 3), np.uint8)
    write_shards(images, np.arange(16) % 10, runs.folder / "new", class_names=SWAPPED)
    checkpoint = newest(runs.run).path
    for shards, more in (("swapped", []), ("new", ["data.accept_new_shards=true"])):
        said = runs.train(f"run.dir={runs.run}", "run.max_steps=2", *more, shards=shards, expect=2)
        assert (
            f"error: {checkpoint}: class 3 is 'three' here and 'four' in data.shards; restore data.shards, or" in said
        )
    assert newest(runs.run).path == checkpoint


def test_names_stay_known_if_later_shards_have_none(runs: Runs) -> None:
    runs.renamed("unnamed", None)
    shutil.copytree(runs.run, runs.folder / "longer")
    runs.train(f"run.dir={runs.folder / 'longer'}", "run.max_steps=2", shards="unnamed")
    assert newest(runs.folder / "longer").progress.step == 2
    assert newest(runs.folder / "longer").class_names == NAMES


def test_an_evaluation_on_data_of_another_order_is_refused(runs: Runs) -> None:
    swapped = runs.folder / "swapped"
    said = runs.evaluate(f"evaluation.reference={swapped}", expect=2)
    assert f"error: evaluation.reference: {DIFFERENCE.format('the weights')}; a label must mean one thing" in said
    said = runs.evaluate(f"data.shards={swapped}", f"evaluation.reference={runs.folder / 'shards'}", expect=2)
    assert f"error: data.shards: {DIFFERENCE.format('the weights')}; a label must mean one thing" in said
    assert "fid" in runs.evaluate()


def test_a_run_does_not_begin_with_a_reference_of_another_order(runs: Runs) -> None:
    options = [f"evaluation.reference={runs.folder / 'swapped'}", "evaluation.every_images=8"]
    said = runs.train(f"run.dir={runs.folder / 'refused'}", *options, expect=2)
    assert f"evaluation.reference: {DIFFERENCE.format('data.shards')}; a label must mean one thing" in said
    assert not (runs.folder / "refused" / "config.yaml").exists()


def test_a_run_may_start_from_weights_of_other_classes_with_a_warning(runs: Runs) -> None:
    said = runs.train(f"run.dir={runs.folder / 'tuned'}", f"run.init_from={runs.run}", shards="swapped")
    assert "class 3 is 'three' here and 'four' in data.shards" in said
    assert newest(runs.folder / "tuned").class_names == SWAPPED


def test_a_converted_run_keeps_the_names(runs: Runs, tmp_path: Path) -> None:
    command = ["--checkpoint", str(runs.run), "--to", "run", "--output", str(tmp_path / "copy")]
    assert convert([*command, "--config", str(runs.run / "config.yaml")]) == 0
    assert newest(tmp_path / "copy").class_names == NAMES


def test_images_by_name_need_no_shards(runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(runs.run, moved := tmp_path / "run")
    config = next(moved.glob("checkpoints/*/config.yaml"))
    assert str(runs.folder / "shards") in config.read_text()
    (runs.folder / "shards").rename(runs.folder / "away")
    try:
        command = ["--checkpoint", str(moved), "--output", str(tmp_path / "out"), "--steps", "1", "--per-class", "1"]
        assert sample([*command, "--classes", "seven"]) == 0
    finally:
        (runs.folder / "away").rename(runs.folder / "shards")
    assert [path.name for path in tmp_path.glob("out/class_*")] == ["class_0007_id_00000007.png"]


@pytest.mark.parametrize("others", [None, ["a", "b"], ["a", "b", "c", "d"]])
def test_only_classes_that_both_sides_name_are_compared(others: list[str] | None) -> None:
    refuse_other_classes("here", ["a", "b", "c"], "there", others, "remedy")
    refuse_other_classes("here", others, "there", ["a", "b", "c"], "remedy")
    with pytest.raises(DataError, match=r"^here: class 1 is 'x' here and 'b' in there; remedy$"):
        refuse_other_classes("here", ["a", "x"], "there", ["a", "b", "c"], "remedy")
