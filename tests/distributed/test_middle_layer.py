"""Runs that start from the weights of a run with no middle output layer, or with another one."""

from pathlib import Path

import pytest
import torch

from jitscale.checkpoints.format import Checkpoint, complete_checkpoints
from jitscale.checkpoints.weights import StoredWeights
from tests.support.processes import run_ranks
from tests.support.runs import Job

STEPS = ["run.max_steps=2"]
STILL = ["run.max_steps=1", "optim.lr=1e-30", "optim.warmup_images=0", "model.attn_dropout=0", "model.proj_dropout=0"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    found = Job(tmp_path_factory.mktemp("middle"))
    found.train("without", *STEPS)
    return found


def newest(run: Path) -> Checkpoint:
    return Checkpoint(complete_checkpoints(run)[-1])


def final(weights: StoredWeights, name: str) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        found: torch.Tensor = weights.network(name)(torch.randn(3, 3, 16, 16), torch.rand(3), torch.tensor([0, 5, 10]))
    return found


def test_a_run_can_add_the_layer_and_remove_it_again(job: Job) -> None:
    """The stages and the ranks change on the way.

    A step of zero length changes zeros by less than any prediction shows.
    """
    origin = newest(job.folder / "without")
    for run, source, ranks, stage, head in (("with", "without", 2, 3, 1), ("back", "with", 1, 1, 0)):
        arguments = [f"run.init_from={job.folder / source}", f"model.middle_head={head}", f"engine.zero_stage={stage}"]
        said = run_ranks(ranks, *job.command(run, *STILL, *arguments, world_size=ranks))
        line = "begins with a prediction of zero" if head else "its middle output layer is left out"
        assert said.count(line) == 1, said
        found = newest(job.folder / run)
        assert ("middle_layer.linear.weight" in found.shapes) == (head > 0)
        assert torch.equal(final(found, "model"), final(origin, "model"))
        # The averages were taken over from the source, and have changed by this one step.
        assert not torch.equal(final(origin, "ema_0.99"), final(origin, "model"))
        after = origin.tensor("ema_0.99", "x_embedder.proj2.weight").lerp(
            origin.tensor("model", "x_embedder.proj2.weight"), 1 - 0.99 ** (1 if head else 2)
        )
        torch.testing.assert_close(found.tensor("ema_0.99", "x_embedder.proj2.weight"), after, rtol=0, atol=1e-7)
    assert newest(job.folder / "with").tensor("ema_0.99", "middle_layer.norm_final.weight").eq(1).all()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_layer_trains_from_zero(job: Job, optimizer: str) -> None:
    begins = [f"run.init_from={job.folder / 'without'}", "model.middle_head=1", f"optim.name={optimizer}"]
    metrics = job.train(optimizer, *begins, *STEPS)
    assert all(line["middle_loss"] > 0 for line in metrics)
    found = newest(job.folder / optimizer)
    for average in ("model", "ema_0.99"):
        for layer in ("linear", "adaLN_modulation.1"):
            assert found.tensor(average, f"middle_layer.{layer}.weight").std() > 0


def test_a_resumed_run_cannot_add_the_layer(job: Job) -> None:
    said = run_ranks(2, *job.command("without", "model.middle_head=1", "run.max_steps=3"), expect=2)
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "model.middle_head=0, the config says 1; restore it, or start a new run.dir with run.init_from=" in line
