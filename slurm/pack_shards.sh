#!/usr/bin/env bash
# Packs images into shards. Each task of an array packs one part.
#     sbatch --array=1-16 slurm/pack_shards.sh --input ILSVRC2012_img_train.tar --output /data/imagenet_256 \
#         --resolution 256 --codec webp
# A task that was killed or requeued continues its part.
#SBATCH --job-name=pack-shards
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%A_%a.log
source "${JITSCALE_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/launch.sh"
if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
    echo "error: this job is not an array; submit it with sbatch --array=1-N" >&2
    exit 2
fi
exec "$JITSCALE_PYTHON" tools/make_shards.py --workers "${SLURM_CPUS_PER_TASK:-1}" \
    --part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_MAX" "$@"
