"""Held-out samples: how they are chosen, and that training never reads them."""

import pickle
import re
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from jitscale.config import load_config, to_yaml
from jitscale.data.find import find_tars
from jitscale.data.loader import ShardLoader
from jitscale.data.manifest import MANIFEST
from jitscale.data.order import EpochOrder
from jitscale.data.shards import open_training_shards
from jitscale.data.tar_index import TarSample, key_hashes, keys_path
from jitscale.errors import ConfigError, DataError
from jitscale.keyed_random import Purpose, uniform
from jitscale.preparation.packing import shard_name
from jitscale.preparation.survey import survey
from jitscale.preparation.verification import verify
from tests.data.held_out_shards import COUNT, config_of, damage, held, members, write
from tests.support.servers import serving


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 samples in uneven shards."""
    return write(tmp_path_factory.mktemp("held") / "shards", list(range(COUNT)), 35)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples from 100 on, in shards of their own. The samples before 100 are the training samples of `fewer`."""
    return write(tmp_path_factory.mktemp("held") / "other", list(range(100, COUNT)), 7)


@pytest.fixture(scope="module")
def fewer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("held") / "fewer", list(range(100)), 35)


@pytest.mark.parametrize("variant", ["fraction", "shards"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_no_position_of_three_epochs_is_held_out(
    folder: Path, fewer: Path, other: Path, variant: str, workers: int
) -> None:
    """The real loader reads the shards on two ranks. Each sample that is not held out appears once an epoch."""
    shards = open_training_shards(config_of(folder, "0.2") if variant == "fraction" else config_of(fewer, str(other)))
    hidden = held(shards)
    assert 12 < len(hidden) < 36
    assert shards.held_out is not None
    assert shards.num_samples + shards.held_out.num_samples == COUNT
    order = EpochOrder(shards.samples_per_shard, seed=1, streams=4, window=8)
    labels: dict[int, int] = {}
    for rank in range(2):
        loader = ShardLoader(shards, order, 2, 1, rank, 2, 0, workers, pin_memory=False)
        for batch in islice(loader, -(-3 * shards.num_samples // 2)):
            labels[int(batch.positions)] = int(batch.labels)
    sequence = [labels[position] for position in range(3 * shards.num_samples)]
    expected = sorted(set(range(COUNT)) - hidden)
    for epoch in range(3):
        assert sorted(sequence[epoch * len(expected) : (epoch + 1) * len(expected)]) == expected


def test_replacements_are_never_held_out_samples(tmp_path: Path) -> None:
    """Half of the samples are held out, and half of the remaining ones cannot be decoded."""
    whole = write(tmp_path / "shards", list(range(COUNT)), 35, codec="png")
    training = members(open_training_shards(config_of(whole, "0.5")))
    bad = set(training[1::2])
    for number in bad:
        damage(whole / shard_name(number // 35), number % 35)
    shards = open_training_shards(config_of(whole, "0.5"))
    hidden = held(shards)
    order = EpochOrder(shards.samples_per_shard, seed=1)
    loader = ShardLoader(shards, order, len(training), len(training), 0, 1, 0, 0, pin_memory=False)
    (batch,) = islice(loader, 1)
    assert len(batch.bad_samples) >= len(bad)
    assert set(batch.labels.tolist()) <= set(training) - bad
    assert hidden.isdisjoint(batch.labels.tolist())


def test_the_choice_depends_on_the_keys_alone(folder: Path, tmp_path: Path) -> None:
    """The choice ignores the order, the shards, the image size and the seed, and whether only a part is packed."""
    chosen = held(open_training_shards(config_of(folder, "0.2")))
    shuffled = np.random.default_rng(0).permutation(COUNT).tolist()
    assert held(open_training_shards(config_of(write(tmp_path / "again", shuffled, 50), "0.2"))) == chosen
    larger = config_of(write(tmp_path / "8", shuffled, 11, size=8).with_name("{resolution}"), "0.2", size=8)
    larger.run.seed = 5
    assert held(open_training_shards(larger)) == chosen
    part = write(tmp_path / "part", list(range(40, 90)), 9)
    assert held(open_training_shards(config_of(part, "0.2"))) == chosen & set(range(40, 90))
    assert (
        held(open_training_shards(config_of(folder, "0.1")))
        < chosen
        < held(open_training_shards(config_of(folder, "0.5")))
    )


def test_the_held_out_share_equals_the_fraction() -> None:
    """The share of 20,000 keys is exact within four standard deviations."""
    keys = key_hashes([TarSample(f"n{number % 100:08d}_{number}", 0, 0, "png", None, 0) for number in range(20_000)])
    assert len(set(keys.tolist())) == 20_000
    chosen = int((uniform(0, Purpose.HELD_OUT, keys) < 0.01).sum())
    assert abs(chosen - 200) < 4 * np.sqrt(200)


def test_the_choice_never_changes(folder: Path) -> None:
    """Every checkpoint depends on this choice."""
    expected = [1, 9, 21, 22, 32, 37, 38, 39, 61, 62, 67, 80, 84, 113, 119]
    assert sorted(held(open_training_shards(config_of(folder, "0.1")))) == expected


def test_without_held_out_samples_nothing_changes(folder: Path) -> None:
    shards = open_training_shards(config_of(folder))
    assert shards.held_out is None
    assert members(shards) == list(range(COUNT))
    assert shards.samples_per_shard.tolist() == [35, 35, 35, 15]
    assert shards.manifest_hash == open_training_shards(config_of(folder, "0.2")).manifest_hash


def test_keys_are_read_next_to_the_tars_or_from_their_headers(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Shards of an older version have no keys, and foreign tars have no manifest. Damaged keys are refused."""
    caplog.set_level("INFO")
    chosen = held(open_training_shards(config_of(folder, "0.2")))
    assert "have no keys" not in caplog.text
    older = shutil.copytree(folder, tmp_path / "older")
    for path in older.glob("*.keys.npy"):
        path.unlink()
    assert held(open_training_shards(config_of(older, "0.2"))) == chosen
    assert re.search(r"4 of 4 shards, such as .*older/shard-000000.tar, have no keys", caplog.text)
    assert verify(find_tars(str(older)), 1).defects == []
    survey(find_tars(str(older)), None, 1).write()
    assert all(
        keys_path(path).read_bytes() == keys_path(folder / path.name).read_bytes() for path in older.glob("*.tar")
    )
    (older / MANIFEST).unlink()
    keys = np.load(keys_path(older / shard_name(0)))
    # If no manifest names the tar, the stored keys are not trusted.
    np.save(keys_path(older / shard_name(0)), keys + np.uint64(1))
    assert held(open_training_shards(config_of(older, "0.2"))) == chosen
    shutil.copy(folder / MANIFEST, older)
    found = [str(defect) for defect in verify(find_tars(str(older)), 1).defects]
    assert len(found) == 1
    assert "shard-000000.keys.npy differs in 35 of 35 samples, first in 0" in found[0]
    np.save(keys_path(older / shard_name(0)), keys[1:])
    with pytest.raises(DataError, match=r"shard-000000.keys.npy: holds uint64 \(34,\), not the keys of 35.* --force$"):
        open_training_shards(config_of(older, "0.2"))


def test_a_fraction_of_remote_shards_needs_their_keys(folder: Path, tmp_path: Path) -> None:
    served = shutil.copytree(folder, tmp_path / "served")
    with serving(served) as url:
        config = config_of(url, "0.2")
        config.data.cache_dir = str(tmp_path / "cache")
        shards = open_training_shards(config)
        local = open_training_shards(config_of(folder, "0.2"))
        assert held(shards) == held(local)
        assert members(shards) == members(local)
        keys_path(served / shard_name(2)).unlink()
        with pytest.raises(
            DataError, match=r"data.held_out: .*shard-000002.keys.npy: there is no such file; .*or name"
        ):
            open_training_shards(config)


def test_workers_receive_no_held_out_samples(folder: Path) -> None:
    shards = open_training_shards(config_of(folder, "0.2"))
    sent = pickle.loads(pickle.dumps(shards))
    assert sent.held_out is None
    assert members(sent) == members(shards)


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        ("0.00001", r"data.held_out=1e-05: chooses none of 120 samples; raise it"),
        ("0.99999", r"data.held_out=0.99999: leaves none of 120 samples to train on; lower it"),
        ("absent", r"data.held_out: absent: missing .* copy it again or correct data.held_out$"),
        ("SHARDS", r"data.held_out: .*shard-000000.tar is trained on as .*shard-000000.tar of data.shards; name"),
        ("SHARDS/shard-000003.tar", r"data.held_out: .*shard-000003.tar is trained on as "),
        ("LINK/shard-000001.tar", r"data.held_out: .*shard-000001.tar is trained on as .*shards/shard-000001.tar"),
        ("COPY/shard-000002.tar", r"data.held_out: .*copy/shard-000002.tar is trained on as .*shards/shard-000002.tar"),
        ("NAMED", r"data.held_out: class 0 is 'class 1' here and 'class 0' in data.shards; a label must mean"),
        ("FEW", rf"data.held_out: names {COUNT - 1} classes, and data.shards names {COUNT}; a label must mean"),
    ],
)
def test_refusals(folder: Path, other: Path, tmp_path: Path, held_out: str, message: str) -> None:
    named, few = tmp_path / "named", tmp_path / "few"
    for source, target in ((folder, tmp_path / "shards"), (folder, tmp_path / "copy"), (other, named), (other, few)):
        shutil.copytree(source, target)
    (tmp_path / "link").mkdir()
    for path in folder.glob("shard-*.tar"):  # Without a manifest there are no hashes.
        (tmp_path / "link" / path.name).hardlink_to(tmp_path / "shards" / path.name)
    for number, where in ((0, tmp_path / "shards"), (1, named), (0, few)):
        text = (where / MANIFEST).read_text().replace('"class_names": null', f'"class_names": {names(number)}')
        (where / MANIFEST).write_text(text)
    text = (few / MANIFEST).read_text().replace(f', "class {COUNT - 1}"', "")
    (few / MANIFEST).write_text(text.replace(f'"num_classes": {COUNT}', f'"num_classes": {COUNT - 1}'))
    for short, path in (("SHARDS", "shards"), ("LINK", "link"), ("COPY", "copy"), ("NAMED", "named"), ("FEW", "few")):
        held_out = held_out.replace(short, str(tmp_path / path))
    with pytest.raises(DataError, match=message) as refused:
        open_training_shards(config_of(tmp_path / "shards", held_out))
    assert "\n" not in str(refused.value)


def names(first: int) -> str:
    return str([f"class {number}" for number in range(first, first + COUNT)]).replace("'", '"')


def test_held_out_images_that_cannot_be_decoded_are_refused_at_the_start(fewer: Path, tmp_path: Path) -> None:
    broken = write(tmp_path / "broken", list(range(100, 105)), 5, codec="png")
    for sample in range(5):
        damage(broken / shard_name(0), sample)
    with pytest.raises(DataError, match=r"data.held_out: .*sample 0 cannot be decoded"):
        open_training_shards(config_of(fewer, str(broken)))
    partly = write(tmp_path / "partly", list(range(COUNT)), COUNT, codec="png")
    for number in held(open_training_shards(config_of(partly, "0.1"))):
        damage(partly / shard_name(0), number)
    with pytest.raises(DataError, match=r"sample 1 cannot be decoded"):
        open_training_shards(config_of(partly, "0.1"))
    open_training_shards(config_of(partly))


def test_the_setting_is_a_number_or_a_text(tmp_path: Path) -> None:
    """The value can come from YAML and from the command line, and it survives being stored."""
    (tmp_path / "bare.yaml").write_text("run: {max_steps: 1}")
    for text, expected in (("0.01", "0.01"), ("1e-3", "0.001"), ("/data/val", "/data/val")):
        (tmp_path / "file.yaml").write_text(f"data: {{held_out: {text}}}\nrun: {{max_steps: 1}}")
        assert load_config(tmp_path / "file.yaml").data.held_out == expected
        assert load_config(tmp_path / "bare.yaml", [f"data.held_out={text}"]).data.held_out == text
    (tmp_path / "again.yaml").write_text(to_yaml(config_of("", "0.25")).replace("max_steps: null", "max_steps: 1"))
    assert load_config(tmp_path / "again.yaml").data.held_out == "0.25"
    for held_out, shown in (("0", "0"), ("1.0", "1.0"), ("-0.1", "-0.1"), ("nan", "nan")):
        said = rf"data\.held_out={shown} must be a fraction in \(0, 1\), or name shards; for example 0\.01"
        with pytest.raises(ConfigError, match=said):
            load_config(tmp_path / "bare.yaml", [f"data.held_out={held_out}"])
    for override, message in (
        ("evaluation.held_out_every_images=8", "evaluation.held_out_every_images=8 measures held-out samples, and"),
        ("evaluation.held_out_every_images=-1", "evaluation.held_out_every_images=-1 must be at least 0"),
    ):
        with pytest.raises(ConfigError) as refused:
            load_config(tmp_path / "bare.yaml", [override])
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)
