"""Tensors over memory that torch did not allocate.

DLPack is the one way that asks nothing of the memory: torch looks a CUDA address up in the driver
when it comes through `__cuda_array_interface__`, and refuses one where nothing is mapped yet.
"""

from __future__ import annotations

import ctypes

import torch
from torch.utils.dlpack import from_dlpack

_DEVICES = {"cpu": 1, "cuda": 2}
_UNSIGNED = 1


class _Device(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensor(ctypes.Structure):
    _fields_ = (
        ("dl_tensor", _Tensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_CAPSULE_NAME = b"dltensor"  # a capsule keeps only the pointer to its name


def tensor_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """`nbytes` from `address` on as flat uint8 that does not own its memory.

    Nothing there is touched, nor need be mapped. Leaves a hundred bytes behind for good: torch
    reads the descriptor when the last view goes, which may be after Python has ended.
    """
    size, stride = ctypes.c_int64(nbytes), ctypes.c_int64(1)
    managed = _ManagedTensor(
        _Tensor(
            data=address,
            device=_Device(_DEVICES[device.type], device.index or 0),
            ndim=1,
            dtype=_DataType(_UNSIGNED, 8, 1),
            shape=ctypes.pointer(size),
            strides=ctypes.pointer(stride),
        )
    )
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(managed))
    capsule = _new_capsule(ctypes.addressof(managed), _CAPSULE_NAME, None)
    tensor: torch.Tensor = from_dlpack(capsule)
    return tensor
