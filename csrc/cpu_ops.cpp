// The two operators on the CPU: which rows meet which, and the matrix products. The row-by-row mathematics is in
// cpu_kernels.cpp, its derivation in NOTES.md.
//
// Work is cut into blocks of BLOCK tokens of one image: what a block touches stays in the second-level cache between the
// product that makes it and the loop that uses it. Blocks are the same for every number of threads, and sums over blocks
// are taken in their order, so results are too.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <iterator>
#include <type_traits>

#include "cpu_kernels.h"
#include "ops.h"

namespace dydilit {
namespace {

constexpr int64_t BLOCK = 64;
constexpr int64_t CHUNK = 256;  // of the inner dimension of a product, for the same reason

// C (M, N) = A (M, K) B (K, N), all row-major; += where `accumulate`
void gemm(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb, float* C, int64_t ldc,
          bool accumulate = false) {
  for (int64_t k = 0; k < K; k += CHUNK)
    at::native::cpublas::brgemm(M, N, std::min(CHUNK, K - k), lda, ldb, ldc, accumulate || k > 0, A + k, B + k * ldb, C);
}
void gemm(int64_t M, int64_t N, int64_t K, const double* A, int64_t lda, const double* B, int64_t ldb, double* C,
          int64_t ldc, bool accumulate = false) {
  Rows<double>::gemm(M, N, K, A, lda, B, ldb, C, ldc, accumulate);
}

// Rows of a tensor (B, N, D), ld apart
template <class S>
struct View {
  S* data;
  int64_t ld;
};

// x itself if its rows are evenly spaced, as those of one part of a joint projection are; else a copy
Tensor even_rows(const Tensor& x) {
  const bool even = x.stride(2) == 1 && x.stride(1) >= x.size(2) && x.stride(0) == x.size(1) * x.stride(1);
  return even ? x : x.contiguous();
}

template <class S>
View<const S> view(const Tensor& x) { return {x.const_data_ptr<S>(), x.stride(1)}; }

// Rows first .. first + rows of x as T: in place where S is T, else converted into `scratch`, D apart
template <class S, class T>
View<const T> widen(View<const S> x, int64_t first, int64_t rows, int64_t D, T* scratch) {
  const S* from = x.data + first * x.ld;
  if constexpr (std::is_same_v<S, T>) return {from, x.ld};
  if constexpr (std::is_same_v<S, at::BFloat16>) widen_bfloat16(rows, D, reinterpret_cast<const uint16_t*>(from), x.ld, scratch);
  if constexpr (std::is_same_v<S, at::Half>) widen_float16(rows, D, reinterpret_cast<const uint16_t*>(from), x.ld, scratch);
  if constexpr (!std::is_same_v<S, T>) return {scratch, D};
}

// All rows of x as T, `wide` being where blocks of them were converted to
template <class S, class T>
View<const T> widened(const Tensor& x, const Tensor& wide) {
  if constexpr (std::is_same_v<S, T>) return view<S>(x);
  else return {wide.const_data_ptr<T>(), x.size(2)};
}

// Where a block of a contiguous result of type S is computed as T: in place where S is T, else in `scratch`
template <class S, class T>
View<T> target(S* out, int64_t D, View<T> scratch) {
  if constexpr (std::is_same_v<S, T>) return {out, D};
  else return scratch;
}

// ... and its conversion afterwards
template <class S, class T>
void narrow(View<T> x, int64_t rows, int64_t D, S* out) {
  if constexpr (std::is_same_v<S, at::BFloat16>) narrow_bfloat16(rows, D, x.data, x.ld, reinterpret_cast<uint16_t*>(out));
  if constexpr (std::is_same_v<S, at::Half>) narrow_float16(rows, D, x.data, x.ld, reinterpret_cast<uint16_t*>(out));
}

// `rows` rows of one image: the first is number `first` of the image, number `row` of the batch. `index` counts blocks.
struct Block {
  int64_t index, image, first, row, rows;
};

int64_t blocks_per_image(int64_t N) { return (N + BLOCK - 1) / BLOCK; }

// Memory of one thread for the block that it works on
template <class T>
struct Scratch {
  Tensor memory;
  T *pair, *dpair, *u, *l;                 // (BLOCK, 2D): y and y' side by side; u and log2 t of both
  T* z[2];                                 // (BLOCK, D): z and z', where the inputs are 16-bit
  T *row, *other;                          // (BLOCK, D)
  T *gamma[2], *lam, *dchosen;             // (BLOCK): what each token was routed to
  T *dlogits, *dlogits_t;                  // (BLOCK, n), (n, BLOCK)
  PhiRow<T> stats[2][BLOCK];
  int32_t kernel_index[2][BLOCK], difference_index[BLOCK];

  explicit Scratch(const Shape& s) {
    const int64_t D = s.D, n = std::max(s.n_F, s.n_D);
    const int64_t sizes[] = {2 * D, 2 * D, 2 * D, 2 * D, D, D, D, D, 1, 1, 1, 1, n, n};
    T** pointers[] = {&pair, &dpair, &u, &l, &z[0], &z[1], &row, &other, &gamma[0], &gamma[1], &lam, &dchosen, &dlogits, &dlogits_t};
    int64_t total = 0;
    for (int64_t size : sizes) total += size;
    memory = at::empty({total * BLOCK}, c10::CppTypeToScalarType<T>::value);
    T* next = memory.mutable_data_ptr<T>();
    for (size_t i = 0; i < std::size(sizes); next += sizes[i++] * BLOCK) *pointers[i] = next;
  }
};

// f(scratch, part, block) for the blocks of B images of N rows. Parts run in parallel, the blocks of a part in order.
template <class T, class F>
void for_blocks(const Shape& s, int64_t N, int64_t parts, F f) {
  const int64_t per_image = blocks_per_image(N), total = s.B * per_image;
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(s);
    for (int64_t part = begin; part < end; part++)
      for (int64_t t = total * part / parts; t < total * (part + 1) / parts; t++) {
        const int64_t image = t / per_image, first = t % per_image * BLOCK;
        f(scratch, part, Block{t, image, first, image * N + first, std::min(BLOCK, N - first)});
      }
  });
}

template <class T, class F>
void for_blocks(const Shape& s, int64_t N, F f) {
  for_blocks<T>(s, N, s.B * blocks_per_image(N), [&](Scratch<T>& w, int64_t, Block x) { f(w, x); });
}

// One side of the attention: Q and Q' (side 0), or K and K' (side 1). Element 1 of each array is the primed one.
template <class S, class T, class Logits>
struct Side {
  View<const S> z[2];              // (B N, D)
  const T *gamma, *lam;            // (n_F), (n_D)
  const T* router[2];              // (D, n_F); in the backward transposed, (n_F, D)
  const T* difference_router;      // (2D, n_D); in the backward transposed, (n_D, 2D)
  Logits* logits[2];               // (B N, n_F)
  Logits* difference_logits;       // (B N, n_D)

  Side(int side, const Shape& s, const Tensor& z, const Tensor& z_prime, const Tensor& gamma, const Tensor& lam,
       const Tensor& routers, const Tensor& difference_routers, const Tensor& logits, const Tensor& difference_logits)
      : z{view<S>(z), view<S>(z_prime)}, gamma(gamma.const_data_ptr<T>()), lam(lam.const_data_ptr<T>()) {
    for (int prime : {0, 1}) {
      const int i = 2 * prime + side;  // the order Q, K, Q', K'
      router[prime] = routers.const_data_ptr<T>() + i * s.D * s.n_F;
      this->logits[prime] = logits.data_ptr<T>() + i * s.B * s.N * s.n_F;
    }
    difference_router = difference_routers.const_data_ptr<T>() + side * 2 * s.D * s.n_D;
    this->difference_logits = difference_logits.data_ptr<T>() + side * s.B * s.N * s.n_D;
  }
};

// d (rows, D) = the differenced tokens of a block, Eqs. 6 to 8
template <class S, class T>
void side_forward(const Shape& s, const Side<S, T, T>& side, Block x, Scratch<T>& w, T* d) {
  for (int prime : {0, 1}) {
    const auto z = widen<S, T>(side.z[prime], x.row, x.rows, s.D, w.z[prime]);
    T* logits = side.logits[prime] + x.row * s.n_F;
    gemm(x.rows, s.n_F, s.D, z.data, z.ld, side.router[prime], s.n_F, logits, s.n_F);
    Rows<T>::choose(x.rows, s.n_F, logits, side.gamma, w.kernel_index[prime], w.gamma[prime]);
    Rows<T>::phi(x.rows, s.D, z.data, z.ld, w.gamma[prime], w.pair + prime * s.D, 2 * s.D, w.u, w.l, 0,
                 w.stats[prime]);
  }
  T* logits = side.difference_logits + x.row * s.n_D;
  gemm(x.rows, s.n_D, 2 * s.D, w.pair, 2 * s.D, side.difference_router, s.n_D, logits, s.n_D);
  Rows<T>::choose(x.rows, s.n_D, logits, side.lam, w.difference_index, w.lam);
  Rows<T>::difference(x.rows, s.D, w.pair, w.lam, d);
}

// Gradients that sum over tokens, for one side: transposed routers, gamma, lambda
template <class T>
struct Sums {
  T *drouter[2], *ddifference_router, *dgamma, *dlam;
  static int64_t size(const Shape& s) { return 2 * s.n_F * s.D + 2 * s.n_D * s.D + s.n_F + s.n_D; }
  Sums(const Shape& s, T* memory)
      : drouter{memory, memory + s.n_F * s.D}, ddifference_router(drouter[1] + s.n_F * s.D),
        dgamma(ddifference_router + 2 * s.n_D * s.D), dlam(dgamma + s.n_F) {}
};

// From dd, the gradient of the differenced tokens of a block: dz (rows of two results), sums +=
template <class S, class T>
void side_backward(const Shape& s, const Side<S, T, const T>& side, bool router_grad, Block x, Scratch<T>& w, const T* dd,
                   S* const dz[2], Sums<T> sums) {
  View<const T> z[2];
  for (int prime : {0, 1}) {  // y and y' again, cheaper than keeping them
    z[prime] = widen<S, T>(side.z[prime], x.row, x.rows, s.D, w.z[prime]);
    Rows<T>::choose(x.rows, s.n_F, side.logits[prime] + x.row * s.n_F, side.gamma, w.kernel_index[prime], w.gamma[prime]);
    Rows<T>::phi(x.rows, s.D, z[prime].data, z[prime].ld, w.gamma[prime], w.pair + prime * s.D, 2 * s.D,
                 w.u + prime * s.D, w.l + prime * s.D, 2 * s.D, w.stats[prime]);
  }
  const T* logits = side.difference_logits + x.row * s.n_D;
  Rows<T>::choose(x.rows, s.n_D, logits, side.lam, w.difference_index, w.lam);
  Rows<T>::difference_backward(x.rows, s.D, w.pair, w.lam, dd, w.dpair, w.dchosen);
  Rows<T>::choose_backward(x.rows, s.n_D, logits, side.lam, w.difference_index, w.dchosen, sums.dlam, w.dlogits, w.dlogits_t);
  if (router_grad) {  // logits = (y, y') R:  dR^T += dlogits^T (y, y'),  (dy, dy') += dlogits R^T
    gemm(s.n_D, 2 * s.D, x.rows, w.dlogits_t, x.rows, w.pair, 2 * s.D, sums.ddifference_router, 2 * s.D, true);
    gemm(x.rows, 2 * s.D, s.n_D, w.dlogits, s.n_D, side.difference_router, 2 * s.D, w.dpair, 2 * s.D, true);
  }
  for (int prime : {0, 1}) {
    T* dy = w.dpair + prime * s.D;
    S* out = dz[prime] + x.row * s.D;
    const View<T> to = target(out, s.D, View<T>{dy, 2 * s.D});
    Rows<T>::phi_backward(x.rows, s.D, z[prime].data, z[prime].ld, w.gamma[prime], w.stats[prime],
                          w.u + prime * s.D, w.l + prime * s.D, dy, 2 * s.D, to.data, to.ld, w.dchosen);
    Rows<T>::choose_backward(x.rows, s.n_F, side.logits[prime] + x.row * s.n_F, side.gamma, w.kernel_index[prime],
                             w.dchosen, sums.dgamma, w.dlogits, w.dlogits_t);
    if (router_grad) {  // logits = z R:  dR^T += dlogits^T z,  dz += dlogits R^T
      gemm(s.n_F, s.D, x.rows, w.dlogits_t, x.rows, z[prime].data, z[prime].ld, sums.drouter[prime], s.D, true);
      gemm(x.rows, s.D, s.n_F, w.dlogits, s.n_F, side.router[prime], s.D, to.data, to.ld, true);
    }
    narrow(to, x.rows, s.D, out);
  }
}

// y (B, width) = the sum of x (B, n, width) over n, in order
template <class T>
Tensor sum_in_order(const Tensor& x) {
  const int64_t n = x.size(1), width = x.size(2);
  const Tensor y = at::zeros({x.size(0), width}, x.options());
  for (int64_t i = 0; i < x.size(0); i++)
    for (int64_t j = 0; j < n; j++)
      Rows<T>::add(width, x.const_data_ptr<T>() + (i * n + j) * width, y.mutable_data_ptr<T>() + i * width);
  return y;
}

template <class S, class T>
Forward forward(const Shape& s, const Tensor& q, const Tensor& k, const Tensor& q_prime, const Tensor& k_prime,
                const Tensor& v, const Tensor& gamma, const Tensor& lam, const Tensor& kernel_routers,
                const Tensor& difference_routers, bool normalize, T eps) {
  const int64_t B = s.B, N = s.N, D = s.D, width = s.tokens_first ? N : D, per_image = blocks_per_image(N);
  const auto wide = q.options().dtype(c10::CppTypeToScalarType<T>::value);
  const Tensor out = at::empty({B, N, D}, q.options()), dq = at::empty({B, N, D}, wide), dk = at::empty({B, N, D}, wide),
               attn = at::empty({B, width, width}, wide), kernel_logits = at::empty({4, B, N, s.n_F}, wide),
               difference_logits = at::empty({2, B, N, s.n_D}, wide), den = at::empty({normalize ? B : 0, N}, wide),
               k_sums = at::empty({normalize ? B : 0, per_image, D + 1}, wide), dk_t = at::empty({B, D, N}, wide),
               v_wide = at::empty({std::is_same_v<S, T> ? 0 : B * N, D}, wide);
  const Side<S, T, T> queries(0, s, q, q_prime, gamma, lam, kernel_routers, difference_routers, kernel_logits,
                              difference_logits);
  const Side<S, T, T> keys(1, s, k, k_prime, gamma, lam, kernel_routers, difference_routers, kernel_logits,
                           difference_logits);
  T *Dq = dq.mutable_data_ptr<T>(), *Dk = dk.mutable_data_ptr<T>(), *Dk_t = dk_t.mutable_data_ptr<T>(),
    *A = attn.mutable_data_ptr<T>();

  for_blocks<T>(s, N, [&](Scratch<T>& w, Block x) {
    T* d = Dk + x.row * D;
    side_forward(s, keys, x, w, d);
    Rows<T>::transpose(x.rows, D, d, D, nullptr, Dk_t + x.image * D * N + x.first, N);
    if (normalize) Rows<T>::sum_keys(x.rows, D, d, k_sums.mutable_data_ptr<T>() + x.index * (D + 1));
    widen<S, T>(view<S>(v), x.row, x.rows, D, v_wide.mutable_data_ptr<T>() + x.row * D);
  });
  const Tensor k_sum = sum_in_order<T>(k_sums);
  const View<const T> V = widened<S, T>(v, v_wide);

  if (!s.tokens_first)
    for_blocks<T>(s, D, [&](Scratch<T>&, Block x) {  // S = Dk^T V, some rows of it
      gemm(x.rows, D, N, Dk_t + x.row * N, N, V.data + x.image * N * V.ld, V.ld, A + x.row * D, D);
    });

  for_blocks<T>(s, N, [&](Scratch<T>& w, Block x) {
    T* d = Dq + x.row * D;
    S* o = out.mutable_data_ptr<S>() + x.row * D;
    const View<T> num = target(o, D, View<T>{w.row, D});
    side_forward(s, queries, x, w, d);
    if (s.tokens_first) {  // A = Dq Dk^T, num = A V
      T* a = A + x.row * N;
      gemm(x.rows, N, D, d, D, Dk_t + x.image * D * N, N, a, N);
      gemm(x.rows, D, N, a, N, V.data + x.image * N * V.ld, V.ld, num.data, D);
    } else {  // num = Dq S
      gemm(x.rows, D, D, d, D, A + x.image * D * D, D, num.data, D);
    }
    if (normalize) {  // out = num / den
      T* n = den.mutable_data_ptr<T>() + x.row;
      Rows<T>::denominator(x.rows, D, d, k_sum.const_data_ptr<T>() + x.image * (D + 1), eps, n);
      Rows<T>::divide(x.rows, D, num.data, D, n, num.data, D);
    }
    narrow(num, x.rows, D, o);
  });
  return {out, dq, dk, attn, kernel_logits, difference_logits, k_sum, den};
}

template <class S, class T>
Backward backward(const Shape& s, const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& q_prime,
                  const Tensor& k_prime, const Tensor& v, const Tensor& gamma, const Tensor& lam,
                  const Tensor& kernel_routers_t, const Tensor& difference_routers_t, bool normalize, bool router_grad,
                  T eps, const Tensor& dq, const Tensor& dk, const Tensor& attn, const Tensor& kernel_logits,
                  const Tensor& difference_logits, const Tensor& k_sum, const Tensor& den) {
  const int64_t B = s.B, N = s.N, D = s.D, total = B * blocks_per_image(N), n_sums = Sums<T>::size(s);
  const int64_t parts = std::min(total, std::max<int64_t>(16, total / 16));
  const bool tokens_first = s.tokens_first;
  const auto wide = dq.options();
  const auto scratch = [&](bool needed, int64_t m, int64_t n) { return at::empty({needed ? B : 0, m, n}, wide); };

  // Row i of A or of Dq is divided by den_i wherever it is used.
  //   (Dq Dk^T) V:  dA = G V^T,    dDq = dA Dk / den,   dDk = (dA / den)^T Dq,  dV = (A / den)^T G      G = dout
  //   Dq (Dk^T V):  dS = (Dq / den)^T G,  dDq = G S^T / den,   dDk = V dS^T,    dV = Dk dS
  const Tensor v_t = scratch(tokens_first, D, N), a_t = scratch(tokens_first, N, N), da_t = scratch(tokens_first, N, N),
               dq_t = scratch(!tokens_first, D, N), ds = scratch(!tokens_first, D, D), ds_t = scratch(!tokens_first, D, D),
               s_t = scratch(!tokens_first, D, D), g_wide = at::empty({std::is_same_v<S, T> ? 0 : B * N, D}, wide),
               cs = scratch(normalize, blocks_per_image(N), D + 1).zero_(), sums = at::zeros({2, parts, n_sums}, wide);
  const T *Dq = dq.const_data_ptr<T>(), *Dk = dk.const_data_ptr<T>(), *A = attn.const_data_ptr<T>(),
          *K_sum = k_sum.const_data_ptr<T>(), *Den = den.const_data_ptr<T>();
  T *V_t = v_t.mutable_data_ptr<T>(), *A_t = a_t.mutable_data_ptr<T>(), *dA_t = da_t.mutable_data_ptr<T>(),
    *Dq_t = dq_t.mutable_data_ptr<T>(), *dS = ds.mutable_data_ptr<T>(), *dS_t = ds_t.mutable_data_ptr<T>(),
    *S_t = s_t.mutable_data_ptr<T>(), *Cs = cs.mutable_data_ptr<T>(), *sums_of_part = sums.mutable_data_ptr<T>();
  Tensor result[5];  // dq, dk, dq_prime, dk_prime, dv: gradients of the inputs
  for (Tensor& x : result) x = at::empty({B, N, D}, q.options());
  const auto out = [&](int i) { return result[i].mutable_data_ptr<S>(); };
  S *const dz_queries[] = {out(0), out(2)}, *const dz_keys[] = {out(1), out(3)}, *const dV = out(4);

  const Side<S, T, const T> queries(0, s, q, q_prime, gamma, lam, kernel_routers_t, difference_routers_t, kernel_logits,
                                    difference_logits);
  const Side<S, T, const T> keys(1, s, k, k_prime, gamma, lam, kernel_routers_t, difference_routers_t, kernel_logits,
                                 difference_logits);

  for_blocks<T>(s, N, [&](Scratch<T>& w, Block x) {
    widen<S, T>(view<S>(dout), x.row, x.rows, D, g_wide.mutable_data_ptr<T>() + x.row * D);
    if (tokens_first) {
      const View<const T> rows = widen<S, T>(view<S>(v), x.row, x.rows, D, w.row);
      Rows<T>::transpose(x.rows, D, rows.data, rows.ld, nullptr, V_t + x.image * D * N + x.first, N);
    } else {
      Rows<T>::transpose(x.rows, D, Dq + x.row * D, D, normalize ? Den + x.row : nullptr, Dq_t + x.image * D * N + x.first, N);
    }
  });
  const View<const T> G = widened<S, T>(dout, g_wide);

  if (!tokens_first)
    for_blocks<T>(s, D, [&](Scratch<T>&, Block x) {  // some rows of dS and S
      gemm(x.rows, D, N, Dq_t + x.row * N, N, G.data + x.image * N * G.ld, G.ld, dS + x.row * D, D);
      Rows<T>::transpose(x.rows, D, dS + x.row * D, D, nullptr, dS_t + x.image * D * D + x.first, D);
      Rows<T>::transpose(x.rows, D, A + x.row * D, D, nullptr, S_t + x.image * D * D + x.first, D);
    });

  for_blocks<T>(s, N, parts, [&](Scratch<T>& w, int64_t part, Block x) {
    const T *g = G.data + x.row * G.ld, *n = normalize ? Den + x.row : nullptr;
    if (tokens_first) {
      T* dA = w.other;
      gemm(x.rows, N, D, g, G.ld, V_t + x.image * D * N, N, dA, N);
      gemm(x.rows, D, N, dA, N, Dk + x.image * N * D, D, w.row, D);
      Rows<T>::transpose(x.rows, N, dA, N, n, dA_t + x.image * N * N + x.first, N);
      Rows<T>::transpose(x.rows, N, A + x.row * N, N, n, A_t + x.image * N * N + x.first, N);
    } else {
      gemm(x.rows, D, D, g, G.ld, S_t + x.image * D * D, D, w.row, D);
    }
    if (normalize)  // w.row = den dDq so far
      Rows<T>::denominator_backward(x.rows, D, Dq + x.row * D, K_sum + x.image * (D + 1), eps, w.row, Cs + x.index * (D + 1));
    side_backward(s, queries, router_grad, x, w, w.row, dz_queries, Sums<T>(s, sums_of_part + part * n_sums));
  });
  const Tensor c = sum_in_order<T>(cs);

  for_blocks<T>(s, N, parts, [&](Scratch<T>& w, int64_t part, Block x) {
    const View<T> to = target(dV + x.row * D, D, View<T>{w.other, D});
    if (tokens_first) {
      gemm(x.rows, D, N, dA_t + x.row * N, N, Dq + x.image * N * D, D, w.row, D);
      gemm(x.rows, D, N, A_t + x.row * N, N, G.data + x.image * N * G.ld, G.ld, to.data, to.ld);
    } else {
      const View<const T> rows = widen<S, T>(view<S>(v), x.row, x.rows, D, w.z[0]);
      gemm(x.rows, D, D, rows.data, rows.ld, dS_t + x.image * D * D, D, w.row, D);
      gemm(x.rows, D, D, Dk + x.row * D, D, dS + x.image * D * D, D, to.data, to.ld);
    }
    narrow(to, x.rows, D, dV + x.row * D);
    if (normalize) Rows<T>::sum_keys_backward(x.rows, D, Dk + x.row * D, c.const_data_ptr<T>() + x.image * (D + 1), w.row);
    side_backward(s, keys, router_grad, x, w, w.row, dz_keys, Sums<T>(s, sums_of_part + (parts + part) * n_sums));
  });

  const Tensor sum = sum_in_order<T>(sums);  // (2 sides, n_sums), laid out as Sums says
  const int64_t kernel = 2 * s.n_F * D, difference = 2 * s.n_D * D;
  const Tensor drouters = sum.narrow(1, 0, kernel).view({2, 2, s.n_F, D}).transpose(0, 1).reshape({4, s.n_F, D});
  const Tensor ddifference_routers = sum.narrow(1, kernel, difference).view({2, s.n_D, 2 * D});
  const Tensor dgamma = sum.narrow(1, kernel + difference, s.n_F).sum(0), dlam = sum.narrow(1, n_sums - s.n_D, s.n_D).sum(0);
  return {result[0], result[1], result[2], result[3], result[4], dgamma, dlam,
          drouters.mT().contiguous(), ddifference_routers.mT().contiguous()};
}

Forward attention_fwd(const Tensor& q, const Tensor& k, const Tensor& q_prime, const Tensor& k_prime, const Tensor& v,
                      const Tensor& gamma, const Tensor& lam, const Tensor& kernel_routers,
                      const Tensor& difference_routers, bool normalize, bool, double eps) {
  const Shape s = check(q, k, q_prime, k_prime, v, gamma, lam, kernel_routers, difference_routers);
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "dydilit::attention_fwd", [&] {
    using T = at::opmath_type<scalar_t>;
    return forward<scalar_t, T>(s, even_rows(q), even_rows(k), even_rows(q_prime), even_rows(k_prime), even_rows(v),
                                gamma.contiguous(), lam.contiguous(), kernel_routers.contiguous(),
                                difference_routers.contiguous(), normalize, T(eps));
  });
}

Backward attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& q_prime, const Tensor& k_prime,
                       const Tensor& v, const Tensor& gamma, const Tensor& lam, const Tensor& kernel_routers,
                       const Tensor& difference_routers, bool normalize, bool router_grad, double eps, const Tensor& dq,
                       const Tensor& dk, const Tensor& attn, const Tensor& kernel_logits,
                       const Tensor& difference_logits, const Tensor& k_sum, const Tensor& den) {
  const Shape s = check(q, k, q_prime, k_prime, v, gamma, lam, kernel_routers, difference_routers);
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "dydilit::attention_bwd", [&] {
    using T = at::opmath_type<scalar_t>;
    return backward<scalar_t, T>(s, even_rows(dout), even_rows(q), even_rows(k), even_rows(q_prime), even_rows(k_prime),
                                 even_rows(v), gamma.contiguous(), lam.contiguous(), kernel_routers.mT().contiguous(),
                                 difference_routers.mT().contiguous(), normalize, router_grad, T(eps), dq, dk, attn,
                                 kernel_logits, difference_logits, k_sum, den);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(dydilit, CPU, m) {
  m.impl("attention_fwd", &attention_fwd);
  m.impl("attention_bwd", &attention_bwd);
}

}  // namespace dydilit
