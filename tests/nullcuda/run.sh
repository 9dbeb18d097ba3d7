#!/usr/bin/env bash
# Run a command with a CUDA that does nothing: tests/nullcuda/run.sh python ...
# NULL_DEVICES is the number of visible GPUs (default: 8).
set -euo pipefail
kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
checkout=$(cd "$kit/../.." && pwd)
home=${NULLCUDA_HOME:-$HOME/.cache/jitscale-nullcuda}
if [ ! -x "$home/venv/bin/python" ] || [ ! -f "$home/lib/libcuda.so.1" ]; then
    echo "nullcuda: nothing in $home; call $kit/build.sh first" >&2
    exit 2
fi
export NULLCUDA_HOME=$home PATH=$home/venv/bin:$PATH
# Python finds the checkout, which is not installed, and nulllib here. It writes no bytecode into either.
export PYTHONPATH=$checkout:$kit${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$home/cache/inductor} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$home/cache/triton}
export TORCHINDUCTOR_COMPILE_THREADS=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TRITON_LIBCUDA_PATH=$home/lib LD_LIBRARY_PATH=$home/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_PRELOAD=$home/lib/libcuda.so.1
exec "$@"
