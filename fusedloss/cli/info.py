"""What answers on this machine: backends by operation and device, the SIMD level, versions, and why one is absent."""

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
    return "\n".join([*_versions(), "", *_compiled_module(), "", *_answers(), "", *_settings()])


def _versions() -> list[str]:
    try:
        import triton

        found = triton.__version__
    except ImportError:
        found = "absent"
    return [
        f"fusedloss {fusedloss.__version__}, torch {torch.__version__}, triton {found}, "
        f"Python {platform.python_version()} on {platform.machine()}"
    ]


def _compiled_module() -> list[str]:
    if cpp.extension is None:
        return [f"compiled module: absent ({cpp.load_error})"]
    try:
        level = cpp.extension.level()
    except RuntimeError as error:
        return [f"compiled module: {error}"]
    threads = f"OpenMP, {torch.get_num_threads()} threads" if cpp.extension.has_openmp() else "one thread (no OpenMP)"
    slower = {
        "baseline": " - this processor has no AVX2, or FUSEDLOSS_SIMD asks for it",
    }
    return [f"compiled module: SIMD level {level}{slower.get(level, '')}; {threads}"]


def _answers() -> list[str]:
    lines = [f"{'operation':<12} {'device':<6} answers", f"{'-' * 12} {'-' * 6} {'-' * 9}"]
    absences: dict[str, None] = {}
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
                    absences[f"not on {device}: {name} - {reason}"] = None
    return [*lines, *absences]


def _settings() -> list[str]:
    names = ("FUSEDLOSS_BACKEND", "FUSEDLOSS_SIMD", "FUSEDLOSS_CHECK", "TRITON_INTERPRET")
    return [f"{name}={os.environ.get(name, '(not set)')}" for name in names]
