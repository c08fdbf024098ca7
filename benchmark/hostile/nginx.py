"""nginx as Debian has it, unpacked and not installed: a proxy to compare with."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmark.experiment import RunError
from benchmark.program import ROOT
from kunserve_sglang.core.processes import free_port

_UNPACKED = ROOT / "build" / "nginx"
_TIMEOUT_S = 120.0
_READY_TIMEOUT_S = 10.0
_CONFIGURATION = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream instances {{ server 127.0.0.1:{backend}; keepalive 4; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://instances; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_request_buffering off;
    }}
  }}
}}
"""


@contextmanager
def nginx(backend: int, folder: Path) -> Iterator[int]:
    """Its port, while it runs before `backend`. Raises `RunError` if it cannot be had."""
    program = _provided()
    port = free_port()
    configuration = folder / "nginx.conf"
    configuration.write_text(_CONFIGURATION.format(folder=folder, backend=backend, port=port))
    command = [str(program), "-p", str(folder), "-c", str(configuration), "-e", f"{folder}/e.log"]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RunError("nginx did not start")
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(10)


def nginx_version() -> str:
    done = subprocess.run([str(_provided()), "-v"], capture_output=True, text=True, check=True)
    return done.stderr.strip().removeprefix("nginx version: ")


def _provided() -> Path:
    program = _UNPACKED / "usr" / "sbin" / "nginx"
    if program.exists():
        return program
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise RunError("nginx comes as a Debian package, and this is no Debian")
    making = _UNPACKED.with_name("nginx.new")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    try:
        for command in (
            ["apt-get", "-qq", "download", "nginx"],
            ["sh", "-c", "dpkg -x nginx_*.deb ."],
        ):
            subprocess.run(command, cwd=making, check=True, timeout=_TIMEOUT_S)
    except subprocess.SubprocessError as error:
        raise RunError(f"could not get nginx: {error}") from error
    making.rename(_UNPACKED)
    return program


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
