// Shared by the operators of both devices: the sizes of a call, and the checks of its arguments.
#pragma once
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>

#include <string>
#include <tuple>
#include <vector>

namespace dydilit {

using at::Tensor;
// The results of attention_fwd and attention_bwd, in the order of the schemas in ops.cpp
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Shape {
  int64_t B, N, D, n_F, n_D;
  bool tokens_first;  // (Dq Dk^T) V, which has fewer multiply-adds if N <= D; else Dq (Dk^T V)
};

inline Shape check(const Tensor& q, const Tensor& k, const Tensor& q_prime, const Tensor& k_prime,
                   const Tensor& v, const Tensor& gamma, const Tensor& lam,
                   const Tensor& kernel_routers, const Tensor& difference_routers) {
  TORCH_CHECK(q.dim() == 3, "q must be (B, N, D), got ", std::to_string(q.dim()), " axes");
  const Shape s{q.size(0),     q.size(1),   q.size(2),
                gamma.numel(), lam.numel(), q.size(1) <= q.size(2)};
  for (const Tensor* x : {&k, &q_prime, &k_prime, &v})
    TORCH_CHECK(
        x->sizes() == q.sizes() && x->scalar_type() == q.scalar_type() && x->device() == q.device(),
        "q, k, q_prime, k_prime and v must agree in shape, dtype and device");
  const auto wide = at::toOpMathType(q.scalar_type());
  for (const Tensor* x : {&gamma, &lam, &kernel_routers, &difference_routers})
    TORCH_CHECK(x->scalar_type() == wide && x->device() == q.device(),
                "gamma, lam and the routers must be ", wide, " on q's device when q is ",
                q.scalar_type());
  TORCH_CHECK(kernel_routers.sizes() == at::IntArrayRef({4, s.D, s.n_F}),
              "kernel_routers must be (4, D, n_F)");
  TORCH_CHECK(difference_routers.sizes() == at::IntArrayRef({2, 2 * s.D, s.n_D}),
              "difference_routers must be (2, 2D, n_D)");
  TORCH_CHECK(s.D > 0 && s.n_F > 0 && s.n_D > 0, "D, n_F and n_D must be at least 1");
  return s;
}

// Checks dout and the results that attention_fwd kept; `core` is the dtype of dq, dk and attn
inline void check_kept(const Shape& s, bool normalize, at::ScalarType core, const Tensor& q,
                       const Tensor& dout, const Tensor& dq, const Tensor& dk, const Tensor& attn,
                       const Tensor& kernel_logits, const Tensor& difference_logits,
                       const Tensor& k_sum, const Tensor& den) {
  TORCH_CHECK(dout.sizes() == q.sizes() && dout.scalar_type() == q.scalar_type() &&
                  dout.device() == q.device(),
              "dout must agree with q in shape, dtype and device");
  const auto wide = at::toOpMathType(q.scalar_type());
  const int64_t n = s.tokens_first ? s.N : s.D, b = normalize ? s.B : 0;
  const std::tuple<const Tensor*, at::ScalarType, std::vector<int64_t>> kept[] = {
      {&dq, core, {s.B, s.N, s.D}},
      {&dk, core, {s.B, s.N, s.D}},
      {&attn, core, {s.B, n, n}},
      {&kernel_logits, wide, {4, s.B, s.N, s.n_F}},
      {&difference_logits, wide, {2, s.B, s.N, s.n_D}},
      {&k_sum, wide, {b, s.D + 1}},
      {&den, wide, {b, s.N}}};
  for (const auto& [x, dtype, sizes] : kept)
    TORCH_CHECK(x->sizes() == sizes && x->scalar_type() == dtype && x->device() == q.device(),
                "attention_bwd takes what attention_fwd kept for the same arguments");
}

// x (B, N, D) itself if all its rows are stride(1) apart, as the rows of one part of a joint
// projection are; else a contiguous copy. A dimension of size 1 may have any stride and still count
// as contiguous; the two views give it the usual one.
inline Tensor even_rows(const Tensor& x) {
  const bool even =
      x.stride(2) == 1 && x.stride(1) >= x.size(2) && x.stride(0) == x.size(1) * x.stride(1);
  return even ? x : x.contiguous().view({x.numel()}).view(x.sizes());
}

}  // namespace dydilit
