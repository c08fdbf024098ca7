"""The CUDA driver's virtual memory calls, on one device.

`CudaBindings` lists what we use of the package `cuda-bindings`, under its own names; `CudaDevice`
adds the constants that never vary and turns result codes into errors. The package is imported when
a device is opened: everything else works without it, and without a GPU.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol, cast

from kunserve_sglang.core.errors import ConfigurationError, DriverError

Handle = Any
"""`CUmemGenericAllocationHandle`: physical memory, mapped or not."""


class CudaBindings(Protocol):
    """What we use of the module `cuda.bindings.driver`.

    Every function returns a tuple that starts with a `CUresult`. The types are the module's own
    enumerations and structures.
    """

    CUresult: Any
    CUdevice_attribute: Any
    CUmemAccess_flags: Any
    CUmemAccessDesc: Any
    CUmemAllocationGranularity_flags: Any
    CUmemAllocationHandleType: Any
    CUmemAllocationProp: Any
    CUmemAllocationType: Any
    CUmemLocationType: Any

    def cuInit(self, flags: int, /) -> tuple[Any]: ...
    def cuDeviceGet(self, ordinal: int, /) -> tuple[Any, Any]: ...
    def cuDeviceGetAttribute(self, attribute: Any, device: Any, /) -> tuple[Any, int]: ...
    def cuDevicePrimaryCtxRetain(self, device: Any, /) -> tuple[Any, Any]: ...
    def cuDevicePrimaryCtxRelease(self, device: Any, /) -> tuple[Any]: ...
    def cuCtxSetCurrent(self, context: Any, /) -> tuple[Any]: ...
    def cuCtxSynchronize(self) -> tuple[Any]: ...
    def cuMemGetInfo(self) -> tuple[Any, int, int]: ...
    def cuMemGetAllocationGranularity(self, prop: Any, option: Any, /) -> tuple[Any, int]: ...
    def cuMemCreate(self, size: int, prop: Any, flags: int, /) -> tuple[Any, Handle]: ...
    def cuMemRelease(self, handle: Handle, /) -> tuple[Any]: ...
    def cuMemAddressReserve(
        self, size: int, alignment: int, hint: int, flags: int, /
    ) -> tuple[Any, Any]: ...
    def cuMemAddressFree(self, address: int, size: int, /) -> tuple[Any]: ...
    def cuMemMap(
        self, address: int, size: int, offset: int, handle: Handle, flags: int, /
    ) -> tuple[Any]: ...
    def cuMemUnmap(self, address: int, size: int, /) -> tuple[Any]: ...
    def cuMemSetAccess(
        self, address: int, size: int, access: list[Any], count: int, /
    ) -> tuple[Any]: ...
    def cuMemExportToShareableHandle(
        self, handle: Handle, kind: Any, flags: int, /
    ) -> tuple[Any, int]: ...
    def cuMemImportFromShareableHandle(self, fd: int, kind: Any, /) -> tuple[Any, Handle]: ...


class CudaDevice:
    """One GPU's memory. Every call raises `DriverError` with the code that the driver gave.

    Works in the device's primary context, the one that torch uses as well, and makes it current
    in the calling thread: all other calls belong to that thread.
    """

    def __init__(self, ordinal: int, bindings: CudaBindings | None = None) -> None:
        """Open device `ordinal`, counted as torch counts.

        Raises `ConfigurationError` if there is no such device, or if it cannot map memory freely.
        """
        self.ordinal = ordinal
        self._cuda = cuda = bindings or _load_bindings()
        try:
            self._call(cuda.cuInit, 0)
            self._device = self._call(cuda.cuDeviceGet, ordinal)
        except (DriverError, RuntimeError) as error:  # RuntimeError: there is no driver library
            raise ConfigurationError(f"no CUDA device {ordinal} here: {error}") from error
        self._require("CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED")
        self._require("CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED")
        context = self._call(cuda.cuDevicePrimaryCtxRetain, self._device)
        self._call(cuda.cuCtxSetCurrent, context)
        self._fd = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        self._properties = cuda.CUmemAllocationProp()
        self._properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.requestedHandleTypes = self._fd
        self._access = cuda.CUmemAccessDesc()
        self._access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        for location in (self._properties.location, self._access.location):
            location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            location.id = ordinal
        recommended = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        self.granularity = int(
            self._call(cuda.cuMemGetAllocationGranularity, self._properties, recommended)
        )
        """Sizes and addresses of physical memory are multiples of this many bytes."""

    def create(self, nbytes: int) -> Handle:
        """Physical memory that other processes may be shown."""
        return self._call(self._cuda.cuMemCreate, nbytes, self._properties, 0)

    def release(self, handle: Handle) -> None:
        """Free memory as soon as no process maps it or holds it any more."""
        self._call(self._cuda.cuMemRelease, handle)

    def reserve(self, nbytes: int) -> int:
        """The address of a new range of virtual addresses."""
        return int(self._call(self._cuda.cuMemAddressReserve, nbytes, 0, 0, 0))

    def free(self, address: int, nbytes: int) -> None:
        """Give a reserved range back, exactly as it was reserved."""
        self._call(self._cuda.cuMemAddressFree, address, nbytes)

    def map(self, address: int, nbytes: int, handle: Handle) -> None:
        """Show the whole of `handle` at `address`; nobody may touch it before `allow_access`."""
        self._call(self._cuda.cuMemMap, address, nbytes, 0, handle, 0)

    def allow_access(self, address: int, nbytes: int) -> None:
        """Let the device read and write a range in which every byte is mapped."""
        self._call(self._cuda.cuMemSetAccess, address, nbytes, [self._access], 1)

    def unmap(self, address: int, nbytes: int) -> None:
        """Undo one `map`, whole. Takes effect at once, whatever streams are doing."""
        self._call(self._cuda.cuMemUnmap, address, nbytes)

    def export(self, handle: Handle) -> int:
        """A file descriptor of this memory, for another process; the caller closes it."""
        return int(self._call(self._cuda.cuMemExportToShareableHandle, handle, self._fd, 0))

    def adopt(self, fd: int) -> Handle:
        """The memory behind another process's descriptor, which may be closed afterwards."""
        return self._call(self._cuda.cuMemImportFromShareableHandle, fd, self._fd)

    def synchronize(self) -> None:
        """Wait for all streams of this process on the device."""
        self._call(self._cuda.cuCtxSynchronize)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the device."""
        free, total = self._call(self._cuda.cuMemGetInfo)
        return int(free), int(total)

    def close(self) -> None:
        """Release the context; torch may hold it as well."""
        self._call(self._cuda.cuDevicePrimaryCtxRelease, self._device)

    def _require(self, attribute: str) -> None:
        number = getattr(self._cuda.CUdevice_attribute, attribute)
        if not self._call(self._cuda.cuDeviceGetAttribute, number, self._device):
            raise ConfigurationError(f"CUDA device {self.ordinal} lacks {attribute}")

    def _call(self, function: Any, *arguments: Any) -> Any:
        code, *values = function(*arguments)
        if code != self._cuda.CUresult.CUDA_SUCCESS:
            raise DriverError(function.__name__, self._cuda.CUresult(code).name)
        return values[0] if len(values) == 1 else values


def _load_bindings() -> CudaBindings:
    try:
        return cast(CudaBindings, importlib.import_module("cuda.bindings.driver"))
    except ImportError as error:
        raise ConfigurationError(
            f"a CUDA device needs the package cuda-bindings: pip install cuda-bindings ({error})"
        ) from error
