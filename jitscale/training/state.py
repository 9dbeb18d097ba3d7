"""The progress of a run: its counters, which are equal on all ranks, and values that follow from them."""

from collections.abc import Sequence
from dataclasses import dataclass

from jitscale.config import Config


@dataclass
class RunState:
    """Counters of a run."""

    step: int = 0  # steps taken, including skipped ones
    images: int = 0  # images seen
    skipped_steps: int = 0  # steps with gradients that were not finite
    skipped_images: int = 0  # images skipped after rollbacks
    skipped_in_a_row: int = 0  # steps since the last one that moved the weights

    @property
    def position(self) -> int:
        """The position in the global sample sequence: images seen plus images skipped."""
        return self.images + self.skipped_images

    def count(self, moved: Sequence[bool]) -> None:
        """Count the outcomes of steps; `moved` says for each whether it moved the weights."""
        for one in moved:
            self.skipped_in_a_row = 0 if one else self.skipped_in_a_row + 1
            self.skipped_steps += not one

    def crossed(self, every_images: int, batch_size: int) -> bool:
        """True if the last step crossed a multiple of `every_images`; never if that is 0."""
        return every_images > 0 and self.images // every_images > (self.images - batch_size) // every_images

    def images_at_end(self, config: Config) -> int:
        """Images seen when the run is complete: whole steps until `run.max_images` or `run.max_steps`."""
        run, batch = config.run, config.data.batch_size
        by_steps = [] if run.max_steps is None else [run.max_steps - self.step]
        by_images = [] if run.max_images is None else [-(-(run.max_images - self.images) // batch)]
        return self.images + max(0, min(by_steps + by_images)) * batch
