"""Load the newest checkpoint of a run and save it as the next step without training.

Usage: load_and_save.py --config FILE [group.key=value ...], as for jitscale.train.
"""

import sys

import torch

from jitscale import parallel
from jitscale.config import load_config
from jitscale.data.shards import open_training_shards
from jitscale.training.trainer import Trainer
from tests.support.processes import leave_after


def main() -> None:
    world = parallel.start(torch.device("cpu"))
    config = load_config(sys.argv[2], sys.argv[3:], world_size=world.size)
    shards = open_training_shards(config)
    trainer = Trainer(config, world, shards)
    trainer.state.step += 1
    trainer.persistence.save(last=True)
    trainer.close()
    parallel.stop()


if __name__ == "__main__":
    leave_after(main)
