"""Builds the optional extension dydilit_C: `python setup.py build_ext --inplace`, or
`pip install --no-build-isolation .`

It always has the CPU kernels, and the CUDA kernels where torch has CUDA and a toolkit is found.
DYDILIT_CUDA=0 leaves CUDA out, DYDILIT_CUDA=1 insists on it.
"""

import os
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
os.chdir(HERE)  # sources must be given relative to setup.py
sources = [
    "csrc/ops.cpp",
    "csrc/cpu_ops.cpp",
    "csrc/cpu_kernels.cpp",
    "csrc/gemm/cpu_gemm.cpp",
]
cuda_sources = ["csrc/cuda_ops.cpp", "csrc/cuda_kernels.cu"]

# torch takes the folder above nvcc's, which has no headers where nvcc is a script that calls
# another nvcc
if cpp_extension.CUDA_HOME and "CUDA_HOME" not in os.environ:
    homes = [cpp_extension.CUDA_HOME, "/usr/local/cuda"]
    complete = [home for home in homes if Path(home, "include/cuda_runtime.h").exists()]
    cpp_extension.CUDA_HOME = complete[0] if complete else homes[0]

wanted = os.environ.get("DYDILIT_CUDA", "")
if wanted not in ("", "0", "1"):
    raise SystemExit(f"DYDILIT_CUDA must be 0, 1 or unset, got {wanted!r}")
needed = {
    "CUDA sources": all(Path(path).exists() for path in cuda_sources),
    "a torch with CUDA": torch.version.cuda,
    "a CUDA toolkit": cpp_extension.CUDA_HOME,
}
lacking = ", ".join(what for what, there in needed.items() if not there)
if wanted == "1" and lacking:
    raise SystemExit(f"DYDILIT_CUDA=1, but this machine lacks {lacking}")
cuda = wanted != "0" and not lacking

# Without -fno-math-errno and -fno-trapping-math gcc leaves the loops of cpu_kernels.cpp scalar; no
# result changes. Without -fopenmp at::parallel_for is a plain loop.
openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
compile_args = {"cxx": ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wall", *openmp]}
# torch's own TORCH_VERSION does not tell a nightly or a vendor's build apart
macros = [("DYDILIT_TORCH", f'"{torch.__version__.split("+")[0]}"')]
extension_class = cpp_extension.CppExtension
if cuda:
    archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    macros.append(("DYDILIT_CUDA_ARCHS", f'"{archs}"'))
    extension_class = cpp_extension.CUDAExtension
    compile_args["nvcc"] = ["-O3", "-lineinfo", "--threads=2"]
    sources += cuda_sources

# All C++ and CUDA of csrc, even in a build without CUDA: a source distribution takes it from here
suffixes = (".h", ".cuh", ".cpp", ".cu")
depends = [path.as_posix() for path in Path("csrc").rglob("*") if path.suffix in suffixes]

extension = extension_class(
    "dydilit_C",
    sources,
    include_dirs=[str(HERE / "csrc")],
    define_macros=macros,
    extra_compile_args=compile_args,
    extra_link_args=openmp,
    depends=sorted(depends),
)


class Build(cpp_extension.BuildExtension):
    def run(self):
        super().run()
        without = "DYDILIT_CUDA=0" if wanted == "0" else f"this machine lacks {lacking}"
        built = f"CUDA {archs}" if cuda else f"no CUDA ({without})"
        print(f"dydilit_C for torch {torch.__version__}: CPU, {built}")


setup(ext_modules=[extension], cmdclass={"build_ext": Build})
