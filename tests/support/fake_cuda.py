"""The CUDA driver's memory calls on host memory, for machines without a GPU.

Stands in for the module `cuda.bindings.driver`, whose types and result codes it uses. Physical
memory is memory files, virtual ranges are reserved address space, and granting access is
`mprotect`: what is written through an address is there, and what may not be touched faults. It
refuses what the driver's documentation forbids, with the driver's codes, and keeps account.
"""

from __future__ import annotations

import bisect
import mmap
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from cuda.bindings import driver

from tests.support.libc_memory import FIXED, PROT_NONE, RESERVED, libc, map_memory

Result = driver.CUresult


@dataclass
class Allocation:
    """Physical memory: freed when neither its handle nor a mapping is left."""

    fd: int
    nbytes: int
    shareable: bool = True
    imported: bool = False
    held: bool = True
    mappings: int = 0


@dataclass
class FakeCuda:
    """`CudaBindings` for `devices` GPUs of `memory` bytes, all in one address space.

    `unmapped_while_busy` counts mappings taken away while work was in flight, which a GPU would
    not survive; `launch` says that there is some.
    """

    granularity: int = 2 << 20
    memory: int = 1 << 40
    devices: int = 1
    vmm: bool = True
    calls: Counter[str] = field(default_factory=Counter)
    unmapped_while_busy: int = 0

    CUresult = driver.CUresult
    CUdevice_attribute = driver.CUdevice_attribute
    CUmemAccess_flags = driver.CUmemAccess_flags
    CUmemAccessDesc = driver.CUmemAccessDesc
    CUmemAllocationGranularity_flags = driver.CUmemAllocationGranularity_flags
    CUmemAllocationHandleType = driver.CUmemAllocationHandleType
    CUmemAllocationProp = driver.CUmemAllocationProp
    CUmemAllocationType = driver.CUmemAllocationType
    CUmemLocationType = driver.CUmemLocationType

    def __post_init__(self) -> None:
        self._initialised = False
        self._retained = 0
        self._current = False
        self._busy = False
        self._next_handle = 1000
        self._used = 0
        self._places: list[int] = []  # of mappings, in order
        self.handles: dict[int, Allocation] = {}
        self.ranges: dict[int, int] = {}
        self.mappings: dict[int, Allocation] = {}
        self.accessible: set[int] = set()

    # -- for tests -------------------------------------------------------------------------------

    def launch(self) -> None:
        """Work in flight, until somebody synchronises."""
        self._busy = True

    @property
    def clean(self) -> bool:
        """Whether everything that was taken has been given back."""
        return not (self.handles or self.ranges or self.mappings or self._retained)

    @property
    def used(self) -> int:
        """Bytes of physical memory that are not free."""
        return self._used

    # -- the driver's calls ----------------------------------------------------------------------

    def cuInit(self, flags: int) -> tuple[Any]:
        self.calls["cuInit"] += 1
        self._initialised = True
        return (Result.CUDA_SUCCESS if flags == 0 else Result.CUDA_ERROR_INVALID_VALUE,)

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, Any]:
        if not self._initialised:
            return Result.CUDA_ERROR_NOT_INITIALIZED, None
        if not 0 <= ordinal < self.devices:
            return Result.CUDA_ERROR_INVALID_DEVICE, None
        return Result.CUDA_SUCCESS, driver.CUdevice(ordinal)

    def cuDeviceGetAttribute(self, attribute: Any, device: Any) -> tuple[Any, int]:
        assert isinstance(attribute, driver.CUdevice_attribute)
        assert isinstance(device, driver.CUdevice)
        return Result.CUDA_SUCCESS, int(self.vmm)

    def cuDevicePrimaryCtxRetain(self, device: Any) -> tuple[Any, Any]:
        assert isinstance(device, driver.CUdevice)
        self._retained += 1
        return Result.CUDA_SUCCESS, driver.CUcontext(1)

    def cuDevicePrimaryCtxRelease(self, device: Any) -> tuple[Any]:
        assert isinstance(device, driver.CUdevice)
        if not self._retained:
            return (Result.CUDA_ERROR_INVALID_CONTEXT,)
        self._retained -= 1
        self._current = self._current and self._retained > 0
        return (Result.CUDA_SUCCESS,)

    def cuCtxSetCurrent(self, context: Any) -> tuple[Any]:
        assert isinstance(context, driver.CUcontext)
        self._current = True
        return (Result.CUDA_SUCCESS,)

    def cuCtxSynchronize(self) -> tuple[Any]:
        self.calls["cuCtxSynchronize"] += 1
        if not self._current:
            return (Result.CUDA_ERROR_INVALID_CONTEXT,)
        self._busy = False
        return (Result.CUDA_SUCCESS,)

    def cuMemGetInfo(self) -> tuple[Any, int, int]:
        if not self._current:
            return Result.CUDA_ERROR_INVALID_CONTEXT, 0, 0
        return Result.CUDA_SUCCESS, self.memory - self.used, self.memory

    def cuMemGetAllocationGranularity(self, prop: Any, option: Any) -> tuple[Any, int]:
        assert isinstance(option, driver.CUmemAllocationGranularity_flags)
        _check_properties(prop)
        return Result.CUDA_SUCCESS, self.granularity

    def cuMemCreate(self, size: int, prop: Any, flags: int) -> tuple[Any, Any]:
        self.calls["cuMemCreate"] += 1
        _check_properties(prop)
        if flags or size <= 0 or size % self.granularity:
            return Result.CUDA_ERROR_INVALID_VALUE, None
        if self.used + size > self.memory:
            return Result.CUDA_ERROR_OUT_OF_MEMORY, None
        self._used += size
        file = os.memfd_create("fake-cuda", os.MFD_CLOEXEC)
        os.ftruncate(file, size)
        shareable = prop.requestedHandleTypes == _FD
        return Result.CUDA_SUCCESS, self._handle(Allocation(file, size, shareable))

    def cuMemRelease(self, handle: Any) -> tuple[Any]:
        self.calls["cuMemRelease"] += 1
        allocation = self.handles.pop(int(handle), None)
        if allocation is None:
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        allocation.held = False
        self._free_if_unused(allocation)
        return (Result.CUDA_SUCCESS,)

    def cuMemAddressReserve(
        self, size: int, alignment: int, hint: int, flags: int
    ) -> tuple[Any, Any]:
        self.calls["cuMemAddressReserve"] += 1
        if flags or hint or size <= 0 or size % mmap.PAGESIZE or alignment & (alignment - 1):
            return Result.CUDA_ERROR_INVALID_VALUE, None
        # The driver aligns to its granularity by itself; the kernel does not.
        unit = max(alignment, self.granularity)
        start = map_memory(None, size + unit, PROT_NONE, RESERVED, -1)
        address = -(-start // unit) * unit
        for begin, end in ((start, address), (address + size, start + size + unit)):
            if end > begin:
                libc.munmap(begin, end - begin)
        self.ranges[address] = size
        return Result.CUDA_SUCCESS, driver.CUdeviceptr(address)

    def cuMemAddressFree(self, address: int, size: int) -> tuple[Any]:
        self.calls["cuMemAddressFree"] += 1
        if self.ranges.get(address) != size or self._within(address, size):
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        del self.ranges[address]
        libc.munmap(address, size)
        return (Result.CUDA_SUCCESS,)

    def cuMemMap(self, address: int, size: int, offset: int, handle: Any, flags: int) -> tuple[Any]:
        self.calls["cuMemMap"] += 1
        allocation = self.handles.get(int(handle))
        if (
            flags
            or allocation is None
            or (offset, size) != (0, allocation.nbytes)  # all drivers take whole handles
            or address % self.granularity
            or not any(a <= address and address + size <= a + n for a, n in self.ranges.items())
            or self._within(address, size)
        ):
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        map_memory(address, size, PROT_NONE, mmap.MAP_SHARED | FIXED, allocation.fd)
        allocation.mappings += 1
        self.mappings[address] = allocation
        bisect.insort(self._places, address)
        return (Result.CUDA_SUCCESS,)

    def cuMemUnmap(self, address: int, size: int) -> tuple[Any]:
        self.calls["cuMemUnmap"] += 1
        if not self._is_whole_mappings(address, size):
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        for place in self._within(address, size):
            self.unmapped_while_busy += self._busy
            allocation = self.mappings.pop(place)
            self._places.remove(place)
            self.accessible.discard(place)
            map_memory(place, allocation.nbytes, PROT_NONE, RESERVED | FIXED, -1)
            allocation.mappings -= 1
            self._free_if_unused(allocation)
        return (Result.CUDA_SUCCESS,)

    def cuMemSetAccess(self, address: int, size: int, access: Any, count: int) -> tuple[Any]:
        self.calls["cuMemSetAccess"] += 1
        assert [type(a) for a in access] == [driver.CUmemAccessDesc] * count
        if not self._is_whole_mappings(address, size):
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        if not 0 <= access[0].location.id < self.devices:
            return (Result.CUDA_ERROR_INVALID_DEVICE,)
        writable = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        assert access[0].flags == writable
        libc.mprotect(address, size, mmap.PROT_READ | mmap.PROT_WRITE)
        self.accessible.update(self._within(address, size))
        return (Result.CUDA_SUCCESS,)

    def cuMemExportToShareableHandle(self, handle: Any, kind: Any, flags: int) -> tuple[Any, int]:
        allocation = self.handles.get(int(handle))
        if flags or kind != _FD or allocation is None or not allocation.shareable:
            return Result.CUDA_ERROR_INVALID_VALUE, -1
        return Result.CUDA_SUCCESS, os.dup(allocation.fd)

    def cuMemImportFromShareableHandle(self, fd: int, kind: Any) -> tuple[Any, Any]:
        if kind != _FD:
            return Result.CUDA_ERROR_NOT_SUPPORTED, None
        try:
            own = os.dup(fd)
        except OSError:
            return Result.CUDA_ERROR_INVALID_VALUE, None
        return Result.CUDA_SUCCESS, self._handle(
            Allocation(own, os.fstat(own).st_size, imported=True)
        )

    # -- books -----------------------------------------------------------------------------------

    def _handle(self, allocation: Allocation) -> Any:
        self._next_handle += 1
        self.handles[self._next_handle] = allocation
        return driver.CUmemGenericAllocationHandle(self._next_handle)

    def _within(self, address: int, size: int) -> list[int]:
        """Mappings that a range touches, lowest first."""
        first = bisect.bisect_right(self._places, address)
        if first and address < self._places[first - 1] + self._nbytes_at(first - 1):
            first -= 1
        return self._places[first : bisect.bisect_left(self._places, address + size)]

    def _nbytes_at(self, index: int) -> int:
        return self.mappings[self._places[index]].nbytes

    def _free_if_unused(self, allocation: Allocation) -> None:
        if not allocation.held and not allocation.mappings:
            os.close(allocation.fd)
            self._used -= 0 if allocation.imported else allocation.nbytes

    def _is_whole_mappings(self, address: int, size: int) -> bool:
        """Whether a range is mapped in full and cuts no mapping."""
        places = self._within(address, size)
        if not places or places[0] != address:
            return False
        ends = [place + self.mappings[place].nbytes for place in places]
        return places[1:] == ends[:-1] and ends[-1] == address + size


_FD = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def _check_properties(prop: Any) -> None:
    assert isinstance(prop, driver.CUmemAllocationProp)
    assert prop.type == driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    assert prop.location.type == driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
