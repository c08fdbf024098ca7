"""A file that is there as long as requests can be taken: for orchestrators that look at one."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

from kunserve_sglang.api.types import ClusterStatus, InstanceStatus
from kunserve_sglang.core.errors import ConfigurationError


class ReadyFile:
    """Without a path it does nothing."""

    def __init__(self, path: str) -> None:
        """Removes what an earlier launcher left; raises `ConfigurationError` if it cannot be."""
        self._path = Path(path) if path else None
        if self._path is not None:
            try:
                self._path.touch()
                self._path.unlink()
            except OSError as error:
                raise ConfigurationError(f"--ready-file {path}: {error.strerror}") from None

    @property
    def wanted(self) -> bool:
        return self._path is not None

    def follow(self, status: ClusterStatus | None, numbers: Set[int]) -> None:
        """`numbers` are the instances it is about, all of which have to take requests.

        While the router is away (None), it stays as it is: the instances go on with what they have.
        """
        if status is not None:
            self.show(numbers <= {i.id for i in status.instances if _takes_requests(i)})

    def show(self, ready: bool) -> None:
        if self._path is None:
            return
        if ready:
            self._path.touch()
        else:
            self._path.unlink(missing_ok=True)


def _takes_requests(instance: InstanceStatus) -> bool:
    return instance.serving and not instance.draining and instance.stalled is not True
