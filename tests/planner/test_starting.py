"""Starting configurations are valid for every machine and every number of pictures, and fit both."""

from pathlib import Path

import pytest

from jitscale.config import SETTINGS, Config, images_of_run, load_config
from jitscale.config.cautions import cautions, start_caution
from jitscale.errors import ConfigError
from jitscale.planner.starting import SIZES, Line, Machine, Pictures, as_yaml, start_command, starting_lines

CPU, ONE_GPU, MANY = Machine(0), Machine(1, 24e9), Machine(24, 80e9)


def lines_of(count: int, machine: Machine, *, classes: int = 10, image_size: int = 128) -> list[Line]:
    return starting_lines(Pictures("shards", count, classes, image_size), machine, "runs/own")


def config_of(lines: list[Line], folder: Path, machine: Machine = CPU) -> Config:
    """The configuration as a run reads it."""
    (folder / "own.yaml").write_text(as_yaml(lines, "A first line\nand a second one"))
    return load_config(folder / "own.yaml", world_size=max(1, machine.gpus), needs_shards=True)


@pytest.mark.parametrize("machine", [CPU, ONE_GPU, MANY], ids=["cpu", "one", "many"])
@pytest.mark.parametrize(
    ("count", "classes", "image_size"),
    [(7, 0, 32), (300, 1, 28), (3000, 10, 128), (20_000, 100, 512), (1_281_167, 1000, 256)],
)
def test_it_is_valid_for_any_machine_and_data(
    machine: Machine, count: int, classes: int, image_size: int, tmp_path: Path
) -> None:
    lines = lines_of(count, machine, classes=classes, image_size=image_size)
    config = config_of(lines, tmp_path, machine)
    images, batch = images_of_run(config), config.data.batch_size
    assert not cautions(config, images)
    assert images % batch == 0
    assert images // config.evaluation.grid_every_images == 10, "ten sample grids in the run"
    assert config.optim.warmup_images <= images / 10
    lengths = [1 / (1 - decay) for decay in config.ema.decays]
    assert max(lengths) <= max(10.1, images / batch / 9.9), "the run is much longer than its averages"
    assert config.evaluation.weights == f"ema_{max(config.ema.decays)}"
    assert start_caution(config, config.evaluation.weights, images // batch // 10) is None
    assert all(line.reason and line.key in SETTINGS for line in lines)
    assert (config.data.held_out is None) == (config.evaluation.held_out_every_images == 0)
    assert (config.model.num_classes, config.model.image_size) == (classes, image_size)


def test_it_depends_on_the_machine_and_the_number_of_pictures(tmp_path: Path) -> None:
    def config(count: int, machine: Machine, image_size: int = 128) -> Config:
        return config_of(lines_of(count, machine, image_size=image_size), tmp_path, machine)

    widths = [config(count, ONE_GPU).model.hidden_size for count in (100, 5000, 100_000)]
    assert widths == [256, 384, 768]
    assert config(100_000, CPU).model.hidden_size == 128
    assert (config(3000, CPU).model.patch_size, config(3000, ONE_GPU).model.patch_size) == (16, 8)
    assert config(3000, ONE_GPU, 28).model.patch_size == 2, "14 tokens per side, because 16 does not divide 28"
    assert [config(3000, ONE_GPU, size).diffusion.noise_scale for size in (64, 256, 512)] == [1, 1, 2]
    assert [config(3000, CPU, size).diffusion.noise_scale for size in (28, 32, 128)] == [1, 1, 4]
    assert config(100, CPU).data.held_out is None
    assert float(config(3000, ONE_GPU).data.held_out or 0) == 0.05
    assert config(3000, CPU).run.device == "cpu"
    assert config(3000, ONE_GPU).run.device == "cuda"
    assert config(2_000_000, ONE_GPU).data.batch_size == 1024
    assert (config(3000, MANY).data.batch_size, config(100, ONE_GPU).data.batch_size) == (384, 64)
    assert config(3000, MANY).optim.lr == pytest.approx(6 * config(3000, ONE_GPU).optim.lr, rel=0.05)
    assert 30_000 < images_of_run(config(20, CPU)) <= 2000 * 20, "at most 2,000 epochs"


def test_the_papers_network_and_batch_get_the_papers_learning_rate(tmp_path: Path) -> None:
    config = config_of(lines_of(1_281_167, MANY, classes=1000, image_size=256), tmp_path, MANY)
    assert config.model == Config().model
    assert config.optim.lr == pytest.approx(2e-4, rel=0.05)
    assert config.ema.decays[-1] == 0.9995, "the run has 40 epochs, not 600 as in the paper"


def test_memory_determines_the_micro_batch(tmp_path: Path) -> None:
    def engine(memory: float) -> tuple[int | None, int]:
        lines = lines_of(200_000, Machine(1, memory), image_size=256)
        settings = config_of(lines, tmp_path, ONE_GPU).engine
        return settings.micro_batch_size, settings.activation_checkpointing

    assert engine(80e9) == (256, 0)
    small = engine(12e9)[0]
    assert small is not None
    assert small < 256
    with pytest.raises(ConfigError, match=r"a network of width 768 does not fit in 1 GB; give a smaller --size"):
        engine(1e9)


def test_pictures_without_a_patch_size_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"97 pixels per side: no number of patches from 4 to 32.*; pack with --resolution 96"
    ):
        lines_of(3000, CPU, image_size=97)


def test_the_file_has_each_group_once_and_a_reason_in_every_line(tmp_path: Path) -> None:
    head, second, *body = as_yaml(lines_of(3000, CPU), "A first line\nand a second one").splitlines()
    assert (head, second) == ("# A first line", "# and a second one")
    groups = [line for line in body if not line.startswith(" ")]
    assert len(groups) == len(set(groups))
    assert all(" # " in line for line in body if line not in groups)
    assert "  num_classes: 10 # as in the shards" in body


def test_the_command_that_starts_it() -> None:
    assert (
        start_command("a.yaml", CPU) == start_command("a.yaml", ONE_GPU) == "python -m jitscale.train --config a.yaml"
    )
    assert start_command("a.yaml", Machine(4)) == "torchrun --nproc-per-node 4 -m jitscale.train --config a.yaml"
    assert set(SIZES) == {"tiny", "small", "medium", "b"}
