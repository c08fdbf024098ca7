"""Tensors on a GPU that is not there: a CPU computes with them, and they are as strict.

A device tensor is a tensor of the host of a class of its own. Every function of torch that Python
calls passes `EmulatedDevice.run`, which refuses what CUDA refuses, notes where the program waits
for the device or copies to it, and says of the results where they are.

What kernels themselves do with memory is not seen, nor is the order of streams: everything has
happened when its call returns.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tests.support.fake_cuda import FakeCuda

DEVICE = torch.device("cuda", 0)

_OWN_CODE = ("torch.", "contextlib", "threading", "tests.support.emulated")
"""Modules that are not the place where something happens."""

_NEEDS_HOST = {"numpy", "__array__", "__dlpack__", "__dlpack_device__", "pin_memory"}
_READS = {
    *("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__"),
    *("equal", "allclose", "is_nonzero", "nonzero", "argwhere", "masked_select", "bincount"),
    *("unique", "unique_consecutive"),
}
"""What depends on the values, or has results whose shape does."""

_TAKES_NO_SCALARS = {
    *("cat", "concat", "stack", "hstack", "vstack", "index_select", "index_copy_", "index_add_"),
    *("gather", "scatter", "scatter_", "embedding", "linear", "matmul", "bmm", "mm", "equal"),
}
"""Everywhere else a tensor of the host without dimensions may stand beside device tensors."""

_FROM_VALUES = {"tensor", "as_tensor", "asarray"}


class Refused(RuntimeError):
    """What CUDA would not do either."""


class DeviceTensor(torch.Tensor):
    """In the memory of the device, as far as anybody can tell."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return EmulatedDevice.here.run(function, args, kwargs or {})

    def record_stream(self, stream: object) -> None:
        """The host's memory needs no care."""

    def __repr__(self, *, tensor_contents: object = None) -> str:
        """Without its content, which may be on pages that are not mapped."""
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"


class EmulatedDevice(TorchFunctionMode):
    """While it is entered, which is once a thread, this thread's `cuda` is the emulated device.

    `waits` and `uploads` count by place, as module and function: where the program waits for the
    device, and where it copies from pageable memory of the host without waiting. `driver` is told
    of all that the thread which made this asks of the device; others have memory of their own
    there, and may ask for something while that one takes pages away.
    """

    here: EmulatedDevice

    def __init__(self, driver: FakeCuda) -> None:
        super().__init__()
        self.driver = driver
        self._main = threading.get_ident()
        self.waits: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        EmulatedDevice.here = self

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self.run(function, args, kwargs or {})

    def wait(self) -> None:
        """The program waits for the device here."""
        self.waits[_place()] += 1

    def run(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What torch would do, if the device were there."""
        with torch._C.DisableTorchFunction():
            name = getattr(function, "__name__", "")
            if name in ("__get__", "__set__"):
                return self._attribute(function, args)
            if name in ("to", "cpu", "cuda"):
                return self._moved(function, args, kwargs)
            if name == "is_pinned":
                return getattr(args[0], "pinned", False)
            self._look(name, args, kwargs)
            there = self._results_there(name, args, kwargs)
            if kwargs.get("device") is not None:
                kwargs = {**kwargs, "device": "cpu"}
            if pinned := bool(kwargs.get("pin_memory")) or name == "pin_memory":
                kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"}
            results = args[0].clone() if name == "pin_memory" else function(*args, **kwargs)
            if there:
                if threading.get_ident() == self._main:
                    self.driver.launch()
                return _as_device(results)
            if pinned:
                results.pinned = True
            return results

    # -- where things are ------------------------------------------------------------------------

    def _attribute(self, function: Any, args: Sequence[Any]) -> Any:
        what, there = function.__self__.__name__, on_device(args[0])
        if len(args) > 1 and function.__name__ == "__set__":
            if what == "data" and on_device(args[1]) != there:
                if there:
                    raise Refused("data of the host for a device tensor")
                function(*args)
                args[0].__class__ = DeviceTensor
                args[0]._is_param = True
                return None
            return function(*args)
        if what == "device":
            return DEVICE if there else function(*args)
        if what in ("is_cuda", "is_cpu"):
            return there == (what == "is_cuda")
        value = function(*args)
        return _as_device(value) if there else value

    def _results_there(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether what this function returns is on the device."""
        if kwargs.get("device") is None:
            return name != "tensor" and any(map(on_device, _tensors(args, kwargs)))
        there = _is_device(kwargs["device"])
        if name in _FROM_VALUES and on_device(args[0]) != there:
            self.wait()
        return there

    def _moved(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """`to`, `cpu` and `cuda`."""
        tensor, *rest = args
        there = on_device(tensor)
        kwargs = {"device": "cuda", **kwargs} if function.__name__ == "cuda" else dict(kwargs)
        for place in (*rest, kwargs.get("device"), kwargs.get("other")):
            if isinstance(place, torch.Tensor):
                there = on_device(place)
            elif isinstance(place, str | torch.device):
                there = _is_device(place)
        there = there and function.__name__ != "cpu"
        rest = ["cpu" if isinstance(x, str | torch.device) else x for x in rest]
        if kwargs.get("device") is not None:
            kwargs["device"] = "cpu"
        moved = torch.Tensor.to(tensor, *rest, **kwargs) if rest or kwargs else tensor
        if there == on_device(tensor):
            return _as_device(moved) if there else moved
        self._copied(tensor, there, bool(kwargs.get("non_blocking")))
        moved = moved.as_subclass(torch.Tensor).clone()
        return _as_device(moved) if there else moved

    def _copied(self, host: torch.Tensor, upwards: bool, non_blocking: bool) -> None:
        """Between the two memories; `host` is what is involved of the host's."""
        if upwards and non_blocking:
            self.uploads[_place()] += not getattr(host, "pinned", False)
        elif not (non_blocking and getattr(host, "pinned", False)):
            self.wait()

    # -- what is not allowed, or has to wait -----------------------------------------------------

    def _look(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Raises `Refused`, or notes a wait."""
        tensors = list(_tensors(args, kwargs))
        if not any(map(on_device, tensors)):
            return
        if name in _NEEDS_HOST:
            raise Refused(f"{name} of device memory")
        by_values = name == "repeat_interleave" and "output_size" not in kwargs
        if name in _READS or by_values or (name == "where" and len(tensors) == 1):
            self.wait()
        if name in ("__getitem__", "__setitem__"):
            self._look_at_index(*args)
        elif name == "copy_":
            target, source, *flags = args
            if on_device(target) != on_device(source):
                host = source if on_device(target) else target
                non_blocking = kwargs.get("non_blocking", bool(flags and flags[0]))
                self._copied(host, on_device(target), non_blocking)
        elif name not in ("type_as", "_has_compatible_shallow_copy_type"):
            for tensor in tensors:
                if not on_device(tensor) and (tensor.dim() or name in _TAKES_NO_SCALARS):
                    raise Refused(f"{name} of device tensors and one of the host, {tensor.shape}")

    def _look_at_index(self, tensor: Any, index: Any, value: Any = None) -> None:
        there = on_device(tensor)
        several = isinstance(value, torch.Tensor) and value.numel() > 1
        found = list(_indices(index))
        for part in found:
            if part is None or (there and not on_device(part) and part.dim()):
                if there:
                    self.wait()  # it is copied to the device
            elif on_device(part) and not part.dim() and part.dtype is not torch.bool:
                self.wait()  # torch asks for its value
            elif on_device(part) and not there:
                raise Refused("an index on the device into memory of the host")
            elif on_device(part) and part.dtype is torch.bool and (value is None or several):
                self.wait()  # how many there are decides about shapes
        if isinstance(value, torch.Tensor) and on_device(value) != there:
            if value.dim() and any(part is None or part.dim() for part in found):
                raise Refused("values elsewhere than what an index is into")
            self.wait()


def on_device(value: object) -> bool:
    return isinstance(value, DeviceTensor)


def device_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, which is the device's for all who come by this view."""
    with torch._C.DisableTorchFunction():
        return _as_device(tensor)


def _as_device(value: Any) -> Any:
    """A tensor, or all in a tuple or list, as tensors on the device."""
    if isinstance(value, torch.Tensor):
        return value if on_device(value) else value.as_subclass(DeviceTensor)
    if isinstance(value, tuple | list):
        made = type(value)
        parts = [_as_device(part) for part in value]
        return made(*parts) if hasattr(made, "_fields") else made(parts)
    return value


def _tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """All among the arguments of a function."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value, {})


def _is_device(place: Any) -> bool:
    return torch.device(place).type == "cuda"


def _indices(index: Any) -> Iterator[torch.Tensor | None]:
    """The tensors of an index; None for a list, of which torch makes one on the host."""
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, torch.Tensor):
            yield part
        elif isinstance(part, list):
            yield None


def _place() -> str:
    """Module and function of whoever called torch."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(_OWN_CODE):
        frame = frame.f_back
    return f"{frame.f_globals.get('__name__', '')}.{frame.f_code.co_name}"
