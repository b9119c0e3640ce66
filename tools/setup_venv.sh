#!/bin/bash
# setup_venv.sh VENV: an environment with this project (editable), its extra dev and the versions of constraints.txt.
# PYTHON chooses the interpreter (default python3). Nothing is installed when VENV is up to date; what an interrupted
# call left behind is completed by the next.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$1
base=${PYTHON:-python3}
stamp=$venv/.installed
cpu_index=https://download.pytorch.org/whl/cpu

if ! command -v "$base" >/dev/null; then
    echo "error: $base is not installed; Python 3.11 or newer is needed, name one with PYTHON=/path/to/python3.11" >&2
    exit 2
fi
if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $base is $("$base" --version 2>&1), but Python 3.11 or newer is needed;" \
        "name one with PYTHON=/path/to/python3.11" >&2
    exit 2
fi

# the folder counts because an editable install and the scripts in VENV/bin hold absolute paths
wanted=$("$base" - "$PWD" "$venv" <<'PYTHON'
import hashlib, pathlib, sys
files = ("pyproject.toml", "constraints.txt", "tools/setup_venv.sh")
text = b"\0".join([*(pathlib.Path(name).read_bytes() for name in files), *(part.encode() for part in sys.argv[1:])])
print(hashlib.sha256(text).hexdigest())
PYTHON
)
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && "$venv/bin/python" -c '' 2>/dev/null; then
    echo "==> $venv is up to date"
    exit 0
fi

rm -f "$stamp"
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "==> creating $venv with $("$base" --version)"
    "$base" -m venv --clear "$venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

pip install -q -c constraints.txt setuptools
echo "==> installing torch into $venv (the largest download; later calls skip it)"
torch=$(grep '^torch==' constraints.txt)
# PyPI's Linux build brings gigabytes of CUDA libraries that a machine without an NVIDIA driver cannot use
if command -v nvidia-smi >/dev/null ||
    ! pip install -q --no-deps --retries 0 --timeout 10 --index-url "$cpu_index" "$torch" 2>/dev/null; then
    pip install -q -c constraints.txt "$torch"
fi
echo "==> installing the other packages of constraints.txt that pyproject.toml asks for"
pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
echo "$wanted" >"$stamp"
echo "==> $venv is ready"
