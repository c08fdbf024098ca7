"""Whether an instance is there: one state, and who may change it.

The health watch and the proxy say what its HTTP port does, its agent's messages say that its
scheduler runs. Each loss ends only by the kind of sign that was missing:

    STARTING --serves--> SERVING --refuses--> REFUSED --serves--> SERVING
    SERVING, REFUSED --vanishes--> UNREACHABLE --serves--> SERVING
    STARTING, SERVING --silence--> SILENT --reports--> what it was before
    SILENT --refuses--> REFUSED, --vanishes--> UNREACHABLE, if it has served
"""

from __future__ import annotations

from enum import Enum, auto

SILENT_AFTER_S = 60.0
"""A status record comes with every step; a step of a large prefill on a CPU takes seconds."""

QUIET_AFTER_S = 20.0
"""A scheduler says something every few seconds, even if it has nothing to do; a long step, or a
transition that waits for peers, may keep it from that for a while."""


class LivenessState(Enum):
    """Only one that is `SERVING` answers; it was lost if it is in one of the last three."""

    STARTING = auto()
    SERVING = auto()
    REFUSED = auto()
    UNREACHABLE = auto()
    SILENT = auto()


_LOSSES = {
    LivenessState.REFUSED: "connection refused",
    LivenessState.UNREACHABLE: "host does not answer",
    LivenessState.SILENT: f"silent for {SILENT_AFTER_S:.0f} s",
}
"""Why an instance is lost, in the words of the admin API."""


class Liveness:
    """The state of one process. Times are seconds of the caller's monotonic clock."""

    __slots__ = ("_heard", "_spoke", "quiet", "served", "state")

    def __init__(self, now: float) -> None:
        """`served` says whether its HTTP server has ever answered; `now` is when it was met.

        It is `quiet` if its scheduler has given no sign for long, be there an HTTP server or not.
        """
        self.quiet = False
        self.state = LivenessState.STARTING
        self.served = False
        self._heard = self._spoke = now

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

    def speaks(self, now: float) -> None:
        """Its scheduler gave a sign, which its HTTP server may do without it."""
        self._heard = self._spoke = now
        self.quiet = False

    def serves(self) -> None:
        """Its HTTP server says that it can take requests."""
        self.served = True
        if self.state is not LivenessState.SILENT:
            self.state = LivenessState.SERVING

    def refuses(self) -> None:
        """Nobody listens at its address; before it has served, its server is just not up yet."""
        if self.served:
            self.state = LivenessState.REFUSED

    def vanishes(self) -> None:
        """Nothing at its address answers, not even to refuse: its host is gone, or the way."""
        if self.served:
            self.state = LivenessState.UNREACHABLE

    def silence_s(self, now: float) -> float:
        """Seconds since its last sign."""
        return now - self._heard

    def reports(self, now: float) -> None:
        """Its scheduler has said what it does."""
        self.speaks(now)
        if self.state is LivenessState.SILENT:
            self.state = LivenessState.SERVING if self.served else LivenessState.STARTING

    def check_silence(self, now: float) -> None:
        """Without a sign for `SILENT_AFTER_S`, it is lost."""
        self.quiet = now - self._spoke > QUIET_AFTER_S
        if not self.lost and now - self._heard > SILENT_AFTER_S:
            self.state = LivenessState.SILENT
