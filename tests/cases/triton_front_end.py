"""Takes every launch of the cases named, or of all, through Triton's front end and prints how many there were.

The front end is where a kernel is refused that the interpreter accepts. Nothing runs here: the functions
answer with uninitialised tensors, so what the cases find wrong in them doesn't count.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

import torch
import triton.compiler
import triton_cases
import triton_main
from triton._C.libtriton import ir

from bench.resources import compiling

done: list[str] = []
refused: list[str] = []


def front_end(source: Any, target: Any, options: Any, **_: Any) -> object:
    """In place of triton.compile: the first representation alone, which takes a tenth of the time."""
    backend = triton.compiler.make_backend(target)
    parsed = backend.parse_options(dict(options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    # Versions differ in the smallest product that they take: this is legal for all.
    generated = backend.get_codegen_implementation(parsed) | {"min_dot_size": lambda left, right: (16, 16, 16)}
    try:
        source.make_ir(target, parsed, generated, backend.get_module_map(), context)
    except Exception:
        refused.append(f"{source.name}: {traceback.format_exc()}")
    done.append(source.name)
    return object()


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # the same filling everywhere: two answers are alike
    triton.compiler.compile = front_end
    with compiling(90):
        for name in sys.argv[1:] or triton_cases.CASES:
            triton_main.outcome(triton_cases.CASES[name], "cpu")
    sys.stderr.write("\n".join(refused))
    print(len(done))
    sys.exit(1 if refused else 0)
