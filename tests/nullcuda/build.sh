#!/usr/bin/env bash
# Make the environment of the null CUDA, on a machine without a GPU:
#
#     tests/nullcuda/build.sh             # a second call does nothing twice
#     tests/nullcuda/build.sh --library   # only compile null/*.c again
#
# NULLCUDA_HOME    folder of the environment (default: ~/.cache/jitscale-nullcuda); 5.5 GB, never inside the checkout
# NULLCUDA_TORCH   version of PyTorch (default: 2.11.0); its wheel must be a CUDA build
# PYTHON           interpreter (default: python3), with its headers, which Triton compiles against
set -euo pipefail
kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$kit/../.."
home=${NULLCUDA_HOME:-$HOME/.cache/jitscale-nullcuda}
torch=${NULLCUDA_TORCH:-2.11.0}
python=${PYTHON:-python3}
venv=$home/venv

say() { echo "nullcuda: $*"; }
fail() { say "$*" >&2; exit 2; }

case $(realpath -m "$home")/ in "$(realpath .)"/*) fail "NULLCUDA_HOME=$home lies inside the checkout; choose another" ;; esac

# Packages of Debian: a C compiler, for the null libraries and for Triton, and Python's headers and venv.
missing=()
command -v gcc > /dev/null && command -v nm > /dev/null || missing+=(gcc libc6-dev binutils)
command -v "$python" > /dev/null || missing+=(python3)
"$python" -c 'import ensurepip, venv' 2> /dev/null || missing+=(python3-venv)
"$python" -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2> /dev/null || missing+=(python3-dev)
if [ ${#missing[@]} -gt 0 ]; then
    [ "$(id -u)" = 0 ] || fail "missing; install: apt-get install ${missing[*]}"
    say "installing ${missing[*]}"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null
fi

compile() {
    local site include triton
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    triton=$site/triton/backends/nvidia/include # These headers complete those of the runtime's wheel.
    for include in "$site"/nvidia/cu*/include "$site"/nvidia/cuda_runtime/include; do
        [ -f "$include/cuda_runtime_api.h" ] && break
    done
    [ -f "$include/cuda_runtime_api.h" ] || fail "no cuda_runtime_api.h in $site/nvidia: is this torch a CUDA build?"
    mkdir -p "$home/lib"
    gcc -O1 -shared -fPIC -Wall -Wl,-soname,libcuda.so.1 -I"$include" -I"$triton" "$kit"/null/*.c -o "$home/lib/libcuda.so.1.new" -ldl -lpthread
    mv "$home/lib/libcuda.so.1.new" "$home/lib/libcuda.so.1" # Running programs keep the old file.
    ln -sfn libcuda.so.1 "$home/lib/libcuda.so"
    # torch also calls functions that the null libraries lack. The real libraries answer them, and find no driver.
    nm -D --defined-only "$home/lib/libcuda.so.1" | awk '{print $3}' | sort > "$home/lib/has"
    for library in libc10_cuda libtorch_cuda libtorch_python libcaffe2_nvrtc; do
        nm -D --undefined-only "$site/torch/lib/$library.so" 2> /dev/null || true
    done | awk '{print $2}' | sed 's/@.*//' | grep -E '^(__cuda|cuda|cu[A-Z]|cublas|nccl)' | sort -u > "$home/lib/asked"
    comm -23 "$home/lib/asked" "$home/lib/has" > "$home/lib/not_covered"
    say "compiled; of $(wc -l < "$home/lib/asked") functions that torch asks of CUDA, cuBLAS and NCCL $(wc -l < "$home/lib/not_covered") are not covered ($home/lib/not_covered)"
}

if [ "${1:-}" != --library ]; then
    wanted="torch $torch $("$python" --version) $(cat constraints.txt pyproject.toml "$kit/build.sh" | sha256sum | cut -c1-16)"
    if [ "$(cat "$venv/.nullcuda" 2> /dev/null)" = "$wanted" ]; then
        say "$venv is up to date"
    else
        mkdir -p "$home"
        "$python" -m venv "$venv"
        pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-cache-dir -qq "$@"; }
        say "installing torch $torch"
        pip install "torch==$torch" numpy
        # The project's dependencies and its float8 extra, without the project. The pinned versions hold unless torch excludes
        # them.
        "$venv/bin/python" - "$home" << 'END'
import sys
from importlib.metadata import requires
from pathlib import Path
from pip._vendor.packaging.requirements import InvalidRequirement, Requirement
from pip._vendor.packaging.utils import canonicalize_name as canonical
try:
    import tomllib
except ImportError:
    from pip._vendor import tomli as tomllib

home = Path(sys.argv[1])
project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
needed = [*project["dependencies"], *project.get("optional-dependencies", {}).get("float8", [])]
(home / "requirements.txt").write_text("".join(f"{r}\n" for r in needed if canonical(Requirement(r).name) != "torch"))
of_torch = [r for r in map(Requirement, requires("torch") or []) if r.marker is None or r.marker.evaluate({"extra": ""})]
limits = {canonical(r.name): r.specifier for r in of_torch}
kept, dropped = [], []
for line in Path("constraints.txt").read_text().splitlines():
    line = line.split("#")[0].strip()
    try:
        pin = Requirement(line)
    except InvalidRequirement:
        continue
    name, versions = canonical(pin.name), [s.version for s in pin.specifier]
    if pin.marker is not None and not pin.marker.evaluate():
        continue
    foreign = name in ("torch", "triton") or name.startswith(("nvidia-", "cuda-"))
    fits = all(limits[name].contains(version) for version in versions) if name in limits else True
    (dropped if foreign or not fits else kept).append(line)
(home / "constraints.txt").write_text("".join(f"{line}\n" for line in kept))
print(f"nullcuda: {len(kept)} versions of constraints.txt kept; torch decides {len(dropped)}")
END
        say "installing the project's dependencies"
        pip install "torch==$torch" -r "$home/requirements.txt" -c "$home/constraints.txt" || {
            say "constraints.txt does not go with torch $torch; installing what pyproject.toml allows"
            pip install "torch==$torch" -r "$home/requirements.txt"
        }
        "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
            fail "torch $torch came as a CPU build; see which index pip takes it from (pip config list)"
        echo "$wanted" > "$venv/.nullcuda"
    fi
fi
compile
say "$("$venv/bin/python" -c 'import torch; print("torch", torch.__version__, "for CUDA", torch.version.cuda)'), $(du -sh "$home/" | cut -f1) in $home"
