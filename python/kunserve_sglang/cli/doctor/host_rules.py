"""What a host may have too little of. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from kunserve_sglang.cli.doctor.expected import budget_of
from kunserve_sglang.cli.doctor.facts import Facts, HostFacts
from kunserve_sglang.cli.doctor.finding import Finding, error, warning
from kunserve_sglang.core.page_sizes import mappings_for, page_bytes_on_cpu
from kunserve_sglang.core.sizes import format_size

_FILES_OF_AN_INSTANCE = 128
"""A scheduler with one peer has some 85 open before its first request."""

_FILES_OF_A_ROUTER = 32
_WAITING_AT_AN_INSTANCE = 256
"""Requests under way there before the router holds others back, at least."""

_SHARED_FOR_NCCL = 1 << 30
_SOCKET_PATH = 107
"""Bytes in the address of a socket of the file system."""

LONGEST_BESIDE_STATE = "/control.http"
LONGEST_BESIDE_TEMPORARY = "/kunserve-12345678/control.http"


def host_findings(facts: Facts) -> Iterator[Finding]:
    """What the router needs; then, if instances are to run here, what these need."""
    host = facts.host
    yield from _system(facts)
    yield from _files(facts)
    yield from _temporary(host)
    if not facts.instances:
        return
    yield from _shared_memory(facts)
    if facts.instances > host.cores:
        yield warning(
            "cores",
            f"{facts.instances} instances share {host.cores} cores, and slow each other down",
            f"--num-instances {host.cores}, or a host with more cores",
        )
    if facts.asked.device == "cuda":
        yield from _gpus(facts)
    else:
        yield from _memory(facts)
        yield from _mappings(facts)


def _system(facts: Facts) -> Iterator[Finding]:
    host = facts.host
    if host.system != "Linux":
        yield error("system", f"this is {host.system}", "use Linux")
    elif facts.instances and host.machine != "x86_64":
        yield warning(
            "machine",
            f"this is {host.machine}, and instances were tried on x86_64 only",
            "use a host of that kind if something fails",
        )


def _files(facts: Facts) -> Iterator[Finding]:
    there, instances = facts.host.open_files, facts.instances
    fewest = _FILES_OF_AN_INSTANCE if instances else _FILES_OF_A_ROUTER
    # A request takes a socket of the client's, and one to its instance when it has left the queue.
    wanted = fewest + facts.asked.max_queued + 2 * _WAITING_AT_AN_INSTANCE * max(1, instances)
    if there < fewest:
        yield error(
            "open-files",
            f"a process may open {there} files, and one needs {fewest} to start",
            f"ulimit -Hn {wanted}, or LimitNOFILE of the service",
        )
    elif there < wanted:
        yield warning(
            "open-files",
            f"a process may open {there} files: the router can have some "
            f"{(there - _FILES_OF_A_ROUTER) // 2:,} requests under way, and queues fewer than "
            f"--max-queued ({facts.asked.max_queued:,})",
            f"ulimit -Hn {wanted}, or LimitNOFILE of the service",
        )


def _temporary(host: HostFacts) -> Iterator[Finding]:
    if host.temporary.error:
        yield error(
            "temporary-folder",
            f"nothing can be written to {host.temporary.path}: {host.temporary.error}",
            "set TMPDIR to a folder that can be written to",
        )
    elif too_long(host.temporary.path, LONGEST_BESIDE_TEMPORARY):
        yield error(
            "temporary-folder",
            f"{host.temporary.path} is too long a path for sockets in it",
            "set TMPDIR to a folder with a shorter path",
        )


def too_long(folder: str, beside: str) -> bool:
    """Whether a socket in this folder would have too long an address."""
    return len(f"{folder}{beside}".encode()) > _SOCKET_PATH


def _shared_memory(facts: Facts) -> Iterator[Finding]:
    memory = facts.host.memory
    if memory.shared_error:
        yield error(
            "shared-memory",
            f"nothing can be written to /dev/shm: {memory.shared_error}",
            "mount a tmpfs there (docker run --shm-size)",
        )
    elif facts.asked.device == "cuda" and memory.shared < _SHARED_FOR_NCCL:
        yield warning(
            "shared-memory",
            f"/dev/shm has {format_size(memory.shared)} free, and NCCL keeps its buffers there",
            f"make it {format_size(_SHARED_FOR_NCCL)} or more (docker run --shm-size=1g)",
        )


def _memory(facts: Facts) -> Iterator[Finding]:
    host, budget = facts.host, budget_of(facts)
    if not host.memory_files:
        yield error(
            "memory-files",
            "this system has no memory files (memfd_create), in which pages live",
            "use a kernel and a container runtime that have them",
        )
    total = budget * facts.instances
    free = host.memory.free
    if total > free:
        limited = free < host.memory.available
        whose = "the control group leaves" if limited else "the host has"
        yield error(
            "memory",
            f"{facts.instances} instances take {format_size(total)}, and {whose} "
            f"{format_size(free)}",
            f"--memory-budget {free // facts.instances // 2 >> 20}MiB, or more memory",
        )


def _mappings(facts: Facts) -> Iterator[Finding]:
    budget = budget_of(facts)
    pages = budget // page_bytes_on_cpu(budget)
    if (wanted := mappings_for(pages)) > facts.host.mappings:
        yield warning(
            "mappings",
            f"vm.max_map_count is {facts.host.mappings}, and {pages} pages of an instance may need "
            f"{wanted}: it would refuse drops",
            f"sysctl -w vm.max_map_count={wanted}",
        )


def _gpus(facts: Facts) -> Iterator[Finding]:
    host, asked = facts.host, facts.asked
    if not host.gpus:
        yield error(
            "gpus",
            "no NVIDIA GPU is there for programs of this process",
            "install the driver, give the container its GPUs, or look at CUDA_VISIBLE_DEVICES",
        )
    elif facts.instances > len(host.gpus) and not asked.memory_budget:
        yield error(
            "gpus-shared",
            f"{facts.instances} instances share {len(host.gpus)} GPUs, and none knows its part",
            "--memory-budget SIZE",
        )
    missing = [
        what
        for what, there in (("a C compiler", host.compiler), ("Python's headers", host.headers))
        if not there
    ]
    if missing:
        yield error(
            "compiler",
            f"Triton builds its kernels with {' and '.join(missing)}, not found here",
            "install gcc and the development files of this Python (python3-dev)",
        )
