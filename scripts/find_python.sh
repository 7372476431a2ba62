#!/bin/sh
# Prints the path of a CPython >= 3.12 that can make a virtual environment; where there is none, says what to install
# and exits 1. PYTHON=... names the one to use. Each candidate is run, not just found: a pyenv shim can be on PATH and
# still refuse, and Debian's python3 comes without ensurepip.
set -u

check='
import sys, sysconfig
if sys.implementation.name != "cpython" or sys.version_info < (3, 12) or sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit(f"is {sys.implementation.name} {sys.version.split()[0]}")
import ensurepip, venv
print(sys.executable)
'

usable() {
    command -v "$1" >/dev/null 2>&1 || return 1
    "$1" -c "$check" 2>/dev/null </dev/null
}

if [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" && exit 0
    echo "PYTHON=$PYTHON cannot be used: it must be a CPython >= 3.12 with the venv and ensurepip modules." >&2
    { "$PYTHON" -c "$check" 2>&1 </dev/null || true; } | tail -n 1 | sed 's/^/  it says: /' >&2
    exit 1
fi

pyenv_root=${PYENV_ROOT:-${HOME:-}/.pyenv}
uv_root=${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-${HOME:-}/.local/share}/uv/python}

# 3.12 first, wherever it is: the pinned versions were tested on it. The last two take any newer one.
for version in 3.12 3.13 3.14 3; do
    usable "python$version" && exit 0
    for candidate in "$pyenv_root"/versions/"$version"*/bin/python3 "$uv_root"/cpython-"$version"*/bin/python3; do
        usable "$candidate" && exit 0
    done
    if command -v uv >/dev/null 2>&1; then
        candidate=$(uv python find --no-python-downloads "$version" 2>/dev/null) && usable "$candidate" && exit 0
    fi
done
usable python && exit 0

cat >&2 <<'MESSAGE'
No Python >= 3.12 with venv was found (on PATH, under pyenv or under uv). Install one, for instance:
  Debian, Ubuntu:  apt-get install python3.12 python3.12-venv   (or python3 python3-venv where that is >= 3.12)
  pyenv:           pyenv install 3.12
  uv:              uv python install 3.12
then run make again; or name one: make PYTHON=/path/to/python3.12 ...
MESSAGE
exit 1
