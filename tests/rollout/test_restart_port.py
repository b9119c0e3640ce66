"""A server of the engine's that dies comes back where it was."""

from __future__ import annotations

import asyncio
import socket
import sys
from functools import partial
from pathlib import Path

import pytest

from opd_megatron.rollout.sglang_server import SGLangServer
from opd_megatron.rollout.weight_check import TOLERANCES, WeightCheck
from opd_megatron.servers import start_server

PROGRAM = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.parametrize("taken", [False, True])
def test_a_server_that_is_started_again_listens_where_it_did_unless_somebody_took_the_port(
    tmp_path: Path, taken: bool
) -> None:
    launch = partial(start_server, [sys.executable, "-c", PROGRAM, "{port}"], log_path=tmp_path / "log")

    async def restart() -> tuple[str, str]:
        server = SGLangServer(WeightCheck(TOLERANCES["float32"]), 5.0, launch=launch)
        with socket.socket() as other:
            try:
                await server.wait_until_healthy()
                before = server.address
                assert server._process is not None
                server._process.kill()
                if taken:
                    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    other.bind(("127.0.0.1", int(before.rpartition(":")[2])))
                    other.listen()
                await server.restart()
                return before, server.address
            finally:
                await server.close()

    before, after = asyncio.run(restart())
    assert (before == after) != taken
