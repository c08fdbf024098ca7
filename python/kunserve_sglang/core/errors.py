"""The error taxonomy: who has to act decides which class is raised.

- `ConfigurationError`: the operator must change something; the process ends with one line.
- `TransientError`: nothing is broken; the same call may succeed later.
- `InternalError`: a bug in KunServe; never swallowed, always reported with its state.
"""

from __future__ import annotations


class KunServeError(Exception):
    """Base of all errors that KunServe raises on purpose."""


class ConfigurationError(KunServeError):
    """Flags, model or machine do not fit together; retrying cannot help."""


class TransientError(KunServeError):
    """The system is fine but cannot do this now (a transition runs, memory is in use, ...)."""


class TransitionRefused(TransientError):
    """A member voted against a transition; the old layout stays in force."""


class TransitionTimeout(TransientError):
    """A member did not answer in time; the old layout stays in force."""


class OutOfPages(TransientError):
    """The physical page pool has fewer free pages than were asked for."""


class MappingRefused(TransientError):
    """The system did not map or unmap pages, for want of something else; nothing has changed."""


class PeerLost(TransientError):
    """A member of the group stopped answering on the data plane."""


class StageFailed(TransientError):
    """A stage could not run a micro-batch: the fault of one of its requests, if it is one."""


class InternalError(KunServeError):
    """An invariant was found broken."""


class DriverError(InternalError):
    """The CUDA driver refused a call; `code` is the name of its `CUresult`."""

    def __init__(self, call: str, code: str) -> None:
        super().__init__(f"{call} failed: {code}")
        self.code = code
