"""The functions of `import jitscale`, and their messages about impossible arguments."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jitscale
from jitscale.checkpoints.format import Progress, step_folder
from jitscale.checkpoints.saving import write_streamed
from jitscale.config import Config
from jitscale.model.jit import JiT
from tests.support.tiny import MODEL


@pytest.fixture(scope="module")
def model() -> JiT:
    torch.manual_seed(0)
    return JiT(MODEL).eval()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "got an empty list"),
        (torch.empty(0, dtype=torch.int64), "got an empty list"),
        (3, "got the single value 3; put it into a list"),
        (torch.tensor(3), "got the single value 3; put it into a list"),
        (None, "got None"),
        ("cat", "got cat"),
        (["cat"], r"got \['cat'\]"),
        ([[1], [2, 3]], r"got \[\[1\], \[2, 3\]\]"),
        ([[1, 2]], r"got torch\.int64 of shape \(1, 2\)"),
        ([1.5], r"got torch\.float32 of shape \(1,\)"),
        ([True], r"got torch\.bool of shape \(1,\)"),
        ([11], r"got \[11\]"),
        ([-1], r"got \[-1\]"),
    ],
)
def test_impossible_labels_are_refused(model: JiT, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"labels: need one or more integers in \[0, 10\], such as \[0\], " + message):
        jitscale.sample(model, labels=labels)


def test_labels_may_have_any_integer_type(model: JiT) -> None:
    expected = jitscale.sample(model, [3, 10], steps=2)
    for labels in (torch.tensor([3, 10]), np.array([3, 10], np.uint8), np.array([3, 10], np.int32), (3, 10)):
        assert torch.equal(jitscale.sample(model, labels, steps=2), expected)
    with pytest.raises(ValueError, match="seed: must be in"):
        jitscale.sample(model, [0], seed=-1)


def test_pictures_are_clamped_and_rounded() -> None:
    """A cast to uint8 would truncate, and would wrap 1.01 to black."""
    images = torch.empty(2, 3, 4, 5)
    # 0 lies between 127 and 128; it is rounded to the even one.
    images[0, 0], images[0, 1], images[0, 2] = 1.01, -1.5, 0.0
    images[1] = 0.99607  # this is 254.499 of 255
    first, second = jitscale.to_pil(images)
    assert (first.size, first.mode) == ((5, 4), "RGB")
    assert first.getpixel((0, 0)) == (255, 0, 128)
    assert second.getpixel((4, 3)) == (254, 254, 254)
    assert float(images.max()) == pytest.approx(1.01), "the samples themselves are unchanged"
    for wrong in (images[0], images.to(torch.uint8), np.zeros((1, 4, 4, 3), np.float32)):
        with pytest.raises(ValueError, match="expected"):
            jitscale.to_pil(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not finite, ids 1"):
        jitscale.to_pil(torch.stack([images[0], torch.full((3, 4, 5), torch.nan)]))


def test_a_loaded_model_names_its_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A warning says if the weights are mostly the start of the run: 0.9999^60 = 99.4%."""
    state = JiT(MODEL).state_dict()
    config = Config(model=MODEL)
    config.ema.decays, config.evaluation.weights, config.run.max_steps = [0.9999], "ema_0.9999", 60
    shapes = {name: tuple(p.shape) for name, p in state.items()}
    sets = ["model", "ema_0.9999"]
    write_streamed(step_folder(tmp_path, 60), Progress(60, 480, 0, None), config, shapes, sets, lambda _, n: state[n])
    with caplog.at_level(logging.INFO, "jitscale"):
        assert jitscale.load_model(tmp_path).weights_name == "ema_0.9999"
    said, warned = caplog.records
    assert (said.levelname, said.getMessage().partition(": ")[2]) == ("INFO", "weights ema_0.9999")
    assert warned.getMessage().startswith("after 60 steps, 99% of ema_0.9999 are the initial weights")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert jitscale.load_model(tmp_path, "model").weights_name == "model"
    assert not caplog.records
