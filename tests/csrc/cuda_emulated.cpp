// The CUDA operators on the CPU: csrc/cuda_kernels.cu and csrc/cuda_ops.cpp, unchanged, over
// cuda_emulator.h. test_cuda.py compiles this file with -Ddydilit=dydilit_emulated, so that
// torch.ops.dydilit_emulated exists beside torch.ops.dydilit.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <utility>

#include "cuda_emulator.h"
// The part of c10::cuda that cuda_ops.cpp uses. test_cuda.py writes empty headers of these names.
namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(Device) {}
};
inline cudaStream_t getCurrentCUDAStream() { return nullptr; }
}  // namespace c10::cuda

#include "cuda_kernels.cu"
#define CUDA CPU  // the dispatch key under which they are registered
#include "cuda_ops.cpp"

static void seed(int64_t value) { emulator::order.seed(unsigned(value)); }
static int64_t refuse(int64_t launch) { return std::exchange(emulator::until_refused, launch); }
TORCH_LIBRARY_FRAGMENT(dydilit, m) {
  m.def("seed(int value) -> ()", &seed);
  m.def("refuse(int launch) -> int", &refuse);
}
