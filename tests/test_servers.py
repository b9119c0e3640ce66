"""A server lives as long as its block, and nothing of it longer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from opd_megatron.config.errors import UserError
from opd_megatron.servers import local_server

HEALTHY = """
import http.server, pathlib, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
worker = subprocess.Popen([sys.executable, "-c", stubborn])
pathlib.Path(sys.argv[2]).write_text(str(worker.pid))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


def test_the_server_answers_in_the_block_and_all_its_processes_end_with_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "worker"
    command = [sys.executable, "-c", HEALTHY, "{port}", str(pid_file)]
    with local_server(command, log_path=tmp_path / "logs" / "server.log") as server:
        assert requests.get(server.url + "/health", timeout=5).status_code == 200
        assert "GET /health" in server.log_path.read_text()
        worker = int(pid_file.read_text())
        assert is_running(worker)
    assert not is_running(server.process.pid)
    assert wait_until_gone(worker)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such order to the kernel")
def test_a_server_goes_with_a_job_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(HEALTHY)
    program = (
        "import sys, time\n"
        "from opd_megatron.servers import local_server\n"
        "with local_server([sys.executable, sys.argv[1], '{port}', sys.argv[2]], log_path=sys.argv[3]) as server:\n"
        "    print(server.process.pid, flush=True)\n"
        "    time.sleep(600)"
    )
    arguments = [str(tmp_path / name) for name in ("server.py", "worker", "log")]
    job = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    server = int(job.stdout.readline())
    job.kill()
    job.communicate()
    assert wait_until_gone(server)
    os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)  # SGLang's own processes go with their parent


def test_a_server_that_ends_while_starting_is_reported_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with (
        pytest.raises(UserError, match="ended while starting; read"),
        local_server(command, log_path=tmp_path / "log", start_timeout=60),
    ):
        pass
    assert "no such model" in caplog.text


def test_a_server_that_never_becomes_healthy_is_ended(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    program = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    with (
        pytest.raises(UserError, match="was not healthy after 2 s"),
        local_server([sys.executable, "-c", program], log_path=tmp_path / "log", start_timeout=2),
    ):
        pass
    assert wait_until_gone(int(pid_file.read_text()))


def test_a_missing_program_is_the_users_error(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="cannot start the server"),
        local_server(["/no/such/program"], log_path=tmp_path / "log"),
    ):
        pass


def beside(tmp_path: Path, *command: str) -> subprocess.Popen[str]:
    (tmp_path / "server.py").write_text(HEALTHY)
    server = f"{sys.executable} {tmp_path / 'server.py'} {{port}} {tmp_path / 'worker'}"
    program = [sys.executable, "-m", "opd_megatron.servers", "--log", str(tmp_path / "log")]
    return subprocess.Popen(
        [*program, "--server", server, "--", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_the_program_runs_a_command_beside_a_server_and_returns_its_exit_code(tmp_path: Path) -> None:
    script = "import sys, requests; print(requests.get(sys.argv[1] + '/health').status_code); sys.exit(7)"
    process = beside(tmp_path, sys.executable, "-c", script, "{url}")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 7
    assert output.splitlines()[-1] == "200"
    assert wait_until_gone(int((tmp_path / "worker").read_text()))


def test_a_stop_signal_reaches_the_command_which_may_finish_its_work(tmp_path: Path) -> None:
    script = (
        "import pathlib, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(3)))\n"
        "pathlib.Path(sys.argv[1]).write_text('')\n"
        "signal.pause()"
    )
    process = beside(tmp_path, sys.executable, "-c", script, str(tmp_path / "running"))
    deadline = time.monotonic() + 60
    while not (tmp_path / "running").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert "saved" in output
    assert process.returncode == 3
    assert wait_until_gone(int((tmp_path / "worker").read_text()))
