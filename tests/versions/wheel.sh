#!/usr/bin/env bash
# Build the wheel, install it in an empty environment, import it there, and draw images with a run's weights:
#
#     tests/versions/wheel.sh RUN
#
# PYTHON names the interpreter (default: python3). constraints.txt gives the versions. No checkout is on the path.
set -euo pipefail
cd "$(dirname "$0")/../.."
run=$(realpath "${1:?give a run, such as runs/demo/64px}")
if [ ! -f "$run/config.yaml" ]; then
    echo "error: $run: no run there (no config.yaml); make one: make demo" >&2
    exit 2
fi
unset PYTHONPATH
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/venv"
python=$folder/venv/bin/python
"$python" -m pip install --quiet --upgrade pip
"$python" -m pip install --quiet "$(grep '^torch==' constraints.txt)"
git archive --prefix=source/ HEAD | tar -x -C "$folder" # The source is the commit, without an earlier build.
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder" "$folder/source"
wheel=("$folder"/jitscale-*.whl)
echo "$(basename "${wheel[0]}"): $(stat -c %s "${wheel[0]}") bytes"
"$python" -m pip install --quiet --constraint constraints.txt "${wheel[0]}"

cd "$folder"
"$python" -c "import jitscale; print(jitscale.__version__, jitscale.__file__.replace('$folder/', ''))"
"$python" - "$run" <<'END'
import sys

import jitscale

model = jitscale.load_model(sys.argv[1])
images = jitscale.sample(model, labels=[3, 7], guidance_scale=2.0)
jitscale.to_pil(images)[0].save("three.png")
print(f"{model.weights_name}: images {tuple(images.shape)} from {images.min():.2f} to {images.max():.2f}")
END
"$python" -m jitscale.train --list-settings | head -1
