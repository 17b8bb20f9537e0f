// The operators on CUDA: memory, the matrix products (cuBLAS, through ATen), and the order of the
// calls. The mathematics is in cuda_kernels.cu and phi.h, its derivation in csrc/README.md. Nothing
// here waits for the device or reads from it.
//
// If q is bfloat16, so are dq, dk and attn (`Core` in cuda_kernels.cuh). On the CPU they are then
// float32.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <string>

#include "cuda_kernels.cuh"
#include "ops.h"

namespace dydilit {
namespace {

template <class T>
constexpr auto dtype_of = at::kFloat;
template <>
constexpr auto dtype_of<__nv_bfloat16> = at::kBFloat16;

// f(T()), where T is the element type of q
template <class F>
auto dispatch(at::ScalarType dtype, F f) {
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
              "the fused op on CUDA takes float32, bfloat16 or float16, got ", dtype,
              "; backend='reference' takes it");
  return dtype == at::kFloat ? f(float()) : dtype == at::kHalf ? f(__half()) : f(__nv_bfloat16());
}

template <class S>
S* pointer(const Tensor& x) {
  return static_cast<S*>(x.mutable_data_ptr());
}

template <class S>
const S* const_pointer(const Tensor& x) {
  return static_cast<const S*>(x.const_data_ptr());
}

bool aligned(const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0; }

// x in this dtype, contiguous, at an address that is a multiple of 16
Tensor dense(const Tensor& x, at::ScalarType dtype) {
  const Tensor y = x.to(dtype).contiguous();
  return aligned(y) ? y : y.clone();
}

// Makes q's device the current one, takes its stream, and keeps autocast away from the products
struct Environment {
  c10::cuda::CUDAGuard device;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  cudaStream_t stream;
  explicit Environment(const Tensor& q)
      : device(q.device()), stream(c10::cuda::getCurrentCUDAStream()) {}
};

// The arguments that the row kernels of both directions share, and the tensors that own them
template <class T>
struct Inputs {
  Tensor z[4], gamma, lam, kernel_fragments, difference_fragments;
  cuda::Features<T> features;

  Inputs(const Shape& s, const Tensor& q, const Tensor& k, const Tensor& q_prime,
         const Tensor& k_prime, const Tensor& gamma_, const Tensor& lam_,
         const Tensor& kernel_routers, const Tensor& difference_routers, bool router_grad,
         bool transposed, cudaStream_t stream)
      : z{even_rows(q), even_rows(k), even_rows(q_prime), even_rows(k_prime)},
        gamma(gamma_.contiguous()),
        lam(lam_.contiguous()),
        kernel_fragments(split(kernel_routers, s.D, s.n_F, transposed, stream)),
        difference_fragments(split(difference_routers, s.D, s.n_D, transposed, stream)) {
    features = {s.B * s.N,
                int(s.N),
                int(s.D),
                int(s.n_F),
                int(s.n_D),
                s.D % 8 == 0,
                router_grad,
                {},
                const_pointer<float>(gamma),
                const_pointer<float>(lam),
                const_pointer<uint4>(kernel_fragments),
                const_pointer<uint4>(difference_fragments)};
    for (int i = 0; i < 4; i++) {
      features.z[i] = {const_pointer<T>(z[i]), z[i].stride(1)};
      features.vector = features.vector && aligned(z[i]) && z[i].stride(1) * sizeof(T) % 16 == 0;
    }
  }

  static Tensor split(const Tensor& routers, int64_t D, int64_t n, bool transposed,
                      cudaStream_t stream) {
    const int64_t elements = cuda::fragments(int(D), int(n), cuda::parts<T>);
    Tensor fragments = at::empty({elements, 16}, routers.options().dtype(at::kByte));
    const Tensor from = routers.contiguous();
    cuda::split_routers(const_pointer<float>(from), int(D), int(n), cuda::parts<T>, transposed,
                        pointer<uint4>(fragments), stream);
    return fragments;
  }
};

// Scratch for the sums over the rows of each image
Tensor partial_sums(const Shape& s, const at::TensorOptions& wide) {
  return at::empty({s.B, (s.N + cuda::SPLIT - 1) / cuda::SPLIT, s.D + 1}, wide);
}

template <class T>
Forward forward(const Shape& s, const Inputs<T>& inputs, const Tensor& v_, bool normalize,
                float eps, cudaStream_t stream) {
  using S = typename cuda::Core<T>::type;
  const int B = int(s.B), N = int(s.N), D = int(s.D);
  const auto wide = v_.options().dtype(at::kFloat), core = v_.options().dtype(dtype_of<S>);
  Tensor kernel_logits = at::empty({4, B, N, s.n_F}, wide),
         difference_logits = at::empty({2, B, N, s.n_D}, wide);
  Tensor dq = at::empty({B, N, D}, core), dk = at::empty({B, N, D}, core),
         k_sum = at::empty({normalize ? B : 0, D + 1}, wide),
         den = at::empty({normalize ? B : 0, N}, wide);
  // Eqs. 5 to 7, the differences of Eq. 8, and the denominator of Eq. 4: keys first
  cuda::Denominator denominator{};
  Tensor partial = at::empty({normalize ? cuda::sum_keys_partial(B, N, D) : 0}, wide);
  if (normalize)
    denominator = {pointer<float>(partial), const_pointer<float>(k_sum), eps, pointer<float>(den)};
  cuda::features(inputs.features, 1, pointer<float>(kernel_logits),
                 pointer<float>(difference_logits), pointer<S>(dk), denominator, stream);
  if (normalize) cuda::sum_keys(B, N, D, pointer<float>(partial), pointer<float>(k_sum), stream);
  cuda::features(inputs.features, 0, pointer<float>(kernel_logits),
                 pointer<float>(difference_logits), pointer<S>(dq), denominator, stream);

  const Tensor v = even_rows(v_).to(dtype_of<S>);
  // num = (Dq Dk^T) V or Dq (Dk^T V) (Eq. 8)
  const Tensor attn = s.tokens_first ? at::bmm(dq, dk.mT()) : at::bmm(dk.mT(), v);
  Tensor out = s.tokens_first ? at::bmm(attn, v) : at::bmm(dq, attn);
  if (normalize)  // out / den (Eq. 4)
    cuda::Rows<S>::divide(B, N, D, const_pointer<S>(out), const_pointer<float>(den),
                          pointer<S>(out), stream);
  return {out.to(v_.scalar_type()), dq, dk, attn, kernel_logits, difference_logits, k_sum, den};
}

// x^T dlogits (width, L) in float32; x (rows, width), dlogits (rows, L). One product with so few
// results would keep few multiprocessors busy: so one product for every 1024 rows, then their sum.
Tensor over_tokens(const Tensor& x, const Tensor& dlogits) {
  const int64_t rows = x.size(0), chunks = rows % 1024 == 0 ? rows / 1024 : 1;
  const Tensor a = x.unflatten(0, {chunks, -1}).mT(), b = dlogits.unflatten(0, {chunks, -1});
  return (x.scalar_type() == at::kFloat ? at::bmm(a, b) : at::bmm(a, b, at::kFloat)).sum(0);
}

// dR (width, n) = x^T dlogits. dlogits (rows, dlogit_parts * padded(n)) holds each number as a sum
// of parts, and padding, which is cut off.
template <class S>
Tensor router_gradient(const Tensor& x, const Tensor& dlogits, int64_t n) {
  if (x.size(0) == 0) return at::zeros({x.size(1), n}, x.options().dtype(at::kFloat));
  return over_tokens(x, dlogits).unflatten(1, {cuda::dlogit_parts<S>, -1}).sum(1).narrow(1, 0, n);
}

template <class T>
Backward backward(const Shape& s, const Inputs<T>& inputs, const Tensor& dout_, const Tensor& v_,
                  bool normalize, bool router_grad, const Tensor& dq_, const Tensor& dk_,
                  const Tensor& attn, const Tensor& kernel_logits, const Tensor& difference_logits,
                  const Tensor& k_sum, const Tensor& den, cudaStream_t stream) {
  using S = typename cuda::Core<T>::type;
  const int B = int(s.B), N = int(s.N), D = int(s.D);
  const int64_t rows = s.B * s.N;
  const auto wide = v_.options().dtype(at::kFloat), core = v_.options().dtype(dtype_of<S>);
  const Tensor dq = dense(dq_, dtype_of<S>), dk = dense(dk_, dtype_of<S>),
               v = even_rows(v_).to(dtype_of<S>);

  Tensor dnum = dense(dout_, dtype_of<S>);  // G: dout / den, the gradient of the numerator
  if (normalize) {
    const Tensor dout = dnum;
    dnum = at::empty({B, N, D}, core);
    cuda::Rows<S>::divide(B, N, D, const_pointer<S>(dout), const_pointer<float>(den),
                          pointer<S>(dnum), stream);
  }
  Tensor ddq, ddk, dv;
  if (s.tokens_first) {  // A = Dq Dk^T, num = A V:  dA = G V^T, dDq = dA Dk, ...
    const Tensor dattn = at::bmm(dnum, v.mT());
    ddq = at::bmm(dattn, dk);
    ddk = at::bmm(dattn.mT(), dq);
    dv = at::bmm(attn.mT(), dnum);
  } else {  // S = Dk^T V, num = Dq S:  dS = Dq^T G, dDq = G S^T, ...
    const Tensor dattn = at::bmm(dq.mT(), dnum);
    ddq = at::bmm(dnum, attn.mT());
    ddk = at::bmm(v, dattn.mT());
    dv = at::bmm(dk, dattn);
  }
  if (normalize) {  // the gradients that flow through the denominator of Eq. 4
    Tensor partial = partial_sums(s, wide), c = at::empty({B, D + 1}, wide);
    cuda::Rows<S>::denominator_backward(B, N, D, const_pointer<S>(dq), const_pointer<float>(k_sum),
                                        const_pointer<float>(den), pointer<S>(ddq),
                                        pointer<float>(partial), pointer<float>(c), stream);
    cuda::Rows<S>::sum_keys_backward(B, N, D, const_pointer<S>(dk), const_pointer<float>(c),
                                     pointer<S>(ddk), stream);
  }

  // Eqs. 8 to 5 backwards: dQ, dK, dQ', dK'; and for each token dgamma, dlambda and the dlogits
  const int64_t kept = router_grad ? rows : 0;  // rows of the tensors for the routers' gradients
  const int64_t F = cuda::dlogit_parts<S> * cuda::padded(int(s.n_F));
  const int64_t L = cuda::dlogit_parts<S> * cuda::padded(int(s.n_D));
  Tensor dz[4], dchosen = at::empty({6, rows}, wide),
                index = at::empty({6, rows}, wide.dtype(at::kInt));
  for (Tensor& x : dz) x = at::empty({B, N, D}, v_.options());
  Tensor pair = at::empty({2, kept, 2 * D}, core);
  Tensor kernel_dlogits = at::empty({4, kept, F}, core),
         difference_dlogits = at::empty({2, kept, L}, core);
  cuda::FeatureGradients<T> gradients{
      const_pointer<float>(kernel_logits),
      const_pointer<float>(difference_logits),
      const_pointer<S>(ddq),
      const_pointer<S>(ddk),
      {pointer<T>(dz[0]), pointer<T>(dz[1]), pointer<T>(dz[2]), pointer<T>(dz[3])},
      pointer<float>(dchosen),
      pointer<int>(index),
      pointer<S>(pair),
      pointer<S>(kernel_dlogits),
      pointer<S>(difference_dlogits)};
  cuda::features_backward(inputs.features, gradients, stream);

  // Sums over tokens: dgamma, dlambda, and dR = x^T dlogits
  Tensor dgamma = at::empty({s.n_F}, wide), dlam = at::empty({s.n_D}, wide);
  Tensor partial = at::empty({cuda::bin_sums_partial(int(std::max(s.n_F, s.n_D)))}, wide);
  cuda::bin_sums(4 * rows, int(s.n_F), const_pointer<int>(index), const_pointer<float>(dchosen),
                 pointer<float>(partial), pointer<float>(dgamma), stream);
  cuda::bin_sums(2 * rows, int(s.n_D), const_pointer<int>(index) + 4 * rows,
                 const_pointer<float>(dchosen) + 4 * rows, pointer<float>(partial),
                 pointer<float>(dlam), stream);

  Tensor dkernel_routers = at::zeros({4, D, s.n_F}, wide),
         ddifference_routers = at::zeros({2, 2 * D, s.n_D}, wide);
  for (int i = 0; i < 4 && router_grad; i++) {
    const Tensor z = inputs.z[i].as_strided({rows, D}, {inputs.z[i].stride(1), 1}).to(dtype_of<S>);
    dkernel_routers[i].copy_(router_gradient<S>(z, kernel_dlogits[i], s.n_F));
  }
  for (int i = 0; i < 2 && router_grad; i++)
    ddifference_routers[i].copy_(router_gradient<S>(pair[i], difference_dlogits[i], s.n_D));
  return {dz[0],
          dz[1],
          dz[2],
          dz[3],
          dv.to(v_.scalar_type()),
          dgamma,
          dlam,
          dkernel_routers,
          ddifference_routers};
}

// With text: a stream that formats a number crashes where gcc has linked its own libstdc++ into
// this extension, beside torch's
Shape check_limits(const Shape& s) {
  const auto text = [](int64_t number) { return std::to_string(number); };
  TORCH_CHECK(s.N <= cuda::MAX_TOKENS, "the fused op on CUDA takes N up to ",
              text(cuda::MAX_TOKENS), ", got ", text(s.N));
  TORCH_CHECK(s.D <= cuda::MAX_WIDTH, "the fused op on CUDA takes D up to ", text(cuda::MAX_WIDTH),
              ", got ", text(s.D));
  TORCH_CHECK(s.n_F <= cuda::MAX_CHOICES && s.n_D <= cuda::MAX_CHOICES,
              "the fused op on CUDA takes up to ", text(cuda::MAX_CHOICES),
              " gammas and lambdas, got ", text(s.n_F), " and ", text(s.n_D));
  return s;
}

Forward attention_fwd(const Tensor& q, const Tensor& k, const Tensor& q_prime,
                      const Tensor& k_prime, const Tensor& v, const Tensor& gamma,
                      const Tensor& lam, const Tensor& kernel_routers,
                      const Tensor& difference_routers, bool normalize, bool router_grad,
                      double eps) {
  const Shape s = check(q, k, q_prime, k_prime, v, gamma, lam, kernel_routers, difference_routers);
  return dispatch(q.scalar_type(), [&](auto type) {
    check_limits(s);
    const Environment here(q);
    const Inputs<decltype(type)> inputs(s, q, k, q_prime, k_prime, gamma, lam, kernel_routers,
                                        difference_routers, router_grad, false, here.stream);
    return forward(s, inputs, v, normalize, float(eps), here.stream);
  });
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& q_prime, const Tensor& k_prime,
                 const Tensor& v, const Tensor& gamma, const Tensor& lam,
                 const Tensor& kernel_routers, const Tensor& difference_routers, bool normalize,
                 bool router_grad, double eps) {
  return std::get<0>(attention_fwd(q, k, q_prime, k_prime, v, gamma, lam, kernel_routers,
                                   difference_routers, normalize, router_grad, eps));
}

Backward attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& q_prime,
                       const Tensor& k_prime, const Tensor& v, const Tensor& gamma,
                       const Tensor& lam, const Tensor& kernel_routers,
                       const Tensor& difference_routers, bool normalize, bool router_grad,
                       double /*eps*/, const Tensor& dq, const Tensor& dk, const Tensor& attn,
                       const Tensor& kernel_logits, const Tensor& difference_logits,
                       const Tensor& k_sum, const Tensor& den) {
  const Shape s = check(q, k, q_prime, k_prime, v, gamma, lam, kernel_routers, difference_routers);
  return dispatch(q.scalar_type(), [&](auto type) {
    check_limits(s);
    check_kept(s, normalize, dtype_of<typename cuda::Core<decltype(type)>::type>, q, dout, dq, dk,
               attn, kernel_logits, difference_logits, k_sum, den);
    const Environment here(q);
    const Inputs<decltype(type)> inputs(s, q, k, q_prime, k_prime, gamma, lam, kernel_routers,
                                        difference_routers, router_grad, true, here.stream);
    return backward(s, inputs, dout, v, normalize, router_grad, dq, dk, attn,
                    kernel_logits.contiguous(), difference_logits.contiguous(), k_sum.contiguous(),
                    den.contiguous(), here.stream);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(dydilit, CUDA, m) {
  m.impl("attention", &attention);
  m.impl("attention_fwd", &attention_fwd);
  m.impl("attention_bwd", &attention_bwd);
}

}  // namespace dydilit
