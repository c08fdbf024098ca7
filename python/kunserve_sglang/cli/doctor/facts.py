"""What is known of an installation, the host that it is on, and what is asked of them.

`gathering` finds it out; rules read nothing else.
"""

from __future__ import annotations

import msgspec

from kunserve_sglang.core.transports import Transport


class PackageFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A package. `version` is that of the distribution, None if there is none.

    `imported` is the folder that Python would import, `brought` the one that the distribution has
    brought; empty: none, or not known.
    """

    version: str | None = None
    imported: str = ""
    brought: str = ""


class PluginFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What SGLang finds of us: `value` is the entry point's, empty if there is none.

    `there` is whether its module exists; `allowed` is `SGLANG_PLUGINS`, empty for all.
    """

    value: str = ""
    there: bool = False
    allowed: str = ""


class InstallationFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What Python has.

    `pinned` is the version of SGLang that each of our extras asks for, `missing` what we need and
    is not installed. `kernels` is the version of SGLang's kernels for GPUs.
    """

    python: str
    requires_python: str = ""
    own: PackageFacts
    sglang: PackageFacts
    torch: PackageFacts
    kernels: str | None = None
    pinned: dict[str, str] = {}
    missing: tuple[str, ...] = ()
    plugin: PluginFacts = PluginFacts()


class FolderFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A folder that is to be written to; `error` says why it cannot be, if so."""

    path: str
    error: str = ""


class MemoryFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes. `available` is what the host has free, `left` what the control groups of this process
    leave to it (None: no limit), `shared` what is free in `/dev/shm`."""

    available: int
    left: int | None = None
    shared: int
    shared_error: str = ""

    @property
    def free(self) -> int:
        """What processes here can have: of the host, within their limits."""
        return self.available if self.left is None else min(self.available, self.left)


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """`cores` are those that this process may use, `cpu_features` those that a dtype depends on.

    `gpus` has the names of those that programs may use. `open_files` is what a process may raise
    its limit to, `mappings` is `vm.max_map_count`. `compiler` and `headers` are what Triton needs.
    """

    system: str
    machine: str
    cores: int
    cpu: str = ""
    cpu_features: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    memory: MemoryFacts
    open_files: int
    mappings: int
    memory_files: bool = True
    temporary: FolderFacts
    compiler: bool = False
    headers: bool = False


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A model that was named. `here` is whether it is a folder; otherwise it is a hub's name."""

    path: str
    here: bool = False
    error: str = ""
    dtype: str = ""
    parameter_bytes: int = 0


class AskedFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The flags of `launch_server` that matter here.

    `instances` is None if it was not said. `port_error` says why nobody could listen at the port
    that was named. `memory_budget` 0: not given.
    """

    instances: int | None = None
    device: str = "cpu"
    memory_budget: int = 0
    transport: Transport = Transport.AUTO
    max_queued: int
    host: str
    port: int = 0
    port_error: str = ""
    has_key: bool = False
    allow_open: bool = False


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    asked: AskedFacts
    installation: InstallationFacts
    host: HostFacts
    model: ModelFacts | None = None
    state: FolderFacts | None = None

    @property
    def instances(self) -> int:
        """How many are to run here; none where nobody has asked for them and there is no SGLang."""
        if self.asked.instances is not None:
            return self.asked.instances
        if self.installation.sglang.version is None and self.model is None:
            return 0
        return 2
