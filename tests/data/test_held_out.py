"""Held-out samples: which ones they are, that no position of training reaches them, and the values of their loss."""

from __future__ import annotations

import pickle
import re
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from jitscale.config import Config, DataConfig, load_config, to_yaml
from jitscale.data.find import find_tars
from jitscale.data.images import encode
from jitscale.data.loader import ShardLoader
from jitscale.data.manifest import MANIFEST, Manifest
from jitscale.data.order import EpochOrder
from jitscale.data.packing import shard_name, write_shard
from jitscale.data.shards import ShardSet, open_configured
from jitscale.data.survey import survey
from jitscale.data.tar_index import TarSample, key_hashes, keys_path
from jitscale.data.verification import verify
from jitscale.errors import ConfigError, DataError
from jitscale.keyed_random import Float64Array, Purpose, generator_seeds, uniform
from jitscale.model.jit import JiT
from jitscale.parallel import World
from jitscale.training.held_out import TIMES, HeldOutLoss
from tests.support.servers import serving

COUNT = 120
CPU = World(0, 1, 0, torch.device("cpu"))


def write(folder: Path, numbers: list[int], per_shard: int, codec: str = "raw", size: int = 4) -> Path:
    """Shards of samples whose key, label and pixels are their numbers; the last column is one brighter."""
    folder.mkdir()
    records = []
    for shard, first in enumerate(range(0, len(numbers), per_shard)):
        samples = []
        for number in numbers[first : first + per_shard]:
            pixels = np.full((size, size, 3), number, np.uint8)
            pixels[:, -1] += 1
            extension, data = encode(pixels, codec)
            samples.append({"__key__": f"photo{number:05d}", extension: data, "cls": str(number).encode()})
        records.append(write_shard(folder / shard_name(shard), samples))
    Manifest(codec, size, COUNT, None, len(numbers), records).write(folder / MANIFEST)
    return folder


def config_of(shards: Path | str, held_out: str | None = None, size: int = 4) -> Config:
    config = Config(data=DataConfig(shards=str(shards), held_out=held_out))
    config.model.image_size, config.model.patch_size, config.model.num_classes = size, 2, COUNT
    return config


def members(shards: ShardSet) -> list[int]:
    """The numbers of a set's samples in its order; what is seen is what is labelled."""
    found = []
    for sample in range(shards.num_samples):
        image, label = shards.read(*shards.shard_and_index(sample))
        assert bool((image[:, :-1] == label).all())
        found.append(label)
    return found


def held(shards: ShardSet) -> set[int]:
    assert shards.held_out is not None
    return set(members(shards.held_out))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 samples in uneven shards."""
    return write(tmp_path_factory.mktemp("held") / "shards", list(range(COUNT)), 35)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples from 100 on, in shards of their own; the training ones of `fewer` are those before."""
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
    """Read by the real loader on two ranks; all others come once an epoch."""
    shards = open_configured(config_of(folder, "0.2") if variant == "fraction" else config_of(fewer, str(other)))
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


def test_stand_ins_are_not_held_out(tmp_path: Path) -> None:
    """Half of the samples is held out, and half of the others cannot be decoded."""
    whole = write(tmp_path / "shards", list(range(COUNT)), 35, codec="png")
    training = members(open_configured(config_of(whole, "0.5")))
    bad = set(training[1::2])
    for number in bad:
        damage(whole / shard_name(number // 35), number % 35)
    shards = open_configured(config_of(whole, "0.5"))
    hidden = held(shards)
    order = EpochOrder(shards.samples_per_shard, seed=1)
    loader = ShardLoader(shards, order, len(training), len(training), 0, 1, 0, 0, pin_memory=False)
    (batch,) = islice(loader, 1)
    assert len(batch.bad_samples) >= len(bad)
    assert set(batch.labels.tolist()) <= set(training) - bad
    assert hidden.isdisjoint(batch.labels.tolist())


def damage(tar: Path, sample: int) -> None:
    entry = np.load(tar.with_suffix(".index.npy"))[sample]
    with tar.open("r+b") as file:
        file.seek(int(entry["offset"]))
        file.write(bytes(int(entry["size"])))


def test_the_choice_belongs_to_the_keys(folder: Path, tmp_path: Path) -> None:
    """Packed in another order, in other shards, at another size, as a part, under another seed: the same samples."""
    chosen = held(open_configured(config_of(folder, "0.2")))
    shuffled = np.random.default_rng(0).permutation(COUNT).tolist()
    assert held(open_configured(config_of(write(tmp_path / "again", shuffled, 50), "0.2"))) == chosen
    larger = config_of(write(tmp_path / "8", shuffled, 11, size=8).with_name("{resolution}"), "0.2", size=8)
    larger.run.seed = 5
    assert held(open_configured(larger)) == chosen
    part = write(tmp_path / "part", list(range(40, 90)), 9)
    assert held(open_configured(config_of(part, "0.2"))) == chosen & set(range(40, 90))
    assert held(open_configured(config_of(folder, "0.1"))) < chosen < held(open_configured(config_of(folder, "0.5")))


def test_the_fraction_is_kept() -> None:
    """Of 20,000 keys, within four standard deviations."""
    keys = key_hashes([TarSample(f"n{number % 100:08d}_{number}", 0, 0, "png", None, 0) for number in range(20_000)])
    assert len(set(keys.tolist())) == 20_000
    chosen = int((uniform(0, Purpose.HELD_OUT, keys) < 0.01).sum())
    assert abs(chosen - 200) < 4 * np.sqrt(200)


def test_the_choice_never_changes(folder: Path) -> None:
    """It is part of every checkpoint's meaning."""
    expected = [1, 9, 21, 22, 32, 37, 38, 39, 61, 62, 67, 80, 84, 113, 119]
    assert sorted(held(open_configured(config_of(folder, "0.1")))) == expected


def test_without_held_out_samples_nothing_changes(folder: Path) -> None:
    shards = open_configured(config_of(folder))
    assert shards.held_out is None
    assert members(shards) == list(range(COUNT))
    assert shards.samples_per_shard.tolist() == [35, 35, 35, 15]
    assert shards.manifest_hash == open_configured(config_of(folder, "0.2")).manifest_hash


def test_keys_are_read_beside_the_tars_or_from_their_headers(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Shards that an older version packed have no keys; foreign ones have no manifest; damaged keys are refused."""
    caplog.set_level("INFO")
    chosen = held(open_configured(config_of(folder, "0.2")))
    assert "have no keys" not in caplog.text
    older = shutil.copytree(folder, tmp_path / "older")
    for path in older.glob("*.keys.npy"):
        path.unlink()
    assert held(open_configured(config_of(older, "0.2"))) == chosen
    assert re.search(r"4 of 4 shards, such as .*older/shard-000000.tar, have no keys", caplog.text)
    assert verify(find_tars(str(older)), 1).defects == []
    survey(find_tars(str(older)), None, 1).write()
    assert all(
        keys_path(path).read_bytes() == keys_path(folder / path.name).read_bytes() for path in older.glob("*.tar")
    )
    (older / MANIFEST).unlink()
    keys = np.load(keys_path(older / shard_name(0)))
    np.save(keys_path(older / shard_name(0)), keys + np.uint64(1))  # not believed where no manifest names the tar
    assert held(open_configured(config_of(older, "0.2"))) == chosen
    shutil.copy(folder / MANIFEST, older)
    found = [str(defect) for defect in verify(find_tars(str(older)), 1).defects]
    assert len(found) == 1
    assert "shard-000000.keys.npy differs in 35 of 35 samples, first in 0" in found[0]
    np.save(keys_path(older / shard_name(0)), keys[1:])
    with pytest.raises(DataError, match=r"shard-000000.keys.npy: holds uint64 \(34,\), not the keys of 35.* --force$"):
        open_configured(config_of(older, "0.2"))


def test_a_fraction_of_remote_shards_needs_their_keys(folder: Path, tmp_path: Path) -> None:
    served = shutil.copytree(folder, tmp_path / "served")
    with serving(served) as url:
        config = config_of(url, "0.2")
        config.data.cache_dir = str(tmp_path / "cache")
        shards = open_configured(config)
        local = open_configured(config_of(folder, "0.2"))
        assert held(shards) == held(local)
        assert members(shards) == members(local)
        keys_path(served / shard_name(2)).unlink()
        with pytest.raises(
            DataError, match=r"data.held_out: .*shard-000002.keys.npy: there is no such file; .*or name"
        ):
            open_configured(config)


def test_workers_get_no_held_out_samples(folder: Path) -> None:
    shards = open_configured(config_of(folder, "0.2"))
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
        ("NAMED", r"data.held_out: its manifest names other classes"),
    ],
)
def test_refusals(folder: Path, other: Path, tmp_path: Path, held_out: str, message: str) -> None:
    named = tmp_path / "named"
    for source, target in ((folder, tmp_path / "shards"), (folder, tmp_path / "copy"), (other, named)):
        shutil.copytree(source, target)
    (tmp_path / "link").mkdir()
    for path in folder.glob("shard-*.tar"):  # no manifest there, and so no hash
        (tmp_path / "link" / path.name).hardlink_to(tmp_path / "shards" / path.name)
    for number, where in enumerate((tmp_path / "shards", named)):
        text = (where / MANIFEST).read_text().replace('"class_names": null', f'"class_names": {names(number)}')
        (where / MANIFEST).write_text(text)
    for short, path in (("SHARDS", "shards"), ("LINK", "link"), ("COPY", "copy"), ("NAMED", "named")):
        held_out = held_out.replace(short, str(tmp_path / path))
    with pytest.raises(DataError, match=message) as refused:
        open_configured(config_of(tmp_path / "shards", held_out))
    assert "\n" not in str(refused.value)


def names(first: int) -> str:
    return str([f"class {number}" for number in range(first, first + COUNT)]).replace("'", '"')


def test_held_out_images_that_cannot_be_decoded_are_refused_at_the_start(fewer: Path, tmp_path: Path) -> None:
    broken = write(tmp_path / "broken", list(range(100, 105)), 5, codec="png")
    for sample in range(5):
        damage(broken / shard_name(0), sample)
    with pytest.raises(DataError, match=r"data.held_out: .*sample 0 cannot be decoded"):
        open_configured(config_of(fewer, str(broken)))
    partly = write(tmp_path / "partly", list(range(COUNT)), COUNT, codec="png")
    for number in held(open_configured(config_of(partly, "0.1"))):
        damage(partly / shard_name(0), number)
    with pytest.raises(DataError, match=r"sample 1 cannot be decoded"):
        open_configured(config_of(partly, "0.1"))
    open_configured(config_of(partly))


def test_the_setting_is_a_number_or_a_text(tmp_path: Path) -> None:
    """From YAML and from the command line; it survives being written."""
    (tmp_path / "bare.yaml").write_text("run: {max_steps: 1}")
    for text, expected in (("0.01", "0.01"), ("1e-3", "0.001"), ("/data/val", "/data/val")):
        (tmp_path / "file.yaml").write_text(f"data: {{held_out: {text}}}\nrun: {{max_steps: 1}}")
        config = load_config(tmp_path / "file.yaml")
        assert config.data.held_out == expected
        assert load_config(tmp_path / "bare.yaml", [f"data.held_out={text}"]) == config
    (tmp_path / "again.yaml").write_text(to_yaml(config_of("", "0.25")).replace("max_steps: null", "max_steps: 1"))
    assert load_config(tmp_path / "again.yaml").data.held_out == "0.25"
    for held_out, shown in (("0", "0"), ("1.0", "1.0"), ("-0.1", "-0.1"), ("nan", "nan"), ("", "''")):
        said = rf"data\.held_out={shown} must be a fraction in \(0, 1\), or name shards; for example 0\.01"
        with pytest.raises(ConfigError, match=said):
            load_config(tmp_path / "bare.yaml", [f"data.held_out='{held_out}'"])
    for override, message in (
        ("evaluation.held_out_every_images=8", "evaluation.held_out_every_images=8 measures held-out samples, and"),
        ("evaluation.held_out_every_images=-1", "evaluation.held_out_every_images=-1 must be at least 0"),
    ):
        with pytest.raises(ConfigError) as refused:
            load_config(tmp_path / "bare.yaml", [override])
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)


# The loss


def network_of(config: Config, seed: int) -> JiT:
    """A network whose prediction depends on everything; JiT's own initialisation predicts zeros."""
    torch.manual_seed(seed)
    network = JiT(config.model, config.diffusion)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def small(shards: Path, held_out: str) -> Config:
    config = config_of(shards, held_out)
    model = config.model
    model.hidden_size, model.depth, model.num_heads, model.bottleneck_dim, model.in_context_start = 32, 2, 2, 8, 1
    config.engine.precision = "fp32"
    config.diffusion.noise_scale, config.data.flip = 1.5, True
    config.evaluation.block_size, config.evaluation.seed = 8, 3
    return config


@pytest.mark.parametrize("space", ["v", "x"])
def test_the_values_are_those_of_the_formula(folder: Path, space: str) -> None:
    """Sample by sample: z = t x + (1 - t) e, x-prediction, squared error in the space of the loss."""
    config = small(folder, "0.1")
    config.diffusion.loss = space
    shards = open_configured(config)
    assert shards.held_out is not None
    networks = {name: network_of(config, seed) for seed, name in enumerate(("model", "ema_0.9"))}
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    held_out = HeldOutLoss(config, CPU, shards.held_out)
    found = {key: value for name in networks for key, value in held_out.measure(networks[name], name).items()}
    assert torch.equal(torch.random.get_rng_state(), before), "training draws what it would have drawn"
    numbers = members(shards.held_out)
    assert len(numbers) % config.evaluation.block_size, "the last block is not full"
    assert TIMES == (0.0625, 0.1875, 0.3125, 0.4375, 0.5625, 0.6875, 0.8125, 0.9375)
    for name, network in networks.items():
        means = []
        for index, t in enumerate(TIMES):
            losses = []
            for sample, number in enumerate(numbers):
                x = torch.full((1, 3, 4, 4), number / 127.5 - 1)
                x[..., -1] += 1 / 127.5  # where a flip would not leave it
                seed = int(generator_seeds(3, Purpose.HELD_OUT_NOISE, sample, index)[0])
                e = 1.5 * torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
                z = t * x + (1 - t) * e
                with torch.no_grad():
                    predicted = network(z, torch.tensor([t]), torch.tensor([number]))
                error = (predicted - x) / (max(1 - t, 0.05) if space == "v" else 1)
                losses.append(float(error.double().square().mean()))
            means.append(np.mean(losses))
            assert found[f"held_out/{name}/t{t}"] == pytest.approx(means[-1], rel=1e-5)
        assert found[f"held_out/{name}"] == pytest.approx(np.mean(means), rel=1e-5)
    assert (found["held_out_samples"], found["held_out_bad_samples"]) == (len(numbers), 0)
    assert found["held_out/model"] != found["held_out/ema_0.9"]


class Gathered(Exception):  # noqa: N818  # no error: it carries what one rank has
    """Raised in the place of the collective call."""


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_put_their_blocks_together_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """Real ranks are in tests/distributed: a mean alone would hardly tell another order."""
    config = small(folder, "0.2")
    held_out = open_configured(config).held_out
    assert held_out is not None
    network = network_of(config, 0)
    alone, _ = HeldOutLoss(config, CPU, held_out)._losses(network)

    def leave(value: object) -> list[object]:
        if isinstance(value, list):
            raise Gathered(value)
        return [value]

    monkeypatch.setattr("jitscale.parallel.gather_objects", leave)
    parts = []
    for rank in range(ranks):
        with pytest.raises(Gathered) as gathered:
            HeldOutLoss(config, World(rank, ranks, rank, CPU.device), held_out)._losses(network)
        parts += gathered.value.args
    assert [len(part) for part in parts] == [2, 1] if ranks == 2 else [1, 1, 1]
    monkeypatch.setattr("jitscale.parallel.gather_objects", lambda value: parts if isinstance(value, list) else [value])
    together, _ = HeldOutLoss(config, World(0, ranks, 0, CPU.device), held_out)._losses(network)
    np.testing.assert_array_equal(together, alone)


def test_bad_held_out_images_are_left_out_counted_and_said_once(
    fewer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The others keep their noise and their losses; nothing left is an error."""
    png = write(tmp_path / "png", list(range(100, COUNT)), 20, codec="png")
    config = small(fewer, str(png))
    network = network_of(config, 0)

    def losses() -> tuple[HeldOutLoss, Float64Array]:
        held_out = open_configured(config).held_out
        assert held_out is not None
        measured = HeldOutLoss(config, CPU, held_out)
        return measured, measured._losses(network)[0]

    _, sound = losses()
    for sample in (3, 9, 19):
        damage(png / shard_name(0), sample)
    measured, rest = losses()
    np.testing.assert_array_equal(rest, np.delete(sound, (3, 9, 19), axis=0))
    found = measured.measure(network, "model")
    assert (found["held_out_samples"], found["held_out_bad_samples"]) == (17, 3)
    assert caplog.text.count("the held-out loss is measured without it") == 3
    for sample in range(20):
        damage(png / shard_name(0), sample)
    with pytest.raises(DataError, match=r"data.held_out=.*: none of 20 images can be decoded; check the shards"):
        measured.measure(network, "model")
