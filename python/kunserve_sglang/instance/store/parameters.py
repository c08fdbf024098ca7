"""Decoder parameters in droppable pages (paper section 4.1)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kunserve_sglang.core.errors import ConfigurationError, InternalError
from kunserve_sglang.memory import PhysicalPagePool, VirtualBuffer

_ALIGNMENT = 256
"""Byte alignment of each parameter; what CUDA allocators and AVX-512 kernels expect."""


_SAMPLES = 4096
"""Bytes of a parameter by which it is recognized."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where one parameter lives in its layer's buffer."""

    parameter: nn.Parameter
    view: torch.Tensor


def layer_bytes(layer: nn.Module) -> int:
    """Bytes that the parameters of one decoder layer take when laid out back to back."""
    return sum(_padded(p) for p in layer.parameters())


class ParameterStore:
    """Keeps each decoder layer's parameters in one page-aligned buffer.

    `param.data` points into the buffer. Dropping a layer returns its pages; the memory is then
    inaccessible and `param.data` empty, so that using a dropped layer fails loudly either way.
    """

    def __init__(self, pool: PhysicalPagePool, layers: Sequence[nn.Module]) -> None:
        """Move the parameters of `layers` into `pool`, one layer at a time.

        They may come from any device. Their old memory is free before the next layer takes any.

        Raises `OutOfPages` if the budget is too small, `ConfigurationError` for a parameter
        whose memory cannot be moved (overlapping strides, or shared between layers).
        """
        self._buffers: list[VirtualBuffer] = []
        self._slots: list[list[_Slot]] = []
        self._sizes: list[int] = []
        self._held: list[bool] = []
        self._prints: list[bytes] = []
        seen: set[int] = set()
        for index, layer in enumerate(layers):
            parameters = list(layer.parameters())
            if seen & {id(p) for p in parameters}:
                raise ConfigurationError(f"layer {index} shares parameters with another layer")
            seen |= {id(p) for p in parameters}
            self._adopt(pool, parameters)
            pool.driver.reclaim()

    def __len__(self) -> int:
        return len(self._buffers)

    @property
    def pages(self) -> int:
        """Pages that parameters take now."""
        return sum(b.mapped_pages for b in self._buffers)

    def layer_pages(self) -> tuple[int, ...]:
        """Pages of each layer while it is held."""
        return tuple(b.reserved_pages for b in self._buffers)

    def held(self) -> list[int]:
        return [i for i, held in enumerate(self._held) if held]

    def dropped(self) -> list[int]:
        return [i for i, held in enumerate(self._held) if not held]

    def nbytes(self, layers: Iterable[int]) -> int:
        return sum(self._sizes[i] for i in layers)

    def drop(self, layer: int) -> None:
        """Return the layer's pages to the pool. Raises `MappingRefused`; it is held still then."""
        if not self._held[layer]:
            raise InternalError(f"layer {layer} is not held and cannot be dropped")
        self._buffers[layer].unmap(0, self._buffers[layer].nbytes)
        for slot in self._slots[layer]:
            slot.parameter.data = torch.empty(0, dtype=slot.view.dtype, device=slot.view.device)
        self._held[layer] = False

    def reserve(self, layer: int) -> torch.Tensor:
        """Map pages for a dropped layer; the caller fills the bytes returned, then `attach`es.

        Raises `OutOfPages` or `MappingRefused`; it can be asked for again, or `cancel`led, then.
        """
        if self._held[layer]:
            raise InternalError(f"layer {layer} is held already")
        self._buffers[layer].map(0, self._sizes[layer])
        return self._flat(layer)

    def cancel(self, layer: int) -> None:
        """Give the pages of a layer back that was perhaps reserved; it stays dropped."""
        if self._held[layer]:
            raise InternalError(f"layer {layer} is held and was not reserved")
        self._buffers[layer].unmap(0, self._buffers[layer].nbytes)

    def attach(self, layer: int) -> None:
        """The bytes of a reserved layer are complete: point the model at them again."""
        for slot in self._slots[layer]:
            slot.parameter.data = slot.view
        self._held[layer] = True

    def check(self, layer: int) -> None:
        """Raises `InternalError` if a held layer is not what it was at the start."""
        if self._print(layer) != self._prints[layer]:
            raise InternalError(f"layer {layer} has come back with other parameters")

    def bytes_of(self, layer: int) -> torch.Tensor:
        """A held layer as flat uint8, to be sent to a peer."""
        if not self._held[layer]:
            raise InternalError(f"layer {layer} is not held and cannot be read")
        return self._flat(layer)

    def _adopt(self, pool: PhysicalPagePool, parameters: Sequence[nn.Parameter]) -> None:
        size = sum(_padded(p) for p in parameters)
        buffer = VirtualBuffer(pool, size)
        buffer.map(0, size)
        flat = buffer.tensor(torch.uint8, (size,))
        slots, offset = [], 0
        for parameter in parameters:
            view = _like(parameter.data, flat[offset : offset + _nbytes(parameter)])
            view.copy_(parameter.data, non_blocking=True)
            parameter.data = view
            slots.append(_Slot(parameter, view))
            offset += _padded(parameter)
        self._buffers.append(buffer)
        self._slots.append(slots)
        self._sizes.append(size)
        self._held.append(True)
        self._prints.append(self._print(len(self._slots) - 1))

    def _print(self, layer: int) -> bytes:
        """A digest of samples of the layer's parameters, evenly spaced."""
        digest = hashlib.blake2b(digest_size=16)
        flat = self._flat(layer)
        offset = 0
        for slot in self._slots[layer]:
            size = _nbytes(slot.view)
            samples = flat[offset : offset + size][:: max(1, size // _SAMPLES)]
            digest.update(samples.cpu().numpy().tobytes())
            offset += _padded(slot.view)
        return digest.digest()

    def _flat(self, layer: int) -> torch.Tensor:
        return self._buffers[layer].tensor(torch.uint8, (self._sizes[layer],))


def _nbytes(parameter: torch.Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def _padded(parameter: torch.Tensor) -> int:
    return -(-_nbytes(parameter) // _ALIGNMENT) * _ALIGNMENT


def _like(data: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """`memory` (flat uint8) seen with the dtype, shape and strides of `data`."""
    if (
        data.numel()
        and 1 + sum((n - 1) * s for n, s in zip(data.shape, data.stride(), strict=True))
        != data.numel()
    ):
        raise ConfigurationError("a parameter with gaps in its memory cannot be moved")
    return memory.view(data.dtype).as_strided(data.shape, data.stride())
