"""Faults on purpose: a process ends, stands still or loses a message at a named point of its work.

For operators and tests who want to see what a cluster survives. `KUNSERVE_FAULT` arms them for a
router or a scheduler, which reads it once, at its start; without it every point is a call that
returns at once. What a launcher starts again has no faults any more. Instead of faults it may name
a file of them, which is looked at whenever a point is reached: whoever writes it arms a cluster
that runs already, what is started again included, and disarms it.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.fault_points import INSTANCE_POINTS, POINTS, ROUTER_POINTS, FaultKind

logger = logging.getLogger(__name__)

FAULT_ENVIRONMENT = "KUNSERVE_FAULT"
"""Environment variable: `point:kind:nth`, or `point:kind:nth:instance`; commas between several.

Or `@` and the path of a file that has just that in it, or nothing for now.
"""

FILE_MARK = "@"

_DELAY_S = 2.0
_MAX_DELAY_S = 3600.0


@dataclass(frozen=True, slots=True)
class InjectedFault:
    """Happens once, when its point is reached for the `nth` time, from 1 on.

    It happens in this `instance`, or in every process that has the point.
    """

    point: str
    kind: FaultKind
    nth: int = 1
    instance: int | None = None
    delay_s: float = _DELAY_S

    def __str__(self) -> str:
        return f"{self.point}:{self.kind}:{self.nth}"


class Effects(Protocol):
    """How a process suffers what concerns it as a whole."""

    def crash(self) -> None: ...

    def hang(self) -> None: ...

    def delay(self, seconds: float) -> None: ...


class ProcessEffects:
    """On this process, all of its threads included; this one goes not a step further."""

    def crash(self) -> None:
        signal.raise_signal(signal.SIGKILL)

    def hang(self) -> None:
        signal.raise_signal(signal.SIGSTOP)

    def delay(self, seconds: float) -> None:
        time.sleep(seconds)


class Faults:
    """The faults of one process, and how often their points have been reached."""

    def __init__(self, faults: tuple[InjectedFault, ...], effects: Effects) -> None:
        self._due = {(f.point, f.nth): f for f in faults}
        self._points = {f.point for f in faults}
        self._reached: Counter[str] = Counter()
        self._effects = effects

    @property
    def happened(self) -> bool:
        """Nothing more is to come."""
        return not self._due

    def reach(self, point: str) -> FaultKind | None:
        """The process suffers what is due at `point`; drop and corrupt are left to the caller."""
        if point not in self._points:
            return None
        self._reached[point] += 1
        fault = self._due.pop((point, self._reached[point]), None)
        if fault is None:
            return None
        logger.warning("fault on purpose: %s", fault)
        match fault.kind:
            case FaultKind.CRASH:
                self._effects.crash()
            case FaultKind.HANG:
                self._effects.hang()
            case FaultKind.DELAY:
                self._effects.delay(fault.delay_s)
            case lost:
                return lost
        return None


class FaultsOfFile:
    """The faults that are in a file now; from each change of it on, all points are counted anew.

    It is to be replaced as a whole, by a rename: what is half written cannot be read.
    """

    def __init__(self, path: Path, instance: int | None, effects: Effects) -> None:
        """Raises `ConfigurationError` if it cannot be read."""
        self._path = path
        self._instance = instance
        self._effects = effects
        self._seen = self._stamp()
        self._faults = Faults(self._read(), effects)

    def reach(self, point: str) -> FaultKind | None:
        """As `Faults.reach`. What cannot be read is no fault, and said once."""
        if (stamp := self._stamp()) != self._seen:
            self._seen = stamp
            try:
                read = self._read()
            except ConfigurationError as error:
                logger.error("%s", error)
                read = ()
            self._faults = Faults(read, self._effects)
        return self._faults.reach(point)

    def _stamp(self) -> tuple[int, int, int]:
        """Of the file as it is; zeros if there is none."""
        try:
            found = self._path.stat()
        except OSError:
            return 0, 0, 0
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _read(self) -> tuple[InjectedFault, ...]:
        return _concerning(_read_faults(_text_of(self._path)), self._instance)


class SuffersFaults(Protocol):
    """What `arm` takes."""

    def reach(self, point: str) -> FaultKind | None: ...


_armed: SuffersFaults | None = None


def at(point: str) -> FaultKind | None:
    """To be called at every point of `POINTS`; a message there has to be lost as it says."""
    return None if _armed is None else _armed.reach(point)


def loses(where: str, message: object) -> bool:
    """Whether a message gets lost on purpose; its point is named after its type, in lower case."""
    return armed() and at(f"{where}.{type(message).__name__.lower()}") is FaultKind.DROP


def armed() -> bool:
    """For places that are passed too often for a call: whether there are faults at all."""
    return _armed is not None


def arm(faults: SuffersFaults | None) -> None:
    """From now on, in this process; None: no faults any more."""
    global _armed
    _armed = faults


def arm_from_environment(instance: int | None = None) -> None:
    """To be called once, by the router or the scheduler of an instance.

    Raises `ConfigurationError`.
    """
    if path := fault_file(os.environ):
        logger.warning("faults on purpose will happen here, as %s says", path)
        arm(FaultsOfFile(path, instance, ProcessEffects()))
        return
    faults = _concerning(faults_in(os.environ), instance)
    if faults:
        logger.warning("faults on purpose will happen here: %s", ", ".join(map(str, faults)))
        arm(Faults(faults, ProcessEffects()))


def fault_file(environment: Mapping[str, str]) -> Path | None:
    """Where the faults stand, if not in the environment itself."""
    text = environment.get(FAULT_ENVIRONMENT, "").strip()
    return Path(text[len(FILE_MARK) :]) if text.startswith(FILE_MARK) else None


def faults_in(environment: Mapping[str, str]) -> tuple[InjectedFault, ...]:
    """All of them now, wherever they stand.

    Raises `ConfigurationError` for what is not written as it should be, or cannot be read.
    """
    path = fault_file(environment)
    return _read_faults(_text_of(path) if path else environment.get(FAULT_ENVIRONMENT, ""))


def _text_of(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{FAULT_ENVIRONMENT}={FILE_MARK}{path}: it cannot be read: {error}"
        ) from None


def _read_faults(text: str) -> tuple[InjectedFault, ...]:
    return tuple(_read_fault(one.strip()) for one in text.split(",") if one.strip())


def _concerning(
    faults: tuple[InjectedFault, ...], instance: int | None
) -> tuple[InjectedFault, ...]:
    """Those of one process: a router's without an `instance`."""
    mine = INSTANCE_POINTS if instance is not None else ROUTER_POINTS
    return tuple(f for f in faults if f.point in mine and f.instance in (None, instance))


def _read_fault(text: str) -> InjectedFault:
    def refuse(why: str) -> ConfigurationError:
        return ConfigurationError(
            f"{FAULT_ENVIRONMENT}={text}: {why} (`kunserve faults` lists the points)"
        )

    parts = text.split(":")
    if len(parts) not in (3, 4):
        raise refuse("this is not point:kind:nth or point:kind:nth:instance")
    name, kind_text, nth, *rest = parts
    kind_name, equals, seconds = kind_text.partition("=")
    if (point := POINTS.get(name)) is None:
        raise refuse(f"there is no point {name!r}")
    if kind_name not in point.kinds:
        raise refuse(f"what can happen there is {', '.join(point.kinds)}")
    kind = FaultKind(kind_name)
    if not _is_number(nth) or not int(nth):
        raise refuse("nth is a number from 1 on")
    if rest and not (name in INSTANCE_POINTS and _is_number(rest[0])):
        raise refuse("an instance is a number, and the router has none")
    if equals and kind is not FaultKind.DELAY:
        raise refuse(f"{kind} takes no seconds")
    delay_s = _seconds(seconds, refuse) if equals else _DELAY_S
    return InjectedFault(name, kind, int(nth), int(rest[0]) if rest else None, delay_s)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _seconds(text: str, refuse: Callable[[str], ConfigurationError]) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= _MAX_DELAY_S:
        raise refuse(f"a delay takes some seconds, at most {_MAX_DELAY_S:g}")
    return seconds
