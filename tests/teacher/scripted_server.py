"""A small HTTP server that answers each request with the next step of a script."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    body: bytes = b""
    """What came with the request."""


Step = Callable[[Handler], None]


def reply(status: int, body: Any, **headers: str) -> Step:
    """Answer with ``body``: bytes as they are, anything else as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    def step(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return step


def drop(handler: Handler) -> None:
    """Close the connection without a word."""
    handler.close_connection = True
    handler.connection.close()


class ScriptedServer:
    """Runs from construction to :meth:`close`; after the last step of ``script`` it repeats that step.

    With ``tls`` it speaks HTTPS.
    """

    def __init__(self, *script: Step, tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[tuple[str, str, Any]] = []
        """Method, path and headers of what has been asked."""
        remaining, lock, requests = list(script), threading.Lock(), self.requests

        class Scripted(Handler):
            def answer(self) -> None:
                self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with lock:
                    requests.append((self.command, self.path, dict(self.headers)))
                    step = remaining.pop(0) if len(remaining) > 1 else remaining[0]
                step(self)

            do_GET = do_POST = answer

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
