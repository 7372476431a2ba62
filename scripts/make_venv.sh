#!/bin/sh
# Makes .venv with the pinned dependencies and this checkout (editable). Nothing is done when the stamp in .venv
# matches; the stamp is written last, so that an interrupted install is begun again from nothing.
# ACCELERATOR=cpu, cuda12 or cuda13 overrides what is found; aot adds the compilers for GPUs that are not here.
set -eu
cd "$(dirname "$0")/.."

accelerator=${ACCELERATOR:-}
if [ -z "$accelerator" ]; then
    accelerator=cpu
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d. -f1) || driver=
    case $driver in
    '' | *[!0-9]*) ;;
    *) # CUDA 13 needs driver 580 or newer, CUDA 12 needs 525
        if [ "$driver" -ge 580 ]; then
            accelerator=cuda13
        elif [ "$driver" -ge 525 ]; then
            accelerator=cuda12
        else
            echo "The NVIDIA driver $driver is older than 525, which jax needs: installing for the CPU." >&2
        fi
        ;;
    esac
fi
case $accelerator in
cpu) extras=dev ;;
cuda12 | cuda13 | aot) extras=dev,$accelerator ;;
*) echo "ACCELERATOR=$accelerator is not one of cpu, cuda12, cuda13, aot" >&2 && exit 2 ;;
esac

# The path is part of the stamp: a moved .venv is broken.
stamp="$extras $(pwd) $(cat pyproject.toml constraints.txt | cksum)"
if [ -x .venv/bin/teal ] && [ "$(cat .venv/.stamp 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi

if [ ! -f .venv/.stamp ] || [ "$(cut -d' ' -f1,2 .venv/.stamp)" != "$extras $(pwd)" ]; then
    python=$(sh scripts/find_python.sh)
    echo "Making .venv with $python ($("$python" -V)), extras: $extras" >&2
    rm -rf .venv
    "$python" -m venv .venv
fi
rm -f .venv/.stamp
# The build backend first, pinned too; then no isolated build fetches another one.
.venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt hatchling editables
.venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[$extras]"
printf '%s\n' "$stamp" >.venv/.stamp
