#!/usr/bin/env bash
# The configured evaluation (FID-50K) of a run over all GPUs.
#     sbatch slurm/evaluate.sh --run runs/jit_h_256 [group.key=value ...]
# A requeued job computes only the blocks of images that are missing.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --distribution=block:block
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
source "${JITSCALE_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/launch.sh"
supervise evaluate "$@"
