"""A copy of the package for a test to change, and its kernels built in seconds: one SIMD level, not optimised."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which((sysconfig.get_config_var("CXX") or "c++").split()[0])
FLAGS = ("-O0", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi")
OTHER_LEVEL = """#include "kernels.h"
namespace fusedloss::{level} {{
Kernels table() {{ return baseline::table(); }}
}}
"""


def copy_package(folder: Path) -> Path:
    """The folder, with the package in it and csrc, but nothing that was compiled."""
    compiled = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd")
    for name in ("fusedloss", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=compiled)
    return folder


def replace_once(path: Path, text: str, other: str) -> None:
    """Puts `other` in place of `text`, which the file must hold once."""
    source = path.read_text()
    assert source.count(text) == 1, f"{path.name} holds {text!r} {source.count(text)} times"
    path.write_text(source.replace(text, other))


def build_kernels(folder: Path) -> Path:
    """Compiles the csrc of a copy into its package; the baseline's kernels answer at every level."""
    sources = folder / "build"
    shutil.copytree(folder / "csrc", sources)
    for path in sources.glob("level_*.cpp"):
        level = path.stem.removeprefix("level_")
        if level != "baseline":
            path.write_text(OTHER_LEVEL.format(level=level))
    # One translation unit: pybind11's headers take longer than the kernels.
    unit = sources / "all.cc"
    unit.write_text("".join(f'#include "{path.name}"\n' for path in sorted(sources.glob("*.cpp"))))
    extension = folder / "fusedloss" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    headers = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}")
    command = [COMPILER, *FLAGS, *headers, str(unit), "-o", str(extension)]
    if sys.platform == "darwin":
        command += ["-undefined", "dynamic_lookup"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return extension
