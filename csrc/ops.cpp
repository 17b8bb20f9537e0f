// The Python module dydilit_C: the schemas of the three operators, and build_info(). Importing it registers the kernels of
// cpu_ops.cpp (and cuda_ops.cpp); fake kernels, autograd and the choice of backend are in dydilit.py.
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include "cpu_kernels.h"

#ifndef DYDILIT_TORCH
#define DYDILIT_TORCH TORCH_VERSION
#endif
#ifndef DYDILIT_CUDA_ARCHS
#define DYDILIT_CUDA_ARCHS ""
#endif

// Between the projections and the convolution: Eqs. 5 to 8. Dq, Dk are the differenced tokens; wide is float32, or
// float64 where q is.
TORCH_LIBRARY(dydilit, m) {
  m.def(  // where no gradient is wanted
      "attention(Tensor q, Tensor k, Tensor q_prime, Tensor k_prime, Tensor v, Tensor gamma, Tensor lam, "
      "Tensor kernel_routers, Tensor difference_routers, bool normalize, float eps) -> Tensor");
  m.def(  // the same, and what follows `out` is kept for the backward
      "attention_fwd("
      "Tensor q, Tensor k, "               // (B, N, D), any float dtype, any strides; the five agree
      "Tensor q_prime, Tensor k_prime, "   // (B, N, D)
      "Tensor v, "                         // (B, N, D)
      "Tensor gamma, Tensor lam, "         // (n_F,), (n_D,), wide
      "Tensor kernel_routers, "            // (4, D, n_F), wide, for Q, K, Q', K'
      "Tensor difference_routers, "        // (2, 2D, n_D), wide, for Q, K
      "bool normalize, bool router_grad, "  // divide by the guarded denominator; gradients for the routers (backward)
      "float eps) -> ("
      "Tensor out, "                // (B, N, D), q's dtype
      "Tensor dq, Tensor dk, "      // (B, N, D), wide (on CUDA bfloat16 where q is): Q~ - lambda Q~', K~ - lambda K~'
      "Tensor attn, "               // as they are: Dq Dk^T (B, N, N) if N <= D, else Dk^T V (B, D, D)
      "Tensor kernel_logits, "      // (4, B, N, n_F), wide
      "Tensor difference_logits, "  // (2, B, N, n_D), wide
      "Tensor k_sum, Tensor den)");  // (B, D + 1): sum Dk_j, sum |Dk_j|; (B, N); both of B = 0 unless normalize
  m.def(
      "attention_bwd(Tensor dout, "  // (B, N, D), q's dtype; then what the forward took and what it kept
      "Tensor q, Tensor k, Tensor q_prime, Tensor k_prime, Tensor v, Tensor gamma, Tensor lam, Tensor kernel_routers, "
      "Tensor difference_routers, bool normalize, bool router_grad, float eps, "
      "Tensor dq, Tensor dk, Tensor attn, Tensor kernel_logits, Tensor difference_logits, Tensor k_sum, Tensor den) -> ("
      "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");  // contiguous, in the inputs' order
}

namespace py = pybind11;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["torch"] = DYDILIT_TORCH;  // the version it was built for, and the only one it works with
        info["compiler"] = __VERSION__;
        info["isa"] = dydilit::cpu_isa();          // chosen when it was imported
        info["cuda_archs"] = DYDILIT_CUDA_ARCHS;  // "" for a build without CUDA
        return info;
      },
      "What this extension was built from and for.");
}
