"""HTTPS at the router, and certificates of clients."""

from __future__ import annotations

import http.client
import json
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from kunserve_sglang.api.client import RouterClient
from kunserve_sglang.api.errors import CallError
from kunserve_sglang.api.types import ClusterStatus
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.flags import read_flags
from kunserve_sglang.core.processes import free_port
from kunserve_sglang.launch_server import kunserve_parser
from kunserve_sglang.router.http.tls import server_context
from kunserve_sglang.router.settings import RouterConfig, launcher_socket
from tests.support.mock_worker import MockWorker
from tests.support.waiting import until
from tests.unit.router.test_process import environment_with

Run = Callable[[ClusterConfig], RouterClient]

PASSWORD = "only for this test"


@dataclass(frozen=True)
class Files:
    certificate: str
    key: str
    shut_key: str


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A certificate that has signed itself, and its key with a password and without."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key, shut = (str(folder / n) for n in ("c.pem", "k.pem", "shut.pem"))
    request = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    request += ["-nodes", "-days", "2", "-subj", "/CN=kunserve", "-keyout", key]
    request += ["-out", certificate, "-addext", "subjectAltName=IP:127.0.0.1"]
    locked = ["ec", "-in", key, "-aes256", "-passout", f"pass:{PASSWORD}", "-out", shut]
    for arguments in (request, locked):
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)
    return Files(certificate, key, shut)


def config_of(files: Files, **more: str) -> ClusterConfig:
    given = {"ssl_certfile": files.certificate, "ssl_keyfile": files.key, **more}
    return ClusterConfig(num_instances=0, port=free_port(), **given)  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Starts routers as processes, and waits until they answer their launcher."""
    routers = []

    def start(cluster: ClusterConfig) -> RouterClient:
        config = RouterConfig(cluster=cluster, control_address=f"ipc://{tmp_path}/c")
        environment = environment_with(config.to_environment())
        command = [sys.executable, "-m", "kunserve_sglang.router"]
        routers.append(subprocess.Popen(command, env=environment))
        launcher = RouterClient(f"unix://{launcher_socket(config.control_address)}", None)

        def answers() -> bool:
            try:
                return launcher.call("status").read(ClusterStatus) is not None
            except CallError:
                return False

        until(answers)
        return launcher

    yield start
    for router in routers:
        router.send_signal(signal.SIGTERM)
        assert router.wait(20) == 0


def ask(port: int, context: ssl.SSLContext, method: str, path: str, body: object = None) -> bytes:
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)
    with closing(connection):
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Origin": f"https://127.0.0.1:{port}"}
        connection.request(method, path, data, headers)
        return connection.getresponse().read()


@pytest.mark.parametrize("lock", [False, True], ids=["open key", "key with a password"])
def test_clients_speak_https_and_instances_http(
    run: Run, files: Files, worker: MockWorker, *, lock: bool
) -> None:
    more = {"ssl_keyfile": files.shut_key, "ssl_keyfile_password": PASSWORD} if lock else {}
    cluster = config_of(files, **more)
    run(cluster)
    context = ssl.create_default_context(cafile=files.certificate)
    ask(cluster.port, context, "POST", "/workers", {"url": worker.url})
    until(lambda: b"ok" in ask(cluster.port, context, "GET", "/readiness"))
    body = {"prompt": "x" * 300_000}
    assert b"/v1/completions" in ask(cluster.port, context, "POST", "/v1/completions", body)
    assert json.loads(worker.requests("/v1/completions")[0].body) == body
    # What is no TLS gets no answer, and does no harm.
    with closing(http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=20)) as plain:
        plain.request("GET", "/liveness")
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            plain.getresponse()
    assert b"ok" in ask(cluster.port, context, "GET", "/liveness")


def test_clients_have_to_show_a_certificate_where_one_is_asked_for(run: Run, files: Files) -> None:
    """Not the launcher, which asks at a socket of its own."""
    cluster = config_of(files, ssl_ca_certs=files.certificate)
    launcher = run(cluster)
    assert launcher.call("status").read(ClusterStatus).instances == []
    context = ssl.create_default_context(cafile=files.certificate)
    with pytest.raises(OSError, match=r"(?i)certificate|reset|EOF|closed"):
        ask(cluster.port, context, "GET", "/liveness")
    context.load_cert_chain(files.certificate, files.key)
    assert b"ok" in ask(cluster.port, context, "GET", "/liveness")


@pytest.mark.parametrize(
    "wrong",
    [
        {"ssl_certfile": "/nowhere"},
        {"ssl_keyfile": "/nowhere"},
        {"ssl_keyfile": __file__},
        {"ssl_ca_certs": "/nowhere"},
        {"ssl_ca_certs": __file__},
    ],
)
def test_files_that_cannot_be_used_end_the_start(files: Files, wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="--ssl-certfile"):
        server_context(config_of(files, **wrong))


def test_a_key_with_a_password_is_not_asked_for_at_a_terminal(files: Files) -> None:
    for more in ({}, {"ssl_keyfile_password": "another"}):
        with pytest.raises(ConfigurationError, match="--ssl-keyfile"):
            server_context(config_of(files, ssl_keyfile=files.shut_key, **more))


@pytest.mark.parametrize(
    "half",
    [
        {"ssl_certfile": "c"},
        {"ssl_keyfile": "k"},
        {"ssl_ca_certs": "a"},
        {"ssl_keyfile_password": "p"},
    ],
)
def test_half_of_the_flags_is_refused(half: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="--ssl-certfile"):
        ClusterConfig(**half)  # type: ignore[arg-type]


def test_flags_of_tls_are_the_routers() -> None:
    argv = ["--ssl-certfile", "c", "--ssl-keyfile", "k", "--ssl-ca-certs", "a", "--tp-size", "1"]
    flags, rest = kunserve_parser().parse_known_args(argv)
    config = read_flags(flags, ClusterConfig)
    assert (config.ssl_certfile, config.ssl_keyfile, config.ssl_ca_certs) == ("c", "k", "a")
    assert (config.scheme, rest) == ("https", ["--tp-size", "1"])
