"""One request to one instance, and its answer back: on a kept connection, or a new one."""

from __future__ import annotations

import asyncio
import logging

from kunserve_sglang.control.registry import Instance
from kunserve_sglang.control.upstream import is_refusal
from kunserve_sglang.router.http.client_request import ClientRequest
from kunserve_sglang.router.http.heads import Headers, request_head
from kunserve_sglang.router.http.outbound import (
    BrokenOff,
    InstanceConnection,
    InstanceConnections,
)
from kunserve_sglang.router.proxy.attempts import Attempts
from kunserve_sglang.router.proxy.faulty import with_faults
from kunserve_sglang.router.proxy.idempotency import IdempotencyKeys
from kunserve_sglang.router.proxy.journal import Journal, Journals
from kunserve_sglang.router.proxy.latency import Latency
from kunserve_sglang.router.proxy.moves import Moves
from kunserve_sglang.router.proxy.relay import Relay

logger = logging.getLogger(__name__)


class Exchanges:
    """All requests that are at instances now."""

    def __init__(
        self,
        connections: InstanceConnections,
        latency: Latency,
        journals: Journals,
        moves: Moves,
        keys: IdempotencyKeys,
    ) -> None:
        self._connections = connections
        self._latency = latency
        self._journals = journals
        self._moves = moves
        self._keys = keys

    async def ask(
        self, instance: Instance, request: ClientRequest, attempts: Attempts
    ) -> Relay | None:
        """What has become of the answer; None if the instance cannot have run the request.

        Raises `BrokenOff`.
        """
        try:
            return await self._ask(instance, request, attempts)
        except BrokenOff:
            self._keys.nobody_waits(attempts.keyed)
            raise
        except asyncio.CancelledError:
            if request.gone:  # and not because this router ends: then another will ask for it
                self._keys.nobody_waits(attempts.keyed)
            raise

    async def _ask(
        self, instance: Instance, request: ClientRequest, attempts: Attempts
    ) -> Relay | None:
        connection = self._connections.kept(instance.url) or await self._connect(instance)
        if connection is None:
            return None
        try:
            return await self._exchange(instance, connection, request, attempts)
        except BrokenOff as error:
            if not error.unread or attempts.moving:
                raise
            # Most likely it never saw the request, and this counts for no loss if it is there.
            connection = await self._connect(instance)
            if connection is None:
                raise
            return await self._exchange(instance, connection, request, attempts)

    async def _connect(self, instance: Instance) -> InstanceConnection | None:
        try:
            return await self._connections.make(instance.url)
        except OSError as error:
            if is_refusal(error):
                instance.liveness.refuses()
            logger.warning("instance %d: %s", instance.number, error)
            return None

    async def _exchange(
        self,
        instance: Instance,
        connection: InstanceConnection,
        request: ClientRequest,
        attempts: Attempts,
    ) -> Relay:
        journal = None if instance.plain else attempts.journal
        relay = Relay(request, self._latency, attempts.promise, journal)
        request.comes_from(connection)
        self._moves.sent(instance, connection, request, attempts)
        try:
            body, further = self._question(instance, request, attempts, journal)
            head = request_head(request.scope, body, instance, further)
            bodiless = request.scope["method"] == "HEAD"
            await connection.ask(head, body, with_faults(connection, relay), bodiless=bodiless)
            return relay
        finally:
            self._moves.ended(instance, connection)
            # Unless it has all of the answer, this closes it: how an instance learns that nobody
            # waits any more.
            self._connections.put(connection)

    def _question(
        self,
        instance: Instance,
        request: ClientRequest,
        attempts: Attempts,
        journal: Journal | None,
    ) -> tuple[bytes, Headers]:
        """Body and further headers as they go to this instance now."""
        body, headers = self._journals.question(request, journal)
        if (keyed := attempts.keyed) is None:
            return body, headers
        # The rest of a stream is no answer for who asks for all of it, and plain servers keep none.
        resumes = journal is not None and journal.events > 0
        keyed.at = None if instance.plain or resumes else instance
        return body, headers if keyed.at is None else [*headers, keyed.header]
