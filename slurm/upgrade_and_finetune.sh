#!/usr/bin/env bash
# Upgrades a low-resolution run to a higher resolution, and fine-tunes it.
#     sbatch slurm/upgrade_and_finetune.sh runs/jit_h_256 configs/finetune_h_512.yaml runs/jit_h_512 \
#         data.shards=/data/imagenet_512
#SBATCH --job-name=upgrade-finetune
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
if [ $# -lt 3 ]; then
    echo "usage: sbatch slurm/upgrade_and_finetune.sh LOW_RUN CONFIG NEW_RUN [group.key=value ...]" >&2
    exit 2
fi
low=$1 config=$2 new=$3
shift 3
# If no file matches, bash keeps the pattern itself, which does not exist.
complete=("$new"/checkpoints/step_*/COMPLETE)
# A requeued job continues from the checkpoint that is there.
if [ ! -e "${complete[0]}" ]; then
    "$JITSCALE_PYTHON" tools/upgrade_resolution.py --checkpoint "$low" --to "$config" --output "$new" "$@"
fi
supervise train --config "$config" "run.dir=$new" "$@"
