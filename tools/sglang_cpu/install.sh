#!/bin/bash
# install.sh VENV: an environment with the real SGLang for the CPU (2.7 GB, one to three minutes).
# PYTHON chooses the interpreter (default python3). Nothing is installed when VENV is up to date; what an interrupted
# call left behind is completed by the next.
set -euo pipefail
venv=${1:?usage: install.sh VENV}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
base=${PYTHON:-python3}
requirements=$here/requirements.txt
stamp=$venv/.installed
cpu_index=https://download.pytorch.org/whl/cpu

if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: Python 3.11 or newer is needed, $base is not; name one with PYTHON=/path/to/python3.11" >&2
    exit 2
fi
if [[ $(uname -s) != Linux ]]; then
    echo "error: SGLang's wheels are for Linux" >&2
    exit 2
fi

wanted=$("$base" - "$requirements" "${BASH_SOURCE[0]}" <<'PYTHON'
import hashlib, pathlib, sys
print(hashlib.sha256(b"\0".join(pathlib.Path(name).read_bytes() for name in sys.argv[1:])).hexdigest())
PYTHON
)
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && "$venv/bin/python" -c '' 2>/dev/null; then
    echo "==> $venv is up to date"
    exit 0
fi

rm -f "$stamp"
if [[ -e $venv && ! -e $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
    echo "error: $venv is not a Python environment; name another folder" >&2
    exit 2
fi
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "==> creating $venv with $("$base" --version)"
    "$base" -m venv --clear "$venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

echo "==> installing torch for the CPU into $venv (later calls skip it)"
torch=$(grep '^torch==' "$requirements")
# PyPI's Linux build of torch brings gigabytes of CUDA libraries; it is the fallback where that index is out of reach.
if ! pip install -q --no-deps --retries 0 --timeout 10 --index-url "$cpu_index" "$torch" 2>/dev/null; then
    pip install -q "$torch"
fi
echo "==> installing SGLang and the other packages of $requirements (2 GB)"
pip install -q --no-deps -r "$requirements"
echo "==> checking that SGLang imports"
"$venv/bin/python" "$here/launch.py" --help >/dev/null
echo "$wanted" >"$stamp"
echo "==> $venv is ready"
