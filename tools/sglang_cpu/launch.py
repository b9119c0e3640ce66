"""The real SGLang server on a CPU: ``VENV/bin/python launch.py --model-path DIR --port PORT [any SGLang flag]``.

VENV is an environment made by ``install.sh``. The flags below come first, so that the same flag on the command line
wins. Worker processes import this file again before anything of SGLang, so the shims reach them too.
"""

import itertools
import os
import sys
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(_FOLDER), str(_FOLDER / "stubs")]
# More threads than one busy-wait against the server's other processes on a machine with few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import shims  # noqa: E402, F401

# --skip-server-warmup: the warm-up asks for an English sentence; a tokenizer without these characters makes an empty
# prompt of it, which ends the server.
DEFAULT_FLAGS = (
    ("--device", "cpu"),
    ("--attention-backend", "torch_native"),
    ("--sampling-backend", "pytorch"),
    ("--grammar-backend", "none"),
    ("--dtype", "float32"),
    ("--host", "127.0.0.1"),
    ("--max-total-tokens", "16384"),
    ("--max-running-requests", "64"),
    ("--log-level-http", "warning"),
    ("--disable-overlap-schedule",),
    ("--sleep-on-idle",),
    ("--skip-server-warmup",),
)


def main() -> None:
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    arguments = prepare_server_args([*itertools.chain.from_iterable(DEFAULT_FLAGS), *sys.argv[1:]])
    from sglang.launch_server import run_server

    try:
        run_server(arguments)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
