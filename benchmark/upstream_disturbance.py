"""A cluster that drops and restores all the time, while something else is asked of it."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from typing import Any, Self

from benchmark.experiment import RunError

_PAUSE_S = 0.3
_CALL_S = 120.0
_REST_S = 60.0


class Disturbance:
    """Context manager: drops and restores by turns, from entry until exit; independent after it.

    `ended` counts how they ended, by kind and status, such as `drop committed`; the answers of a
    router that could begin none count by their code, such as `restore no_plan`.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self.ended: Counter[str] = Counter()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Raises `RunError` if the instances do not become independent."""
        self._stop.set()
        self._thread.join(_CALL_S)
        deadline = time.monotonic() + _REST_S
        while time.monotonic() < deadline:
            if {i["mode"] for i in status(self._url)["instances"]} == {"independent"}:
                return
            self._transition("restore")
            time.sleep(_PAUSE_S)
        raise RunError("the instances are still in a group when all is over")

    def _loop(self) -> None:
        while not self._stop.is_set():
            for kind in ("drop", "restore"):
                self._transition(kind)
                self._stop.wait(_PAUSE_S)

    def _transition(self, kind: str) -> None:
        try:
            event = call(self._url, f"/kunserve/{kind}", b"{}")
            self.ended[f"{kind} {event['status']}"] += 1
        except urllib.error.HTTPError as error:
            self.ended[f"{kind} {json.load(error)['error']['code']}"] += 1
        except OSError as error:
            self.ended[f"{kind} {type(error).__name__}"] += 1


def status(url: str) -> dict[str, Any]:
    """What the cluster says of itself."""
    return call(url, "/kunserve/status")


def call(url: str, path: str, body: bytes | None = None) -> dict[str, Any]:
    """A decoded answer; POST if there is a body. HTTP errors are raised as `OSError` as well."""
    request = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=_CALL_S) as answer:
        text = answer.read()
    decoded = json.loads(text) if text.startswith(b"{") else {}
    result: dict[str, Any] = decoded
    return result
