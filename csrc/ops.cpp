// The Python module dydilit_C: the schemas of the three operators, and build_info(). Importing it
// registers the kernels of cpu_ops.cpp and, in a build with CUDA, of cuda_ops.cpp. dydilit.py adds
// the fake kernels and autograd, and chooses the backend.
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include "cpu_kernels.h"
#include "cuda_limits.h"

#ifndef DYDILIT_TORCH
#define DYDILIT_TORCH TORCH_VERSION
#endif
#ifndef DYDILIT_CUDA_ARCHS
#define DYDILIT_CUDA_ARCHS ""
#endif

// Everything between the projections and the convolution: Eqs. 5 to 8. Dq and Dk are the
// differenced tokens. `wide` is float64 if q is, else float32.
TORCH_LIBRARY(dydilit, m) {
  m.def(  // for inference: keeps nothing for a backward
      "attention(Tensor q, Tensor k, Tensor q_prime, Tensor k_prime, Tensor v, Tensor gamma, "
      "Tensor lam, Tensor kernel_routers, Tensor difference_routers, bool normalize, "
      "bool router_grad, float eps) -> Tensor");
  m.def(  // for training: the results after `out` are kept for the backward
      "attention_fwd("
      "Tensor q, Tensor k, "               // (B, N, D), a float dtype, any strides
      "Tensor q_prime, Tensor k_prime, "   // (B, N, D)
      "Tensor v, "                         // (B, N, D); these five have one dtype
      "Tensor gamma, Tensor lam, "         // (n_F,), (n_D,), wide
      "Tensor kernel_routers, "            // (4, D, n_F), wide, for Q, K, Q', K'
      "Tensor difference_routers, "        // (2, 2D, n_D), wide, for Q, K
      "bool normalize, "                   // divide by the denominator of Eq. 4
      "bool router_grad, "                 // choices have gates: routers have gradients
      "float eps) -> ("
      "Tensor out, "                       // (B, N, D), q's dtype
      "Tensor dq, Tensor dk, "             // (B, N, D), core: wide, but bfloat16 on CUDA if q is
      "Tensor attn, "                      // core: Dq Dk^T (B, N, N); Dk^T V (B, D, D) if N > D
      "Tensor kernel_logits, "             // (4, B, N, n_F), wide
      "Tensor difference_logits, "         // (2, B, N, n_D), wide
      "Tensor k_sum, "                     // (B, D + 1), wide: sum_j Dk_j, sum_j |Dk_j|
      "Tensor den)");                      // (B, N), wide; CUDA: negative where it is the floor;
                                           // k_sum and den are empty unless normalize
  m.def(
      "attention_bwd("
      "Tensor dout, "                      // (B, N, D), q's dtype
      "Tensor q, Tensor k, Tensor q_prime, Tensor k_prime, Tensor v, Tensor gamma, Tensor lam, "
      "Tensor kernel_routers, Tensor difference_routers, bool normalize, bool router_grad, "
      "float eps, "                        // the arguments of attention_fwd, then its results
      "Tensor dq, Tensor dk, Tensor attn, Tensor kernel_logits, Tensor difference_logits, "
      "Tensor k_sum, Tensor den) -> ("
      "Tensor, Tensor, Tensor, Tensor, "   // of q, k, q_prime, k_prime; all contiguous
      "Tensor, Tensor, Tensor, "           // of v, gamma, lam
      "Tensor, Tensor)");                  // of kernel_routers, difference_routers
}

namespace py = pybind11;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["torch"] = DYDILIT_TORCH;  // built for this version, and works with no other
        info["compiler"] = __VERSION__;
        info["isa"] = dydilit::cpu_isa();         // of the CPU kernels, chosen at import
        info["cuda_archs"] = DYDILIT_CUDA_ARCHS;  // "" for a build without CUDA
        info["max_width"] = dydilit::cuda::MAX_WIDTH;      // the largest D that CUDA takes
        info["max_choices"] = dydilit::cuda::MAX_CHOICES;  // the largest n_F and n_D
        return info;
      },
      "What this extension was built for, and the limits of its CUDA kernels.");
}
