# Shared by the job scripts in this folder, which source it. Not a script of its own.
#
# What a site may set before `sbatch`, or in ~/.bashrc:
#   JITSCALE_HOME          the checkout; default: the folder in which sbatch was called
#   JITSCALE_PYTHON        the interpreter; default: .venv/bin/python of the checkout, else python3
#   JITSCALE_RANK_PYTHON   another interpreter for the ranks, such as a script that enters a container
#   JITSCALE_SETUP         a file to source first: modules, a conda environment
#   JITSCALE_CACHE         compiled kernels, on a disk of each node; default: jitscale-cache-USER in $TMPDIR or /tmp
#   JITSCALE_MOST_RETRIES  starts in a row without progress after which the job gives up; default 5
# and the network's own variables, which are passed on: NCCL_SOCKET_IFNAME and NCCL_IB_HCA for gradients,
# GLOO_SOCKET_IFNAME for what ranks tell each other through their CPUs. Where nodes have several networks, the two
# IFNAMEs name the same interface.
set -euo pipefail

if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "error: not inside a Slurm job; submit it: sbatch $0" >&2
    exit 2
fi
cd "${JITSCALE_HOME:-${SLURM_SUBMIT_DIR:-.}}"
if [ -n "${JITSCALE_SETUP:-}" ]; then
    # shellcheck disable=SC1090
    source "$JITSCALE_SETUP"
fi
if [ -z "${JITSCALE_PYTHON:-}" ]; then
    JITSCALE_PYTHON=python3
    if [ -x .venv/bin/python ]; then JITSCALE_PYTHON=$PWD/.venv/bin/python; fi
fi

# The ranks meet on the first node of their step, at a port that belongs to this job and start of it.
export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 20000))

# Loader workers and the ranks' own threads share the task's cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-1} > 4 ? 4 : ${SLURM_CPUS_PER_TASK:-1}))}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1} # a lost peer ends the rank
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it from the job since Slurm 22.05
export SLURM_CPU_BIND=${SLURM_CPU_BIND:-cores} # with --distribution=block:block, cores next to the rank's GPU
# On the node: a home directory would be locked and searched by all ranks of all nodes. Each rank makes the folders.
cache=${JITSCALE_CACHE:-${TMPDIR:-/tmp}/jitscale-cache-$(id -un)}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# In the place of this script, so that Slurm's signals reach the supervisor.
supervise() {
    echo "nodes: ${SLURM_JOB_NODELIST:-unknown}, tasks: ${SLURM_NTASKS:-1}, restart: ${SLURM_RESTART_COUNT:-0}"
    env | grep -E '^(MASTER_|OMP_|NCCL_|GLOO_|TORCH_NCCL_|TORCHINDUCTOR_|TRITON_|SRUN_CPUS|SLURM_CPU_BIND=|SLURM_DISTRIBUTION|CUDA_VISIBLE)' | sort
    exec "$JITSCALE_PYTHON" -m jitscale.launch.supervisor "$@"
}
