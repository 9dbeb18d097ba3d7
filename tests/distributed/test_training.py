"""`python -m jitscale.train` in real processes: resumes after SIGKILL or on other ranks, signals, user mistakes."""

import gzip
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jitscale.checkpoints.format import Checkpoint, complete_checkpoints
from jitscale.config import load_config
from jitscale.preparation.array_shards import write_shards
from jitscale.tracking import read_metrics
from tests.support import ROOT
from tests.support.forking import Process
from tests.support.processes import run_ranks, start_ranks
from tests.support.runs import BATCH, STEPS, Job, losses, same_state, wait_for_steps, zero_samples
from tests.support.servers import serving


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def unbroken(job: Job) -> list[dict[str, Any]]:
    """The metrics of an uninterrupted run of two ranks in stage 1, profiled on the way."""
    return job.train("unbroken", "--profile")


def test_metrics_of_a_step(unbroken: list[dict[str, Any]]) -> None:
    line = unbroken[-1]
    assert {"step", "images", "loss", "lr", "grad_norm", "images_per_second"} <= set(line)
    assert (line["step"], line["images"]) == (STEPS, STEPS * BATCH)
    assert [entry["lr"] for entry in unbroken[:4]] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert line["lr"] == pytest.approx(0.0, abs=1e-9)


def test_the_last_steps_can_be_profiled(job: Job, unbroken: list[dict[str, Any]]) -> None:
    """The profile starts at step 20. Every comparison with this run also shows that profiling changes nothing."""
    folder = job.folder / "unbroken/profile"
    table = (folder / "kernels.txt").read_text()
    assert "Self CPU time total" in table
    assert "aten::" in table
    with gzip.open(folder / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"aten::scaled_dot_product_attention", "aten::lerp"} & names


def test_config_is_dumped_into_the_run(job: Job, unbroken: list[dict[str, Any]]) -> None:
    config = load_config(job.folder / "unbroken" / "config.yaml")
    assert config.run.dir == str(job.folder / "unbroken")
    assert config.optim.schedule == "cosine"


def test_resume_after_sigkill_is_the_same_command(job: Job, unbroken: list[dict[str, Any]]) -> None:
    """The run is killed anywhere, with dropout. Batches and losses are equal, and the final state is bit-equal."""
    ranks = start_ranks(2, *job.command("killed"))
    metrics = wait_for_steps(ranks, job.folder / "killed", 10)
    for rank in ranks:
        rank.kill()
        rank.wait()
    done = len(metrics.read_text().splitlines())
    assert done < STEPS, "the kill came too late to prove anything"
    resumed = job.train("killed")
    assert losses(resumed) == pytest.approx(losses(unbroken), rel=1e-6)
    last = f"checkpoints/step_{STEPS:08d}"
    assert same_state(job.folder / "killed" / last, job.folder / "unbroken" / last)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "stage"), [(2, 3), (3, 2), (1, 1), (1, 0), (2, 0)])
def test_resume_elsewhere(job: Job, world_size: int, stage: int) -> None:
    """The number of ranks and the stage change. Dropout is off, because it is drawn by rank."""
    still = ["model.attn_dropout=0", "model.proj_dropout=0"]
    if not (job.folder / "still").exists():
        job.train("still", *still)
    name = f"elsewhere_{world_size}_{stage}"
    job.copy("still", name, steps=12)
    moved = job.train(name, *still, f"engine.zero_stage={stage}", world_size=world_size)
    assert losses(moved) == pytest.approx(losses(read_metrics(job.folder / "still")), rel=1e-5)


def test_another_batch_size_reads_the_same_sequence(job: Job, unbroken: list[dict[str, Any]]) -> None:
    """The batch is twice as large from the middle on. The run ends at the same number of images, after fewer steps."""
    job.copy("unbroken", "bigger", steps=12)
    images = STEPS * BATCH
    metrics = job.train("bigger", f"data.batch_size={2 * BATCH}", f"run.max_images={images}", "run.max_steps=100")
    assert [line["step"] for line in metrics] == list(range(1, 12 + 6 + 1))
    assert metrics[-1]["images"] == images


def test_loading_and_saving_again_is_exact(job: Job, unbroken: list[dict[str, Any]]) -> None:
    """Load at the end of a run and save again: the state is bit-equal. test_resume.py covers all stages and ranks."""
    for world_size, stage in ((2, 2), (3, 3)):
        name = f"loaded_{world_size}_{stage}"
        job.copy("unbroken", name, steps=STEPS - 4)
        before = Checkpoint(job.folder / name / f"checkpoints/step_{STEPS - 4:08d}")
        run_ranks(
            world_size,
            str(ROOT / "tests/distributed/programs/load_and_save.py"),
            *job.command(name, f"engine.zero_stage={stage}", world_size=world_size)[2:],
        )
        after = Checkpoint(job.folder / name / f"checkpoints/step_{STEPS - 3:08d}")
        assert after.progress.optimizer_step == before.progress.optimizer_step
        for set_name in before.sets:
            for parameter in before.shapes:
                assert torch.equal(before.tensor(set_name, parameter), after.tensor(set_name, parameter)), set_name


def test_a_signal_on_one_rank_saves_and_asks_for_a_requeue(job: Job, unbroken: list[dict[str, Any]]) -> None:
    ranks = start_ranks(2, *job.command("signalled"))
    metrics = wait_for_steps(ranks, job.folder / "signalled", 5)
    ranks[1].send_signal(signal.SIGUSR1)
    assert [rank.wait(timeout=60) for rank in ranks] == [75, 75]
    saved = int(complete_checkpoints(job.folder / "signalled")[-1].name.removeprefix("step_"))
    assert saved == len(metrics.read_text().splitlines()) < STEPS
    assert losses(job.train("signalled")) == pytest.approx(losses(unbroken), rel=1e-6)


def damage(folder: Path, every: int) -> int:
    """Overwrite every n-th image of the shards with zeros; returns how many."""
    return sum(zero_samples(path, slice(None, None, every)) for path in folder.glob("*.tar"))


def test_bad_images_are_replaced_counted_and_do_not_break_a_resume(job: Job) -> None:
    """The number of ranks changes, and there are workers. The replacements and their number are the same."""
    shutil.copytree(job.folder / "shards", job.folder / "dirty_shards")
    assert damage(job.folder / "dirty_shards", 40) == 4
    dirty = [f"data.shards={job.folder / 'dirty_shards'}", "model.attn_dropout=0", "model.proj_dropout=0"]
    dirty += ["data.max_bad_fraction=0.1"]
    whole = job.train("dirty", *dirty)
    job.copy("dirty", "dirty_moved", steps=12)
    moved = job.train("dirty_moved", *dirty, "data.num_workers=2", world_size=1)
    assert losses(moved) == pytest.approx(losses(whole), rel=1e-5)
    counts = [line["bad_samples"] for line in whole]
    assert [line["bad_samples"] for line in moved] == counts
    assert counts == sorted(counts)
    assert 4 * 3 < counts[-1] <= 4 * 6  # 288 images are 3.8 epochs. A replacement may be bad as well.


def test_too_many_bad_images_end_all_ranks_together(job: Job) -> None:
    shutil.copytree(job.folder / "shards", job.folder / "dirtier_shards")
    assert damage(job.folder / "dirtier_shards", 5) == 15
    ranks = start_ranks(2, *job.command("dirtier", f"data.shards={job.folder / 'dirtier_shards'}"))
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], outputs
    assert "Traceback" not in outputs[0] + outputs[1]
    said = [line for line in outputs[0].splitlines() if line.startswith("error: ")]
    assert len(said) == 1, outputs[0]
    assert "data.max_bad_fraction=0.0001: 1" in said[0]
    assert ".tar: byte " in said[0]
    assert "--verify" in said[0]


def test_other_shards_are_refused_unless_a_new_epoch_is_requested(job: Job, unbroken: list[dict[str, Any]]) -> None:
    images = np.random.default_rng(1).integers(0, 256, (40, 16, 16, 3), np.uint8)
    write_shards(images, np.arange(40) % 10, job.folder / "new_shards", samples_per_shard=20)
    job.copy("unbroken", "renewed", steps=12)
    new = [f"data.shards={job.folder / 'new_shards'}"]
    refusal = run_ranks(1, *job.command("renewed", *new), expect=2)
    assert "the data or its order changed (manifest: " in refusal
    assert "data.accept_new_shards=true" in refusal
    job.train("renewed", *new, "data.accept_new_shards=true", "run.max_steps=20")
    renewed = Checkpoint(complete_checkpoints(job.folder / "renewed")[-1]).progress.data
    assert renewed is not None
    assert renewed["origin"] == 12 * BATCH
    job.train("renewed", *new, "data.accept_new_shards=true")  # The run continues in that epoch, and starts no new one.
    assert Checkpoint(complete_checkpoints(job.folder / "renewed")[-1]).progress.data == renewed
    assert len(losses(read_metrics(job.folder / "renewed"))) == STEPS


def test_remote_shards_give_the_same_run(job: Job, unbroken: list[dict[str, Any]], tmp_path: Path) -> None:
    """The shards come from an HTTP server, through a cache that both ranks share. Each shard is fetched once."""
    fetched: list[str] = []
    with serving(job.folder / "shards", fetched) as address:
        remote = [f"data.shards={address}", f"data.cache_dir={tmp_path / 'cache'}"]
        too_small = run_ranks(1, *job.command("remote", *remote, "data.cache_gb=7e-5"), expect=2)
        assert "data.cache_gb=7e-05: this node reads" in too_small
        metrics = job.train("remote", *remote, "data.num_workers=1")
    assert losses(metrics) == pytest.approx(losses(unbroken), rel=1e-6)
    tars = sorted(path for path in fetched if path.endswith(".tar"))
    assert tars == [f"/shard-{number:06d}.tar" for number in range(4)]


def test_a_finished_run_has_nothing_left_to_do(job: Job, unbroken: list[dict[str, Any]]) -> None:
    assert losses(job.train("unbroken")) == losses(unbroken)


def test_user_mistakes_are_one_line_and_exit_code_2(job: Job, unbroken: list[dict[str, Any]]) -> None:
    """Each mistake has its own process; all processes run at the same time."""
    cut = job.folder / "cut"
    shutil.copytree(job.folder / "shards", cut)
    tar = sorted(cut.glob("*.tar"))[1]
    tar.write_bytes(tar.read_bytes()[:-4096])
    (job.folder / "a_file").write_text("")
    job.copy("unbroken", "other_shape", steps=4)
    job.copy("unbroken", "other_data", steps=4)
    job.copy("unbroken", "other_network", steps=4)
    job.copy("unbroken", "other_optimizer", steps=4)
    job.copy("unbroken", "damaged", steps=4)
    for file in (job.folder / "damaged" / "checkpoints").glob("step_*/rank_00000.safetensors"):
        file.write_bytes(b"\xff" * file.stat().st_size)
    mistakes = {
        "missing shards": ([f"data.shards={job.folder / 'absent'}"], "absent"),
        "truncated tar": ([f"data.shards={cut}"], tar.name),
        "label out of range": (["model.num_classes=5"], "model.num_classes"),
        "config typo": (["optim.leraning_rate=1"], "optim.leraning_rate=1 is not a setting"),
        "unwritable output": ([f"run.dir={job.folder / 'a_file' / 'run'}"], "cannot be written"),
        "checkpoint of another shape": (
            [f"run.dir={job.folder / 'other_shape'}", "model.hidden_size=64"],
            "the weights belong to another network",
        ),
        "another order": ([f"run.dir={job.folder / 'other_data'}", "run.seed=1"], "seed: 0 -> 1"),
        "another network": (
            [f"run.dir={job.folder / 'other_network'}", "model.in_context_start=0", "diffusion.prediction=v"],
            "model.in_context_start: 1 -> 0; diffusion.prediction: x -> v",
        ),
        "another optimizer": (
            [f"run.dir={job.folder / 'other_optimizer'}", "optim.name=muon"],
            "its moments belong to optim.name=adamw",
        ),
        "start from nothing": (["run.init_from=absent"], "absent: no such checkpoint"),
        "start from another network": (
            [f"run.init_from={job.folder / 'unbroken'}", "model.depth=3"],
            "model.depth: 2 -> 3",
        ),
        "start for another noise": (
            [f"run.init_from={job.folder / 'unbroken'}", "diffusion.noise_scale=2"],
            "trained with diffusion.noise_scale=1.0",
        ),
        "start from an absent set": (
            [f"run.init_from={job.folder / 'unbroken'}", "run.init_weights=ema_0.5"],
            "no weight set 'ema_0.5'",
        ),
        "damaged checkpoint": ([f"run.dir={job.folder / 'damaged'}"], "rank_00000.safetensors: "),
        "infinite rate": (["optim.lr=inf"], "optim.lr=inf must be finite"),
        "missing cuda": (["run.device=cuda"], "PyTorch sees no GPU"),
    }
    started = {
        name: Process(job.command("mistake_" + name.replace(" ", "_"), *overrides))
        for name, (overrides, _) in mistakes.items()
    }
    for name, process in started.items():
        errors, _ = process.communicate(timeout=120)
        said = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert process.returncode == 2, f"{name}: {process.returncode}\n{errors}"
        assert len(said) == 1, f"{name}\n{errors}"
        assert mistakes[name][1] in said[0], f"{name}\n{errors}"
        assert "Traceback" not in errors, f"{name}\n{errors}"
    kept = load_config(job.folder / "other_shape" / "config.yaml")
    assert kept.model.hidden_size == 32, "a refused start leaves the run as it was"


def test_a_mistake_on_two_ranks_ends_both(job: Job) -> None:
    ranks = start_ranks(2, *job.command("mistakes", f"data.shards={job.folder / 'absent'}"))
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert outputs[0].count("error: ") == 1
    assert outputs[1].count("error: ") == 0


def test_a_missing_key_of_wandb_ends_all_ranks_before_the_first_step(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    ranks = start_ranks(2, *job.command("without_a_key", "tracking.wandb=online"))
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    (said,) = [line for line in outputs[0].splitlines() if line.startswith("error: ")]
    assert said.startswith("error: tracking.wandb=online: no API key for https://")
    assert "Traceback" not in outputs[0] + outputs[1]
    assert not (job.folder / "without_a_key/config.yaml").exists(), "the run has not begun"


def test_a_run_starts_from_existing_weights(job: Job, unbroken: list[dict[str, Any]]) -> None:
    """`run.init_from` names a run, with and without the averages. A resumed run does not read it again."""
    source = Checkpoint(complete_checkpoints(job.folder / "unbroken")[-1])
    # The learning rate is so small that the weights do not change.
    still = ["optim.lr=1e-30", "optim.warmup_images=0", "run.max_steps=1"]
    origin = f"run.init_from={job.folder / 'unbroken'}"

    def begun(run: str, *overrides: str, world_size: int = 1) -> Checkpoint:
        job.train(run, *still, origin, *overrides, world_size=world_size)
        return Checkpoint(complete_checkpoints(job.folder / run)[-1])

    for run, overrides, expected in (
        ("init_all", ["engine.zero_stage=3"], {"ema_0.9": "ema_0.9", "ema_0.99": "ema_0.99"}),
        (
            "init_alone",
            ["run.init_ema=false", "run.init_weights=ema_0.9"],
            {"model": "ema_0.9", "ema_0.9": "ema_0.9", "ema_0.99": "ema_0.9"},
        ),
    ):
        found = begun(run, *overrides, world_size=2 if run == "init_all" else 1)
        assert found.progress.images == BATCH
        began_with = expected.get("model", "model")
        for name in found.shapes:
            weights = source.tensor(began_with, name)
            torch.testing.assert_close(found.tensor("model", name), weights, rtol=0, atol=1e-29)
            for average, decay in (("ema_0.9", 0.9), ("ema_0.99", 0.99)):
                average_before = source.tensor(expected[average], name)
                after = average_before.lerp(weights, 1 - decay)
                torch.testing.assert_close(found.tensor(average, name), after, rtol=0, atol=1e-7)
    job.train("init_all", "run.init_from=gone", "run.max_steps=2", world_size=1)
