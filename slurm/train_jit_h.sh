#!/usr/bin/env bash
# JiT-H/16 at 256 px: 600 epochs of ImageNet, then the FID.
#     sbatch slurm/train_jit_h.sh data.shards=/data/imagenet_256 [group.key=value ...]
#SBATCH --job-name=jit_h_256
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --distribution=block:block
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
source "${JITSCALE_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/launch.sh"
supervise train --config configs/jit_h_256.yaml "$@"
