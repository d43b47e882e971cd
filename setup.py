"""Builds the one compiled module, fusedloss._C, from csrc/. It needs pybind11 and a C++17 compiler, never torch."""

import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(path) for pattern in ("*.h", "*.inl") for path in Path("csrc").glob(pattern))
# Without -fno-trapping-math gcc vectorises no comparison; -ffast-math would break masks, which are -inf.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]

ParallelCompile("FUSEDLOSS_BUILD_JOBS", default=min(4, os.cpu_count() or 1)).install()


class BuildKernels(build_ext):
    """Skips the module, saying so, where there is no compiler; a compiler that fails is an error."""

    def run(self):
        compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
        if shutil.which(compiler) is None:
            message = (
                f"fusedloss: no C++ compiler ('{compiler}' is not on PATH), so no CPU kernels are built and slower "
                "PyTorch formulas are used on the CPU. Install one (Debian: apt install g++) and reinstall; "
                "`python -m fusedloss info` says what is in use."
            )
            print(message, file=sys.stderr)
            return
        super().run()

    def build_extensions(self):
        if self._compiles("-fopenmp"):
            for extension in self.extensions:
                extension.extra_compile_args.append("-fopenmp")
                extension.extra_link_args.append("-fopenmp")
        else:
            print("fusedloss: this compiler has no OpenMP, so the CPU kernels run on one thread.", file=sys.stderr)
        super().build_extensions()

    def copy_extensions_to_source(self):
        # A new file: writing over the old one would crash whoever has it loaded.
        for extension in self.extensions:
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def _compiles(self, flag):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=[flag])
                self.compiler.link_executable(objects, "probe", output_dir=folder, extra_postargs=[flag])
            except Exception:
                return False
            return True


setup(
    ext_modules=[Pybind11Extension("fusedloss._C", SOURCES, depends=HEADERS, cxx_std=17, extra_compile_args=FLAGS)],
    cmdclass={"build_ext": BuildKernels},
)
