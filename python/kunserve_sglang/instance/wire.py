"""Headers of the packets that members of a group send one another."""

from __future__ import annotations

import msgspec
import torch

from kunserve_sglang.instance.engine import Hidden, StageBatch
from kunserve_sglang.instance.request_table import TableDelta
from kunserve_sglang.layout import LayerRange


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """Common part: a packet of another epoch is dropped and counted."""

    sender: int
    epoch: int


class MicroBatch(Envelope, frozen=True, kw_only=True, tag="micro_batch"):
    """A micro-batch of `owner` on its way to stage `position`; back at its owner after the last.

    `launched` is when it left its owner, in monotonic seconds of that host;
    `cost_ms` its predicted time through all stages, `round_ms` that of all its owner's work.

    Tensors: seq_lens, positions, out_slots, rows, table starts, table lengths, table slots,
    [prefix_lens, extend_lens unless decode], hidden, [residual if has_residual].
    """

    owner: int
    sequence: int
    position: int
    decode: bool
    has_residual: bool
    launched: float
    cost_ms: float
    round_ms: float


class TakenSlots(Envelope, frozen=True, kw_only=True, tag="taken_slots"):
    """First packet of a transition: the sender's slots before and after. Tensors: both, int64."""


class KvRows(Envelope, frozen=True, kw_only=True, tag="kv_rows"):
    """KV of some slots of `owner` in `layers`; `last` if nothing of it is left to send.

    Tensors: slots, int64; K and V rows, each `(len(layers), len(slots), heads, dim)`.
    """

    owner: int
    layers: LayerRange
    last: bool = False


class LayerParameters(Envelope, frozen=True, kw_only=True, tag="layer_parameters"):
    """Bytes of the parameters of `layer`, from `offset` on. Tensors: flat uint8."""

    layer: int
    offset: int


Header = MicroBatch | TakenSlots | KvRows | LayerParameters

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Header] = msgspec.msgpack.Decoder(Header)
_envelopes = msgspec.msgpack.Decoder(Envelope)


def encode(header: Header) -> bytes:
    return _encoder.encode(header)


def decode(data: bytes) -> Header:
    """Raises `msgspec.DecodeError`."""
    return _decoder.decode(data)


def envelope(data: bytes) -> Envelope:
    """The common part alone. Raises `msgspec.DecodeError`."""
    return _envelopes.decode(data)


def pack_batch(batch: StageBatch, delta: TableDelta, hidden: Hidden) -> list[torch.Tensor]:
    """The tensors of a `MicroBatch`."""
    tensors = [batch.seq_lens, batch.positions, batch.out_slots]
    tensors += [delta.rows, delta.starts, delta.lengths, delta.slots]
    if batch.prefix_lens is not None and batch.extend_lens is not None:
        tensors += [batch.prefix_lens, batch.extend_lens]
    tensors += [t for t in hidden if t is not None]
    return tensors


def unpack_batch(
    header: MicroBatch, tensors: list[torch.Tensor]
) -> tuple[StageBatch, TableDelta, Hidden]:
    """The inverse of `pack_batch`."""
    queue = iter(tensors)

    def on_host() -> torch.Tensor:
        """What is counted with; only hidden states are computed with where they have arrived."""
        return next(queue).cpu()

    seq_lens, positions, out_slots = on_host(), on_host(), on_host()
    delta = TableDelta(on_host(), on_host(), on_host(), on_host())
    batch = StageBatch(
        owner=header.owner,
        rows=delta.rows,
        seq_lens=seq_lens,
        positions=positions,
        out_slots=out_slots,
        prefix_lens=None if header.decode else on_host(),
        extend_lens=None if header.decode else on_host(),
    )
    hidden = next(queue), next(queue) if header.has_residual else None
    return batch, delta, hidden
