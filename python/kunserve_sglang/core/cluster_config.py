"""What a cluster's router is told: by flags, which are made of these fields."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from kunserve_sglang.core.addresses import bracketed, check_control_address
from kunserve_sglang.core.choices import DispatchPolicy
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.flags import Form, about, check_ranges
from kunserve_sglang.core.hosts import is_address
from kunserve_sglang.core.service_classes import read_classes
from kunserve_sglang.core.settings import SharedSettings
from kunserve_sglang.core.transports import ExchangeMode, Transport


class ClusterConfig(SharedSettings, frozen=True, kw_only=True):
    """What the router is told by flags. Thresholds are fractions of the KV capacity.

    Without instances there is just a router, for plain SGLang servers that are added to it and for
    instances that join. What only a launcher needs to know is in `launch.options`.
    """

    host: Annotated[
        str,
        about(
            "address at which the router [listens](#who-can-reach-it); instances use loopback "
            "ports of their own"
        ),
    ] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535), about("port of the router")] = 30000
    allow_open: Annotated[
        bool,
        about(
            "listen beyond loopback without any key, so that everybody who reaches `--host` can "
            "use and change the cluster"
        ),
    ] = False
    num_instances: Annotated[
        int,
        Meta(ge=0),
        about(
            "full copies of the model to start, each with an equal part of the cores; 0: only the "
            "router, for [plain servers](#plain-sglang-servers) and instances that "
            "[join](#more-instances)",
        ),
    ] = 2
    dispatch: Annotated[
        DispatchPolicy,
        about(
            "which instance [gets a request](#dispatch): by turns, the least loaded, or the one "
            "with the least product of tokens to prefill and batch size"
        ),
    ] = DispatchPolicy.LMETRIC
    drop_threshold: Annotated[
        float,
        Meta(gt=0, le=2),
        about("drop when demand exceeds this share of the KV capacity and requests wait"),
    ] = 0.95
    restore_threshold: Annotated[
        float,
        Meta(ge=0),
        about("restore when demand is below this share of the full-replica capacity"),
    ] = 0.5
    max_group_size: Annotated[int, Meta(ge=1), about("most instances that may share one copy")] = 8
    join_room: Annotated[
        int,
        Meta(ge=0),
        about(
            "so many instances that [join](#more-instances) later may be in a group beside all "
            "started here",
        ),
    ] = 0
    control_address: Annotated[
        str | None,
        about(
            "where instances on other hosts find the router, encrypted and with keys that they get "
            "from it; needs an admin key",
            metavar="tcp://HOST:PORT",
            default="this host only",
        ),
    ] = None
    control_bind: Annotated[
        str | None,
        about(
            "address of this host at which that port listens, e.g. `0.0.0.0` where "
            "`--control-address` is a name that leads here by way of a container's network; with "
            "`--num-instances 0` only",
            metavar="ADDRESS",
            default="that of `--control-address`",
        ),
    ] = None
    slo_ttft_ms: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        about("[limit](#service-levels) to the first token", default="five times as alone"),
    ] = None
    slo_tpot_ms: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        about("and for each token after it, on average", default="five times as alone"),
    ] = None
    slo_class: Annotated[
        tuple[str, ...],
        about(
            "`NAME=TTFT_MS:TPOT_MS`: limits for a [class](#attainment) of requests, those with "
            "`X-KunServe-Class: NAME`; may be given several times",
            metavar="NAME=TTFT_MS:TPOT_MS",
        ),
    ] = ()
    tpot_limit_ms: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        about(
            "drop nothing that would make an output token take longer, by the cost model; requests "
            "queue instead, as many as SGLang's `--max-queued-requests` allows",
            default="no limit",
        ),
    ] = None
    exchange: Annotated[
        ExchangeMode,
        about("KV and parameters move while serving goes on; `stop`: while the group stands still"),
    ] = ExchangeMode.COORDINATED
    max_in_flight: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        about(
            "requests under way at an instance before the router [holds others back](#queueing)",
            default="as many wait there as run there, and at least 256",
        ),
    ] = None
    max_queued: Annotated[
        int, Meta(ge=0), about("requests that the router holds back before it answers 429")
    ] = 10_000
    queue_timeout_s: Annotated[
        float,
        Meta(gt=0, le=86_400),
        about("how long the router holds one back before it answers 503"),
    ] = 600.0
    stop_grace_s: Annotated[
        float,
        Meta(ge=0, le=86_400),
        about(
            "how long answers under way may go on when the router is told to stop, which lets "
            "nobody in meanwhile; then they are cut"
        ),
    ] = 2.0
    resume_memory: Annotated[
        int,
        Meta(ge=0),
        about(
            "what the router keeps of all streams, so that others can "
            "[go on](#when-an-instance-dies) with them; 0: nothing",
            default="256MiB",
            form=Form.SIZE,
        ),
    ] = 256 << 20
    admin_api_key: Annotated[
        str | None,
        about(
            "[key](#admin-api) that calls need which change anything; without it, SGLang's "
            "`--api-key` if there is one",
            form=Form.SECRET,
        ),
    ] = None
    read_api_key: Annotated[
        str | None,
        about(
            "key that calls under `/kunserve` need which only look; the admin key opens them too",
            form=Form.SECRET,
        ),
    ] = None
    tenants: Annotated[
        str | None, about("who [shares](#tenants) the cluster, by key", metavar="FILE")
    ] = None
    trusted_hosts: Annotated[
        str,
        about(
            "names, with commas between, besides its own by which browsers may call the router "
            "where [no key is needed](#who-may-call), and hosts whose pages may; `*`: all"
        ),
    ] = ""
    ssl_certfile: Annotated[
        str | None,
        about("certificates by which the router serves https; instances of this host stay plain"),
    ] = None
    ssl_keyfile: Annotated[str | None, about("key of `--ssl-certfile`")] = None
    ssl_keyfile_password: Annotated[
        str | None, about("password of `--ssl-keyfile`", form=Form.SECRET)
    ] = None
    ssl_ca_certs: Annotated[
        str | None,
        about("clients have to show a certificate that one of these has signed"),
    ] = None
    state_folder: Annotated[
        str,
        about(
            "where a launcher finds its keys and what its router was told when it is "
            "[started again](#the-router-and-its-launcher)",
            default="both are new at each start",
        ),
    ] = ""
    vote_timeout_s: Annotated[float, Meta(gt=0)] = 10.0
    exchange_timeout_s: Annotated[float, Meta(gt=0)] = 60.0
    transfer_timeout_s: Annotated[float, Meta(gt=0)] = 600.0

    def __post_init__(self) -> None:
        check_ranges(self)
        read_classes(self.slo_class)
        if self.restore_threshold >= self.drop_threshold:
            raise ConfigurationError(
                "--restore-threshold must be at least 0 and below --drop-threshold, "
                "or the cluster would drop and restore in turns"
            )
        if bool(self.ssl_certfile) != bool(self.ssl_keyfile):
            raise ConfigurationError("--ssl-certfile and --ssl-keyfile: give both")
        if not self.ssl_certfile and (self.ssl_keyfile_password or self.ssl_ca_certs):
            raise ConfigurationError(
                "--ssl-keyfile-password and --ssl-ca-certs need --ssl-certfile and --ssl-keyfile"
            )
        if self.control_address is not None:
            check_control_address(self.control_address)
            if self.transport in (Transport.SHM, Transport.CUDA_IPC):
                raise ConfigurationError(
                    f"--transport {self.transport} ends at this host, and --control-address lets "
                    "instances of other hosts join"
                )
        if self.control_bind is not None:
            if self.control_address is None or self.num_instances:
                raise ConfigurationError(
                    "--control-bind needs --control-address and --num-instances 0: instances of "
                    "this host listen at --control-address themselves"
                )
            if not is_address(self.control_bind):
                raise ConfigurationError(f"--control-bind {self.control_bind}: not an address")

    @property
    def control_listen(self) -> str | None:
        """The ZMQ address at which members of other hosts are listened to."""
        if self.control_address is None or self.control_bind is None:
            return self.control_address
        port = self.control_address.rpartition(":")[2]
        return f"tcp://{bracketed(self.control_bind)}:{port}"

    @property
    def trusted(self) -> tuple[str, ...]:
        """The names in `trusted_hosts`."""
        return tuple(name for n in self.trusted_hosts.split(",") if (name := n.strip()))

    @property
    def scheme(self) -> str:
        """Of the router's URLs."""
        return "https" if self.ssl_certfile else "http"

    @property
    def largest_group(self) -> int:
        """The largest group that an instance of this cluster has room for."""
        if not self.num_instances:
            return self.max_group_size
        return min(self.num_instances + self.join_room, self.max_group_size)

    @property
    def data_host(self) -> str:
        """The address at which instances of this host listen with keys; empty: not at all."""
        if self.control_address is not None:
            return self.control_address.removeprefix("tcp://").rpartition(":")[0]
        return "127.0.0.1" if self.transport is Transport.TCP else ""
