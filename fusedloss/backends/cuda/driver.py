"""Compiles CUDA C++ with NVRTC and launches it through the driver, without torch's headers or a compiler.

NVRTC comes with PyTorch's CUDA builds. Kernels are compiled at their first call for the device at hand, and kept.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import sys
from pathlib import Path
from typing import Any

import torch

_MAX_DYNAMIC_SHARED_SIZE = 8  # CUfunction_attribute
_CLUSTER_DIMENSION = 4  # CUlaunchAttributeID


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute with a cluster's size."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@functools.cache
def unavailable_reason() -> str | None:
    """Why kernels can't be compiled and launched here, or None when they can."""
    for load in (_driver, _compiler):
        try:
            load()
        except OSError as error:
            return str(error)
    return None


@functools.cache
def kernel(source: Path, name: str, macros: tuple[str, ...], shared_bytes: int, device: int | None) -> ctypes.c_void_p:
    """A kernel of the source for the current device, which may use so many bytes of dynamic shared memory."""
    major, minor = torch.cuda.get_device_capability(device)
    code = compiled(source.read_text(), macros, f"sm_{major}{minor}")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), "cuModuleGetFunction")
    result = _driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_SIZE, shared_bytes)
    _check(result, "cuFuncSetAttribute")
    return function


def launch(
    function: ctypes.c_void_p, blocks: int, threads: int, shared_bytes: int, cluster: int, arguments: Any, stream: int
) -> None:
    """Starts a kernel with one argument, a structure, in clusters of so many blocks."""
    attribute = _Attribute(_CLUSTER_DIMENSION, b"", (cluster, 1, 1))
    config = _Config((blocks, 1, 1), (threads, 1, 1), shared_bytes, stream, ctypes.pointer(attribute), 1)
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    _check(_driver().cuLaunchKernelEx(ctypes.byref(config), function, parameters, None), "cuLaunchKernelEx")


def compiled(source: str, macros: tuple[str, ...], architecture: str) -> bytes:
    """Machine code by NVRTC.

    Raises:
        RuntimeError: the source does not compile; with the compiler's messages.
    """
    nvrtc, program = _compiler(), ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None), "nvrtc")
    try:
        options = (f"--gpu-architecture={architecture}", "--std=c++17", *macros)
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), encoded):
            raise RuntimeError(f"NVRTC: {_result(nvrtc, program, 'ProgramLog').decode()}")
        return _result(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _result(nvrtc: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), what)
    text = ctypes.create_string_buffer(size.value)
    _check(getattr(nvrtc, f"nvrtcGet{what}")(program, text), what)
    return text.raw


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _compiler() -> Any:
    """The NVRTC of this torch: found by the loader, or among the packages that came with it."""
    name = f"libnvrtc.so.{(torch.version.cuda or '').split('.')[0]}"
    try:
        return ctypes.CDLL(name)
    except OSError:
        for folder in sys.path:
            for path in glob.glob(f"{folder}/nvidia/*/lib/{name}"):
                return ctypes.CDLL(path)
        raise


def _check(result: int, call: str) -> None:
    if result:
        raise RuntimeError(f"{call} failed with error {result}")
