# The job scripts in this folder source this file. Do not submit it.
#
# A site may set these variables before `sbatch`, or in ~/.bashrc:
#   JITSCALE_HOME          the checkout; default: the folder in which sbatch was called
#   JITSCALE_PYTHON        the interpreter; default: .venv/bin/python of the checkout, else python3
#   JITSCALE_RANK_PYTHON   another interpreter for the ranks, such as a script that enters a container
#   JITSCALE_SETUP         a file that the job sources first: modules, a conda environment
#   JITSCALE_CACHE         compiled kernels, on each node's own disk; default: jitscale-cache-USER in $TMPDIR or /tmp
#   JITSCALE_MOST_RETRIES  the job gives up after so many starts in a row without progress; default: 5
# The network's own variables are passed on: NCCL_SOCKET_IFNAME and NCCL_IB_HCA for gradients, GLOO_SOCKET_IFNAME for
# messages between the CPUs of the ranks. If nodes have several networks, set both IFNAMEs to the same interface.
set -euo pipefail

if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "error: $0 runs inside a Slurm job only; submit it: sbatch $0" >&2
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

# The ranks meet on the first node of their step. The port is this job's, and another one at each of its starts.
export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 20000))

# The loader's workers need cores of the task, too, so a rank takes at most four threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-1} > 4 ? 4 : ${SLURM_CPUS_PER_TASK:-1}))}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1} # a lost peer ends the rank
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since Slurm 22.05, srun does not inherit it from the job
export SLURM_CPU_BIND=${SLURM_CPU_BIND:-cores} # with --distribution=block:block: cores next to the rank's GPU
# On each node's own disk: all ranks of all nodes would lock and search a home directory. Each rank makes the folders.
cache=${JITSCALE_CACHE:-${TMPDIR:-/tmp}/jitscale-cache-$(id -un)}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# The supervisor replaces this shell (exec), so that Slurm's signals reach it.
supervise() {
    echo "nodes: ${SLURM_JOB_NODELIST:-unknown}, tasks: ${SLURM_NTASKS:-1}, restart: ${SLURM_RESTART_COUNT:-0}"
    env | grep -E '^(MASTER_|OMP_|NCCL_|GLOO_|TORCH_NCCL_|TORCHINDUCTOR_|TRITON_|SRUN_CPUS|SLURM_CPU_BIND=|SLURM_DISTRIBUTION|CUDA_VISIBLE)' | sort
    exec "$JITSCALE_PYTHON" -m jitscale.launch.supervisor "$@"
}
