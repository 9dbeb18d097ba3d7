"""The rate of a run, and the progress bar."""

import io
import time

from tqdm import tqdm

from jitscale.training.timing import Clock


def test_the_bar_names_a_pause_and_does_not_count_its_time() -> None:
    said = io.StringIO()
    with tqdm(total=100, file=said, desc="train", mininterval=0) as bar:
        clock = Clock(0)
        clock.bar = bar
        for _ in range(3):
            time.sleep(0.01)
            bar.update(10)
        with clock.stopped("grid of samples"):
            assert "grid of samples" in said.getvalue().splitlines()[-1].rpartition("\r")[2]
            time.sleep(0.5)
        time.sleep(0.01)
        bar.update(10)
        assert bar.desc == "train"
        assert bar.format_dict["elapsed"] < 0.4
        assert bar.format_dict["rate"] > 200
