"""Which requests are at which instance, so that they can be taken from one that is to leave."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from kunserve_sglang.control.registry import Instance
from kunserve_sglang.router.http.client_request import ClientRequest
from kunserve_sglang.router.http.outbound import InstanceConnection
from kunserve_sglang.router.proxy.attempts import Attempts

_UnderWay = tuple[InstanceConnection, ClientRequest, Attempts]


class Moves:
    """Requests under way, by the connection to their instance."""

    def __init__(self) -> None:
        self._at: defaultdict[int, dict[int, _UnderWay]] = defaultdict(dict)

    def sent(
        self,
        instance: Instance,
        connection: InstanceConnection,
        request: ClientRequest,
        attempts: Attempts,
    ) -> None:
        self._at[instance.number][id(connection)] = connection, request, attempts

    def ended(self, instance: Instance, connection: InstanceConnection) -> None:
        del self._at[instance.number][id(connection)]

    def move(self, instance: Instance, others: Iterable[Instance]) -> None:
        """End the connections of those requests that one of the `others` can go on with."""
        others = [other for other in others if other is not instance]
        for connection, request, attempts in list(self._at[instance.number].values()):
            if attempts.may_go_on(request) and any(map(attempts.may_try, others)):
                attempts.moving = True
                connection.close()

    def keep(self, numbers: Iterable[int]) -> None:
        """All other instances are forgotten."""
        for number in self._at.keys() - set(numbers):
            if not self._at[number]:
                del self._at[number]
