"""Keys made at the start of a cluster: for sockets that other hosts can reach, and for instances.

The sockets are ZMQ's, with CURVE. Every member of a cluster shows the same key pair. The router has
one of its own, so that nobody but it can be taken for it. Whoever shows another key, or none, is
turned away. So are calls that act on an instance, unless they come with the key that the router and
the instances have from the launcher.
"""

from __future__ import annotations

import secrets

import msgspec

from kunserve_sglang.core.sockets import AnySocket


class MemberKeys(msgspec.Struct, frozen=True, kw_only=True):
    """What a member needs: the router's public key, and the pair that all members share. Z85."""

    router: str
    public: str
    secret: str

    def secure_link(self, socket: AnySocket) -> None:
        """Before `connect`: encrypt a socket towards the router."""
        self._identify(socket, self.router)

    def secure_outbox(self, socket: AnySocket) -> None:
        """Before `connect`: encrypt a socket towards another member."""
        self._identify(socket, self.public)

    def secure_inbox(self, socket: AnySocket) -> None:
        """Before `bind`: take packets of members only."""
        _serve(socket, self.secret)

    def known(self, key: bytes) -> bool:
        """Whether it is the members' public key."""
        return key == self.public.encode()

    def _identify(self, socket: AnySocket, server: str) -> None:
        socket.curve_serverkey = server.encode()
        socket.curve_publickey = self.public.encode()
        socket.curve_secretkey = self.secret.encode()


class ClusterKeys(msgspec.Struct, frozen=True, kw_only=True):
    """What the router needs besides: its own secret key."""

    secret: str
    members: MemberKeys

    def secure(self, socket: AnySocket) -> None:
        """Before `bind`: take messages of members only."""
        _serve(socket, self.secret)


class Admission:
    """What ZMQ's authenticators ask: is this the key of a member?"""

    def __init__(self, keys: MemberKeys) -> None:
        self._keys = keys

    def callback(self, _domain: str, key: bytes) -> bool:
        return self._keys.known(key)


def new_admin_key() -> str:
    """What the router shows instances in place of SGLang's `--admin-api-key`."""
    return secrets.token_urlsafe(32)


def new_keys() -> ClusterKeys:
    """Keys that nobody has seen."""
    import zmq  # not above: the command line knows these types, and starts without it

    router, router_secret = zmq.curve_keypair()
    public, secret = zmq.curve_keypair()
    members = MemberKeys(router=router.decode(), public=public.decode(), secret=secret.decode())
    return ClusterKeys(secret=router_secret.decode(), members=members)


def _serve(socket: AnySocket, secret: str) -> None:
    socket.curve_server = True
    socket.curve_secretkey = secret.encode()
