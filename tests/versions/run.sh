#!/usr/bin/env bash
# Train a few steps with the oldest and the newest torch that pyproject.toml allows, on two versions of Python:
#
#     tests/versions/run.sh
#     PYTHONS="/opt/python3.10/bin/python3.10 python3.12" ENVIRONMENTS=/big/disk tests/versions/run.sh [WAY ...]
#
# PYTHONS       the interpreters (default: python3.10 python3.12)
# ENVIRONMENTS  a folder that keeps the environments, 6 GB each; default: a temporary folder, removed at the end
#
# train_steps.py lists the WAYs. The script needs a package index, a C++ compiler, and half an hour on two free cores.
set -euo pipefail
cd "$(dirname "$0")/../.."

allowed=$(sed -n 's/^    "torch\(>=[^"]*\)".*/\1/p' pyproject.toml) # >=OLDEST,<TOO_NEW
oldest=$(sed 's/^>=\([0-9.]*\).*/\1/' <<<"$allowed")
environments=${ENVIRONMENTS:-$(mktemp -d)}
if [ -z "${ENVIRONMENTS:-}" ]; then trap 'rm -rf "$environments"' EXIT; fi

failed=0
for python in ${PYTHONS:-python3.10 python3.12}; do
    for torch in "==$oldest.*" "$allowed"; do
        environment=$environments/$(basename "$python")-torch-${torch//[^0-9.]/_}
        "$python" -m venv "$environment"
        "$environment/bin/python" -m pip install --quiet --upgrade pip
        "$environment/bin/python" -m pip install --quiet "torch$torch" .
        "$environment/bin/python" tests/versions/train_steps.py "$@" || failed=1
    done
done
exit $failed
