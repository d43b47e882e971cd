"""The backends of this machine by operation and device, the SIMD level, versions, and why a backend is unavailable."""

from __future__ import annotations

import os
import platform

import torch

import fusedloss
from fusedloss import backends
from fusedloss.backends import cpp


def report() -> str:
    """The report as text.

    Example:
        >>> from fusedloss.cli import info
        >>> "softmax_ce" in info.report()
        True
    """
    return "\n".join([*_versions(), "", *_compiled_module(), "", *_operations(), "", *_settings()])


def _versions() -> list[str]:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    return [
        f"fusedloss {fusedloss.__version__}, torch {torch.__version__}, triton {triton_version}, "
        f"Python {platform.python_version()} on {platform.machine()}"
    ]


def _compiled_module() -> list[str]:
    if cpp.extension is None:
        return [f"compiled module: unavailable ({cpp.load_error})"]
    try:
        level = cpp.extension.level()
    except RuntimeError as error:
        return [f"compiled module: {error}"]
    threads = f"OpenMP, {torch.get_num_threads()} threads" if cpp.extension.has_openmp() else "one thread (no OpenMP)"
    note = " - this processor has no AVX2, or FUSEDLOSS_SIMD asks for it" if level == "baseline" else ""
    return [f"compiled module: SIMD level {level}{note}; {threads}"]


def _operations() -> list[str]:
    lines = [f"{'operation':<12} {'device':<6} backend", f"{'-' * 12} {'-' * 6} {'-' * 9}"]
    unavailable: dict[str, None] = {}
    for operation in backends.OPERATIONS:
        for device in ("cpu", "cuda"):
            if device == "cuda" and not torch.cuda.is_available():
                lines.append(f"{operation:<12} {device:<6} nothing (no GPU is visible to torch)")
                continue
            try:
                lines.append(f"{operation:<12} {device:<6} {backends.resolve_backend(device)}")
            except RuntimeError as error:
                lines.append(f"{operation:<12} {device:<6} error: {error}")
            for name in backends.NAMES:
                reason = backends.unavailable_reason(name, device)
                if reason:
                    unavailable[f"not on {device}: {name} - {reason}"] = None
    return [*lines, *unavailable]


def _settings() -> list[str]:
    names = ("FUSEDLOSS_BACKEND", "FUSEDLOSS_SIMD", "FUSEDLOSS_CHECK", "TRITON_INTERPRET")
    return [f"{name}={os.environ.get(name, '(not set)')}" for name in names]
