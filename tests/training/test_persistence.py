"""The messages of a resume, and the effects of a failed final save."""

import errno
import os
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jitscale import parallel, train
from jitscale.checkpoints.format import MARKER, Progress, step_folder
from jitscale.config import Config
from jitscale.errors import CheckpointError, StorageError, UserError
from jitscale.run_folder import Claim, claim
from jitscale.training import persistence
from jitscale.training.persistence import Persistence, changes_since, newest_sound_checkpoint, write_config


def test_every_changed_setting_that_affects_training_is_reported() -> None:
    before = Config()
    before.run.max_images = 96_000
    checkpoint: Any = SimpleNamespace(config=before, progress=Progress(100, 6400, 100, None, 0, 0, 0))
    elsewhere = replace(before, run=replace(before.run, dir="moved", device="cpu"))
    elsewhere = replace(elsewhere, tracking=replace(before.tracking, wandb="offline"))
    assert changes_since(checkpoint, elsewhere) == []
    now = replace(
        before,
        data=replace(before.data, batch_size=32, num_workers=1, flip=False),
        optim=replace(before.optim, lr=1e-3, schedule="cosine"),
        ema=replace(before.ema, decays=[0.9]),
        model=replace(before.model, route_share=0.5),
        run=replace(before.run, max_images=6368, max_steps=99, route_until_images=6000),
    )
    since = [
        "model.route_share 0.0 -> 0.5",
        "data.batch_size 1024 -> 32",
        "data.flip True -> False",
        "optim.lr 0.0002 -> 0.001",
        "optim.schedule constant -> cosine",
        "ema.decays [0.9996, 0.9998, 0.9999] -> [0.9]",
        "run.max_images 96000 -> 6368",
        "run.max_steps None -> 99",
        "run.route_until_images None -> 6000",
    ]
    assert changes_since(checkpoint, now) == [
        *(f"since this checkpoint: {change}" for change in since),
        "run.max_steps=99 is below the 100 steps already done; nothing is left to train",
        "run.max_images=6368 is below the 6400 images already seen; nothing is left to train",
    ]
    now.run.max_images = 6369  # The last batch went beyond it.
    assert not any("run.max_images=" in line for line in changes_since(checkpoint, now))


def test_a_failed_final_save_falls_back_to_an_older_checkpoint(caplog: pytest.LogCaptureFixture) -> None:
    def save(*, last: bool) -> None:
        assert last
        raise CheckpointError("step_00000007.partial: cannot be written")

    state: Any = SimpleNamespace(save=save, saved_step=4, world=SimpleNamespace(is_main=True))
    assert Persistence.save_before_stop(state) == 4
    assert "step_00000007.partial: cannot be written" in caplog.text
    state.saved_step = None
    with pytest.raises(CheckpointError):
        Persistence.save_before_stop(state)


def test_failing_storage_during_a_check_of_the_folder_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stale(*arguments: object) -> bool:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    config = Config()
    config.run.dir = str(tmp_path / "run")
    with ExitStack() as held, ExitStack() as other:
        state: Any = SimpleNamespace(config=config, _run_dir=tmp_path / "run", saved_step=4, claim=None)
        state.claim = claim(state._run_dir, held)
        write_config(config)
        marker = step_folder(state._run_dir, 4) / MARKER
        marker.parent.mkdir(parents=True)
        marker.touch()

        def is_gone() -> bool:
            return Persistence._write_again_what_is_gone(state)

        assert not is_gone()
        assert caplog.text == ""
        with monkeypatch.context() as failing:
            failing.setattr(Claim, "is_lost", stale)
            assert not is_gone()
            assert "cannot be checked ([Errno 116] Stale file handle); the next save tries again" in caplog.text
            marker.unlink()
            assert is_gone(), "the loss was noticed before the error"
        (state._run_dir / "config.yaml").unlink()
        with monkeypatch.context() as failing:
            failing.setattr("jitscale.training.persistence.write_config", stale)
            assert is_gone()
        assert not (state._run_dir / "config.yaml").exists()
        assert is_gone()
        assert (state._run_dir / "config.yaml").exists()
        shutil.rmtree(state._run_dir)
        claim(state._run_dir, other)
        with pytest.raises(UserError, match="is at work there"):
            is_gone()


@pytest.mark.parametrize("where", [persistence, train])
def test_only_one_rank_looks_for_checkpoints(where: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error there reaches all ranks. Otherwise they would wait for a rank that has left."""

    def fail(run_dir: Path) -> list[Path]:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(run_dir))

    def look() -> object:
        if where is persistence:
            return newest_sound_checkpoint(Path("run"), parallel.World(0, 1, 0, torch.device("cpu")))
        with ExitStack() as held:
            return train._train_through([Config()], parallel.World(0, 1, 0, torch.device("cpu")), held)

    monkeypatch.setattr(where, "complete_checkpoints", fail)
    monkeypatch.setattr(train, "claim", lambda run_dir, held: None)
    with pytest.raises(StorageError, match="Stale file handle"):
        look()
    # Another rank does not look; it gets the answer of rank 0.
    monkeypatch.setattr(parallel, "this_rank", lambda: 1)
    monkeypatch.setattr(parallel, "broadcast_object", lambda value: [] if where is persistence else 1)
    assert look() == (None if where is persistence else 0)
