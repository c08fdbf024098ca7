"""Whether an instance is there: one state, and who may change it.

The health watch and the proxy say what its HTTP port does, its agent's messages say that its
scheduler runs. Each loss ends only by the kind of sign that was missing:

    STARTING --serves--> SERVING --refuses--> REFUSED --serves--> SERVING
    STARTING, SERVING --silence--> SILENT --reports--> what it was before
    SILENT --refuses--> REFUSED, if it has served
"""

from __future__ import annotations

from enum import Enum, auto

SILENT_AFTER_S = 60.0
"""A status record comes with every step; a step of a large prefill on a CPU takes seconds."""


class LivenessState(Enum):
    """Only one that is `SERVING` answers; it was lost if `REFUSED` or `SILENT`."""

    STARTING = auto()
    SERVING = auto()
    REFUSED = auto()
    SILENT = auto()


_LOSSES = {
    LivenessState.REFUSED: "connection refused",
    LivenessState.SILENT: f"silent for {SILENT_AFTER_S:.0f} s",
}
"""Why an instance is lost, in the words of the admin API."""


class Liveness:
    """The state of one process. Times are seconds of the caller's monotonic clock."""

    __slots__ = ("_heard", "served", "state")

    def __init__(self, now: float) -> None:
        """`served` says whether its HTTP server has ever answered; `now` is when it was met."""
        self.state = LivenessState.STARTING
        self.served = False
        self._heard = now

    @property
    def alive(self) -> bool:
        """Whether it answers, as far as is known."""
        return self.state is LivenessState.SERVING

    @property
    def lost(self) -> bool:
        return self.state in _LOSSES

    @property
    def loss(self) -> str:
        """Why it is lost; empty if it is not."""
        return _LOSSES.get(self.state, "")

    def heard(self, now: float) -> None:
        """It gave any sign: that ends no loss, but no silence begins before."""
        self._heard = now

    def serves(self) -> None:
        """Its HTTP server says that it can take requests."""
        self.served = True
        if self.state is not LivenessState.SILENT:
            self.state = LivenessState.SERVING

    def refuses(self) -> None:
        """Nobody listens at its address; before it has served, its server is just not up yet."""
        if self.served:
            self.state = LivenessState.REFUSED

    def reports(self, now: float) -> None:
        """Its scheduler has said what it does."""
        self._heard = now
        if self.state is LivenessState.SILENT:
            self.state = LivenessState.SERVING if self.served else LivenessState.STARTING

    def check_silence(self, now: float) -> None:
        """Without a sign for `SILENT_AFTER_S`, it is lost."""
        if not self.lost and now - self._heard > SILENT_AFTER_S:
            self.state = LivenessState.SILENT
