// The operators on the CPU: memory, the matrix products, and the order of the calls. The
// mathematics of a row is in cpu_kernels.cpp, its derivation in csrc/README.md.
//
// Work is cut into blocks of BLOCK tokens of one image. A block is so small that its rows stay in
// the second-level cache from one step to the next. Neither the blocks nor the order in which sums
// over blocks are taken depends on the number of threads; so neither do the results.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include "cpu_kernels.h"
#include "gemm/cpu_gemm.h"
#include "ops.h"

namespace dydilit {
namespace {

// The rows of a tensor (B, N, D), ld elements apart
template <class S>
struct View {
  S* data;
  int64_t ld;
};

template <class S>
View<const S> view(const Tensor& x) {
  return {x.const_data_ptr<S>(), x.stride(1)};
}

// Rows `first`, first + 1, ... of x, to be prefetched; rows beyond the last do no harm
template <class S>
Ahead ahead(View<const S> x, int64_t first, int64_t D) {
  return {reinterpret_cast<const char*>(x.data + first * x.ld), x.ld * int64_t(sizeof(S)),
          D * int64_t(sizeof(S))};
}

// Rows first .. first + rows - 1 of x as T: x itself if S is T, else a copy in `scratch`, D apart
template <class S, class T>
View<const T> widen(View<const S> x, int64_t first, int64_t rows, int64_t D, T* scratch) {
  const S* from = x.data + first * x.ld;
  if constexpr (std::is_same_v<S, T>) return {from, x.ld};
  const auto bits = reinterpret_cast<const uint16_t*>(from);
  if constexpr (std::is_same_v<S, at::BFloat16>) widen_bfloat16(rows, D, bits, x.ld, scratch);
  if constexpr (std::is_same_v<S, at::Half>) widen_float16(rows, D, bits, x.ld, scratch);
  if constexpr (!std::is_same_v<S, T>) return {scratch, D};
}

// Where a block of a contiguous result of type S is computed as T: in the result if S is T, else in
// `scratch`, from which `narrow` converts it
template <class S, class T>
View<T> target(S* out, int64_t D, View<T> scratch) {
  if constexpr (std::is_same_v<S, T>) return {out, D};
  else return scratch;
}

template <class S, class T>
void narrow(View<T> x, int64_t rows, int64_t D, S* out) {
  if constexpr (std::is_same_v<S, at::BFloat16>)
    narrow_bfloat16(rows, D, x.data, x.ld, reinterpret_cast<uint16_t*>(out));
  if constexpr (std::is_same_v<S, at::Half>)
    narrow_float16(rows, D, x.data, x.ld, reinterpret_cast<uint16_t*>(out));
}

// `rows` rows of one image. The first of them is row `first` of the image and row `row` of the
// batch. `index` is the block's number in the batch, `slot` the image's number in its group.
struct Block {
  int64_t index, image, slot, first, row, rows;
};

int64_t blocks_per_image(int64_t N) { return (N + BLOCK - 1) / BLOCK; }

// What one thread needs for the block that it works on. The arrays are on the heap, because a
// thread's stack may be small.
template <class T>
struct Scratch {
  Tensor memory;
  T *pair, *dpair, *u, *l;      // (BLOCK, 2D): y and y' side by side; u and log2 t of both
  T* z[2];                      // (BLOCK, D): z and z', if the inputs have 16 bits
  T *row, *other;               // (BLOCK, D)
  T *gamma[2], *lam, *dchosen;  // (BLOCK): the gammas and the lambda of each token, their gradient
  T* dlogits;                   // (BLOCK, n_F or n_D)
  T* product;                   // the scratch of the matrix products
  PhiRow<T> stats[2][BLOCK];
  int32_t kernel_index[2][BLOCK], difference_index[BLOCK];

  explicit Scratch(const Shape& s) {
    const int64_t D = s.D, n = std::max(s.n_F, s.n_D);
    const std::pair<T**, int64_t> arrays[] = {
        {&pair, BLOCK * 2 * D}, {&dpair, BLOCK * 2 * D},
        {&u, BLOCK * 2 * D},    {&l, BLOCK * 2 * D},
        {&z[0], BLOCK * D},     {&z[1], BLOCK * D},
        {&row, BLOCK * D},      {&other, BLOCK * D},
        {&gamma[0], BLOCK},     {&gamma[1], BLOCK},
        {&lam, BLOCK},          {&dchosen, BLOCK},
        {&dlogits, BLOCK * n},  {&product, gemm<T>().scratch}};
    int64_t total = 0;
    for (const auto& [pointer, size] : arrays) total += size;
    memory = at::empty({total}, c10::CppTypeToScalarType<T>::value);
    T* next = memory.mutable_data_ptr<T>();
    for (const auto& [pointer, size] : arrays) {
      *pointer = next;
      next += size;
    }
  }
};

// Images first .. first + images - 1, which go through all steps together. A group is as small as
// keeps the threads busy, so that the results of one step are still in the cache for the next.
struct Group {
  int64_t first, images;
};

int64_t images_per_group(const Shape& s) {
  const int64_t per_image = std::max<int64_t>(1, blocks_per_image(s.N));
  return std::clamp<int64_t>((8 * at::get_num_threads() + per_image - 1) / per_image, 1,
                             std::max<int64_t>(1, s.B));
}

template <class F>
void for_groups(const Shape& s, F f) {
  const int64_t size = images_per_group(s);
  for (int64_t first = 0; first < s.B; first += size) f(Group{first, std::min(size, s.B - first)});
}

// Calls f(scratch, part, block) for every block of a group's images, N rows each. The blocks of the
// whole batch are divided into `parts`. Parts run in parallel; the blocks of a part run in order.
template <class T, class F>
void for_blocks(const Shape& s, Group g, int64_t N, int64_t parts, F f) {
  const int64_t per_image = blocks_per_image(N), total = s.B * per_image;
  const int64_t first_block = g.first * per_image, end_block = first_block + g.images * per_image;
  if (first_block == end_block) return;
  const auto part_of = [&](int64_t t) { return ((t + 1) * parts - 1) / total; };
  const auto run = [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(s);
    for (int64_t part = begin; part < end; part++) {
      const int64_t from = std::max(first_block, total * part / parts);
      const int64_t to = std::min(end_block, total * (part + 1) / parts);
      for (int64_t t = from; t < to; t++) {
        const int64_t image = t / per_image, first = t % per_image * BLOCK;
        f(scratch, part,
          Block{t, image, image - g.first, first, image * N + first, std::min(BLOCK, N - first)});
      }
    }
  };
  at::parallel_for(part_of(first_block), part_of(end_block - 1) + 1, 1, run);
}

template <class T, class F>
void for_blocks(const Shape& s, Group g, int64_t N, F f) {
  for_blocks<T>(s, g, N, s.B * blocks_per_image(N),
                [&](Scratch<T>& w, int64_t, Block x) { f(w, x); });
}

// One side of the attention: Q and Q' (side 0), or K and K' (side 1). Element 0 of each array is
// for Q or K, element 1 for Q' or K'.
template <class S, class T, class Logits>
struct Side {
  View<const S> z[2];          // (B N, D)
  const T *gamma, *lam;        // (n_F), (n_D)
  const T* router[2];          // R_F^T (n_F, D)
  const T* difference_router;  // R_D^T (n_D, 2D)
  Logits* logits[2];           // (B N, n_F)
  Logits* difference_logits;   // (B N, n_D)

  Side(int side, const Shape& s, const Tensor& z, const Tensor& z_prime, const Tensor& gamma,
       const Tensor& lam, const Tensor& routers, const Tensor& difference_routers,
       const Tensor& logits, const Tensor& difference_logits)
      : z{view<S>(z), view<S>(z_prime)},
        gamma(gamma.const_data_ptr<T>()),
        lam(lam.const_data_ptr<T>()) {
    for (int prime : {0, 1}) {
      const int i = 2 * prime + side;  // the order Q, K, Q', K'
      router[prime] = routers.const_data_ptr<T>() + i * s.D * s.n_F;
      this->logits[prime] = logits.data_ptr<T>() + i * s.B * s.N * s.n_F;
    }
    difference_router = difference_routers.const_data_ptr<T>() + side * 2 * s.D * s.n_D;
    this->difference_logits = difference_logits.data_ptr<T>() + side * s.B * s.N * s.n_D;
  }
};

// d (rows, D) = the differenced tokens of a block (Eqs. 5 to 8). `next` are the rows that the
// caller reads afterwards.
template <class S, class T>
void side_forward(const Shape& s, const Side<S, T, T>& side, bool router_grad, Block x,
                  Scratch<T>& w, T* d, Ahead next) {
  for (int prime : {0, 1}) {
    const auto z = widen<S, T>(side.z[prime], x.row, x.rows, s.D, w.z[prime]);
    T* logits = side.logits[prime] + x.row * s.n_F;
    // logits = z R_F; gamma = that of the arg max (Eq. 6); y = phi(z; gamma) (Eq. 5)
    gemm<T>().dots(x.rows, s.n_F, s.D, z.data, z.ld, side.router[prime], s.D, logits, s.n_F);
    Rows<T>::choose(x.rows, s.n_F, logits, side.gamma, router_grad, w.kernel_index[prime],
                    w.gamma[prime]);
    Rows<T>::phi(x.rows, s.D, z.data, z.ld, w.gamma[prime], w.pair + prime * s.D, 2 * s.D, w.u, w.l,
                 0, w.stats[prime], prime ? next : ahead(side.z[1], x.row, s.D));
  }
  // logits = (y, y') R_D; lambda = that of the arg max (Eq. 7); d = y - lambda y' (Eq. 8)
  T* logits = side.difference_logits + x.row * s.n_D;
  gemm<T>().dots(x.rows, s.n_D, 2 * s.D, w.pair, 2 * s.D, side.difference_router, 2 * s.D, logits,
                 s.n_D);
  Rows<T>::choose(x.rows, s.n_D, logits, side.lam, router_grad, w.difference_index, w.lam);
  Rows<T>::difference(x.rows, s.D, w.pair, w.lam, d);
}

// The gradients of one side that are sums over tokens: dR_F^T (n_F, D) of both routers,
// dR_D^T (n_D, 2D), dgamma (n_F), dlambda (n_D), one after the other in `memory`
template <class T>
struct Sums {
  T *drouter[2], *ddifference_router, *dgamma, *dlam;
  static int64_t size(const Shape& s) { return 2 * s.n_F * s.D + 2 * s.n_D * s.D + s.n_F + s.n_D; }
  Sums(const Shape& s, T* memory)
      : drouter{memory, memory + s.n_F * s.D},
        ddifference_router(drouter[1] + s.n_F * s.D),
        dgamma(ddifference_router + 2 * s.n_D * s.D),
        dlam(dgamma + s.n_F) {}
};

// From dd, the gradient of the differenced tokens of a block: dz, the rows of two results; sums +=
template <class S, class T>
void side_backward(const Shape& s, const Side<S, T, const T>& side, bool router_grad, Block x,
                   Scratch<T>& w, const T* dd, S* const dz[2], Sums<T> sums) {
  View<const T> z[2];
  for (int prime : {0, 1}) {  // y and y' again: cheaper than to keep them
    z[prime] = widen<S, T>(side.z[prime], x.row, x.rows, s.D, w.z[prime]);
    Rows<T>::choose(x.rows, s.n_F, side.logits[prime] + x.row * s.n_F, side.gamma, router_grad,
                    w.kernel_index[prime], w.gamma[prime]);
    Rows<T>::phi(x.rows, s.D, z[prime].data, z[prime].ld, w.gamma[prime], w.pair + prime * s.D,
                 2 * s.D, w.u + prime * s.D, w.l + prime * s.D, 2 * s.D, w.stats[prime]);
  }
  const T* logits = side.difference_logits + x.row * s.n_D;
  Rows<T>::choose(x.rows, s.n_D, logits, side.lam, router_grad, w.difference_index, w.lam);
  // Eq. 8: (dy, dy') = (dd, -lambda dd), dlambda; Eq. 7: dlambda -> dlogits
  Rows<T>::difference_backward(x.rows, s.D, w.pair, w.lam, dd, w.dpair, w.dchosen);
  Rows<T>::choose_backward(x.rows, s.n_D, logits, side.lam, router_grad, w.difference_index,
                           w.dchosen, sums.dlam, w.dlogits);
  if (router_grad) {  // dR_D^T += dlogits^T (y, y'), (dy, dy') += dlogits R_D^T
    const int64_t n = s.n_D, D2 = 2 * s.D;
    gemm<T>().add_product(n, D2, x.rows, w.dlogits, 1, n, w.pair, D2, sums.ddifference_router, D2,
                          w.product);
    gemm<T>().add_product(x.rows, D2, n, w.dlogits, n, 1, side.difference_router, D2, w.dpair, D2,
                          w.product);
  }
  for (int prime : {0, 1}) {
    T* dy = w.dpair + prime * s.D;
    S* out = dz[prime] + x.row * s.D;
    const View<T> to = target(out, s.D, View<T>{dy, 2 * s.D});
    // Eq. 5: dy -> dz, dgamma; Eq. 6: dgamma -> dlogits
    Rows<T>::phi_backward(x.rows, s.D, z[prime].data, z[prime].ld, w.gamma[prime], w.stats[prime],
                          w.u + prime * s.D, w.l + prime * s.D, dy, 2 * s.D, to.data, to.ld,
                          w.dchosen);
    Rows<T>::choose_backward(x.rows, s.n_F, side.logits[prime] + x.row * s.n_F, side.gamma,
                             router_grad, w.kernel_index[prime], w.dchosen, sums.dgamma,
                             w.dlogits);
    if (router_grad) {  // dR_F^T += dlogits^T z, dz += dlogits R_F^T
      const int64_t n = s.n_F;
      gemm<T>().add_product(n, s.D, x.rows, w.dlogits, 1, n, z[prime].data, z[prime].ld,
                            sums.drouter[prime], s.D, w.product);
      gemm<T>().add_product(x.rows, s.D, n, w.dlogits, n, 1, side.router[prime], s.D, to.data,
                            to.ld, w.product);
    }
    narrow(to, x.rows, s.D, out);
  }
}

// y (B, width) += the sum of x (B, n, width) over n, in order, for the images of a group
template <class T>
void sum_in_order(const Tensor& x, Group g, const Tensor& y) {
  const int64_t n = x.size(1), width = x.size(2);
  if (x.numel() == 0) return;
  for (int64_t i = g.first; i < g.first + g.images; i++)
    for (int64_t j = 0; j < n; j++)
      Rows<T>::add(width, x.const_data_ptr<T>() + (i * n + j) * width,
                   y.mutable_data_ptr<T>() + i * width);
}

// The right-hand side of a product: a packed matrix (K, N) for each image of a group
template <class T>
struct Packed {
  const Gemm<T>& g = gemm<T>();
  int64_t K, N;
  Tensor memory;

  Packed(bool needed, const Shape& s, int64_t K, int64_t N)
      : K(K),
        N(N),
        memory(at::empty({needed ? images_per_group(s) : 0, g.packed(K, N)},
                         c10::CppTypeToScalarType<T>::value)) {}
  T* of(int64_t slot) const { return memory.mutable_data_ptr<T>() + slot * g.packed(K, N); }

  // Rows k, k + 1, ... of the matrix = x (rows, N); or columns n, n + 1, ... = x^T, x (rows, K)
  void put_rows(int64_t slot, int64_t k, int64_t rows, const T* x, int64_t ld) const {
    g.pack(rows, N, x, ld, 1, of(slot) + g.offset(K, k, 0), K);
  }
  void put_columns(int64_t slot, int64_t n, int64_t rows, const T* x, int64_t ld) const {
    g.pack(K, rows, x, 1, ld, of(slot) + g.offset(K, 0, n), K);
  }
  // C (M, N) = A (M, K) times the matrix
  void multiply(int64_t slot, int64_t M, const T* A, int64_t lda, T* C, int64_t ldc,
                const Scratch<T>& w) const {
    g.multiply(M, N, K, A, lda, 1, of(slot), C, ldc, false, w.product);
  }
  // C (M, N) = A^T (M, K) times the matrix; A (K, M or more)
  void multiply_transposed(int64_t slot, int64_t M, const T* A, int64_t lda, T* C, int64_t ldc,
                           const Scratch<T>& w) const {
    g.multiply(M, N, K, A, 1, lda, of(slot), C, ldc, false, w.product);
  }
};

// Without `keep` only `out` is complete: where a block of dq, dk or attn is needed once, it exists
// only until then, in the cache.
template <class S, class T>
Forward forward(bool keep, const Shape& s, const Tensor& q, const Tensor& k, const Tensor& q_prime,
                const Tensor& k_prime, const Tensor& v, const Tensor& gamma, const Tensor& lam,
                const Tensor& kernel_routers_t, const Tensor& difference_routers_t, bool normalize,
                bool router_grad, T eps) {
  const int64_t B = s.B, N = s.N, D = s.D, width = s.tokens_first ? N : D,
                per_image = blocks_per_image(N);
  const auto wide = q.options().dtype(c10::CppTypeToScalarType<T>::value);
  const bool keep_dk = keep || !s.tokens_first, keep_attn = keep || !s.tokens_first;
  const Tensor out = at::empty({B, N, D}, q.options()), dq = at::empty({keep ? B : 0, N, D}, wide),
               dk = at::empty({keep_dk ? B : 0, N, D}, wide),
               attn = at::empty({keep_attn ? B : 0, width, width}, wide),
               kernel_logits = at::empty({4, B, N, s.n_F}, wide),
               difference_logits = at::empty({2, B, N, s.n_D}, wide),
               den = at::empty({normalize ? B : 0, N}, wide),
               k_sums = at::empty({normalize ? B : 0, per_image, D + 1}, wide),
               k_sum = at::zeros({normalize ? B : 0, D + 1}, wide);
  const Packed<T> V(true, s, N, D), Dk_t(s.tokens_first, s, D, N), state(!s.tokens_first, s, D, D);
  const Side<S, T, T> queries(0, s, q, q_prime, gamma, lam, kernel_routers_t, difference_routers_t,
                              kernel_logits, difference_logits);
  const Side<S, T, T> keys(1, s, k, k_prime, gamma, lam, kernel_routers_t, difference_routers_t,
                           kernel_logits, difference_logits);
  T *Dq = dq.mutable_data_ptr<T>(), *Dk = dk.mutable_data_ptr<T>(), *A = attn.mutable_data_ptr<T>();

  for_groups(s, [&](Group g) {
    // Keys: Dk (Eqs. 5 to 8), its sums (Eq. 4); V packed
    for_blocks<T>(s, g, N, [&](Scratch<T>& w, Block x) {
      T* d = keep_dk ? Dk + x.row * D : w.dpair;
      side_forward(s, keys, router_grad, x, w, d, ahead(view<S>(v), x.row, D));
      if (s.tokens_first) Dk_t.put_columns(x.slot, x.first, x.rows, d, D);
      if (normalize)
        Rows<T>::sum_keys(x.rows, D, d, k_sums.mutable_data_ptr<T>() + x.index * (D + 1));
      const View<const T> rows = widen<S, T>(view<S>(v), x.row, x.rows, D, w.row);
      V.put_rows(x.slot, x.first, x.rows, rows.data, rows.ld);
    });
    sum_in_order<T>(k_sums, g, k_sum);

    if (!s.tokens_first)
      for_blocks<T>(s, g, D, [&](Scratch<T>& w, Block x) {  // rows of S = Dk^T V (Eq. 8)
        V.multiply_transposed(x.slot, x.rows, Dk + x.image * N * D + x.first, D, A + x.row * D, D,
                              w);
        state.put_rows(x.slot, x.first, x.rows, A + x.row * D, D);
      });

    // Queries: Dq, and with it the rows of the output
    for_blocks<T>(s, g, N, [&](Scratch<T>& w, Block x) {
      T *d = keep ? Dq + x.row * D : w.dpair, *a = keep_attn ? A + x.row * N : w.other;
      S* o = out.mutable_data_ptr<S>() + x.row * D;
      const View<T> num = target(o, D, View<T>{w.row, D});
      side_forward(s, queries, router_grad, x, w, d, ahead(queries.z[0], x.row + x.rows, D));
      if (s.tokens_first) {  // A = Dq Dk^T, num = A V (Eq. 8)
        Dk_t.multiply(x.slot, x.rows, d, D, a, N, w);
        V.multiply(x.slot, x.rows, a, N, num.data, D, w);
      } else {  // num = Dq S (Eq. 8)
        state.multiply(x.slot, x.rows, d, D, num.data, D, w);
      }
      if (normalize) {  // out = num / den (Eq. 4)
        T* n = den.mutable_data_ptr<T>() + x.row;
        Rows<T>::denominator(x.rows, D, d, k_sum.const_data_ptr<T>() + x.image * (D + 1), eps, n);
        Rows<T>::divide(x.rows, D, num.data, D, n, num.data, D);
      }
      narrow(num, x.rows, D, o);
    });
  });
  return {out, dq, dk, attn, kernel_logits, difference_logits, k_sum, den};
}

template <class S, class T>
Backward backward(const Shape& s, const Tensor& dout, const Tensor& q, const Tensor& k,
                  const Tensor& q_prime, const Tensor& k_prime, const Tensor& v,
                  const Tensor& gamma, const Tensor& lam, const Tensor& kernel_routers_t,
                  const Tensor& difference_routers_t, bool normalize, bool router_grad, T eps,
                  const Tensor& dq, const Tensor& dk, const Tensor& attn,
                  const Tensor& kernel_logits, const Tensor& difference_logits, const Tensor& k_sum,
                  const Tensor& den) {
  const int64_t B = s.B, N = s.N, D = s.D, total = B * blocks_per_image(N),
                n_sums = Sums<T>::size(s);
  // Sums over tokens: one for each part of the blocks, then the sum of the parts
  const int64_t parts = std::min(total, std::max<int64_t>(16, total / 4));
  const bool tokens_first = s.tokens_first;
  const auto wide = dq.options();

  // With G = dout / den, row by row:
  //   A = Dq Dk^T, num = A V:  dA = G V^T   dDq = dA Dk   dDk = dA^T Dq   dV = A^T G
  //   S = Dk^T V, num = Dq S:  dS = Dq^T G  dDq = G S^T   dDk = V dS^T    dV = Dk dS
  const Packed<T> G(true, s, N, D), V_t(tokens_first, s, D, N), Dk_packed(tokens_first, s, N, D),
      Dq_packed(tokens_first, s, N, D), S_t(!tokens_first, s, D, D), dS(!tokens_first, s, D, D),
      dS_t(!tokens_first, s, D, D);
  const Tensor da = at::empty({tokens_first ? images_per_group(s) : 0, N, N}, wide),
               cs = at::zeros({normalize ? B : 0, blocks_per_image(N), D + 1}, wide),
               c = at::zeros({normalize ? B : 0, D + 1}, wide),
               sums = at::zeros({2, parts, n_sums}, wide);
  const T *Dq = dq.const_data_ptr<T>(), *Dk = dk.const_data_ptr<T>(), *A = attn.const_data_ptr<T>(),
          *K_sum = k_sum.const_data_ptr<T>(), *Den = den.const_data_ptr<T>();
  T *dA = da.mutable_data_ptr<T>(), *Cs = cs.mutable_data_ptr<T>(),
    *sums_of_part = sums.mutable_data_ptr<T>();
  Tensor result[5];  // the gradients of q, k, q_prime, k_prime, v
  for (Tensor& x : result) x = at::empty({B, N, D}, q.options());
  const auto out = [&](int i) { return result[i].mutable_data_ptr<S>(); };
  S *const dz_queries[] = {out(0), out(2)}, *const dz_keys[] = {out(1), out(3)}, *const dV = out(4);

  const Side<S, T, const T> queries(0, s, q, q_prime, gamma, lam, kernel_routers_t,
                                    difference_routers_t, kernel_logits, difference_logits);
  const Side<S, T, const T> keys(1, s, k, k_prime, gamma, lam, kernel_routers_t,
                                 difference_routers_t, kernel_logits, difference_logits);

  const auto g_rows = [&](Block x, Scratch<T>& w) {  // w.other = rows of G
    const View<const T> rows = widen<S, T>(view<S>(dout), x.row, x.rows, D, w.other);
    Rows<T>::divide(x.rows, D, rows.data, rows.ld, normalize ? Den + x.row : nullptr, w.other, D);
    return w.other;
  };

  for_groups(s, [&](Group g) {
    // The right-hand sides of the products, packed
    for_blocks<T>(s, g, N, [&](Scratch<T>& w, Block x) {
      G.put_rows(x.slot, x.first, x.rows, g_rows(x, w), D);
      if (!tokens_first) return;
      const View<const T> rows = widen<S, T>(view<S>(v), x.row, x.rows, D, w.row);
      V_t.put_columns(x.slot, x.first, x.rows, rows.data, rows.ld);
      Dk_packed.put_rows(x.slot, x.first, x.rows, Dk + x.row * D, D);
      Dq_packed.put_rows(x.slot, x.first, x.rows, Dq + x.row * D, D);
    });

    if (!tokens_first)
      for_blocks<T>(s, g, D, [&](Scratch<T>& w, Block x) {  // rows of dS = Dq^T G, and of S
        T* rows = w.row;
        G.multiply_transposed(x.slot, x.rows, Dq + x.image * N * D + x.first, D, rows, D, w);
        dS.put_rows(x.slot, x.first, x.rows, rows, D);
        dS_t.put_columns(x.slot, x.first, x.rows, rows, D);
        S_t.put_columns(x.slot, x.first, x.rows, A + x.row * D, D);
      });

    // Queries: dDq, and with it dQ, dQ' and the sums
    for_blocks<T>(s, g, N, parts, [&](Scratch<T>& w, int64_t part, Block x) {
      const T* rows = g_rows(x, w);
      if (tokens_first) {  // dA = G V^T, dDq = dA Dk
        V_t.multiply(x.slot, x.rows, rows, D, dA + (x.slot * N + x.first) * N, N, w);
        Dk_packed.multiply(x.slot, x.rows, dA + (x.slot * N + x.first) * N, N, w.row, D, w);
      } else {  // dDq = G S^T
        S_t.multiply(x.slot, x.rows, rows, D, w.row, D, w);
      }
      if (normalize)
        Rows<T>::denominator_backward(x.rows, D, Dq + x.row * D, K_sum + x.image * (D + 1), eps,
                                      w.row, Cs + x.index * (D + 1));
      side_backward(s, queries, router_grad, x, w, w.row, dz_queries,
                    Sums<T>(s, sums_of_part + part * n_sums));
    });
    sum_in_order<T>(cs, g, c);

    // Keys, after the queries, whose sum c reaches every key: dDk, dK, dK', dV and the sums
    for_blocks<T>(s, g, N, parts, [&](Scratch<T>& w, int64_t part, Block x) {
      const View<T> to = target(dV + x.row * D, D, View<T>{w.other, D});
      if (tokens_first) {  // dDk = dA^T Dq, dV = A^T G
        Dq_packed.multiply_transposed(x.slot, x.rows, dA + x.slot * N * N + x.first, N, w.row, D,
                                      w);
        G.multiply_transposed(x.slot, x.rows, A + x.image * N * N + x.first, N, to.data, to.ld, w);
      } else {  // dDk = V dS^T, dV = Dk dS
        const View<const T> rows = widen<S, T>(view<S>(v), x.row, x.rows, D, w.z[0]);
        dS_t.multiply(x.slot, x.rows, rows.data, rows.ld, w.row, D, w);
        dS.multiply(x.slot, x.rows, Dk + x.row * D, D, to.data, to.ld, w);
      }
      narrow(to, x.rows, D, dV + x.row * D);
      if (normalize)
        Rows<T>::sum_keys_backward(x.rows, D, Dk + x.row * D,
                                   c.const_data_ptr<T>() + x.image * (D + 1), w.row);
      side_backward(s, keys, router_grad, x, w, w.row, dz_keys,
                    Sums<T>(s, sums_of_part + (parts + part) * n_sums));
    });
  });

  const Tensor sum = at::zeros({2, n_sums}, wide);  // of each side, in the order of Sums
  sum_in_order<T>(sums, {0, 2}, sum);
  const int64_t kernel = 2 * s.n_F * D, difference = 2 * s.n_D * D;
  const Tensor drouters =
      sum.narrow(1, 0, kernel).view({2, 2, s.n_F, D}).transpose(0, 1).reshape({4, s.n_F, D});
  const Tensor ddifference_routers = sum.narrow(1, kernel, difference).view({2, s.n_D, 2 * D});
  const Tensor dgamma = sum.narrow(1, kernel + difference, s.n_F).sum(0),
               dlam = sum.narrow(1, n_sums - s.n_D, s.n_D).sum(0);
  return {result[0],
          result[1],
          result[2],
          result[3],
          result[4],
          dgamma,
          dlam,
          drouters.mT().contiguous(),
          ddifference_routers.mT().contiguous()};
}

Forward run_forward(bool keep, const Tensor& q, const Tensor& k, const Tensor& q_prime,
                    const Tensor& k_prime, const Tensor& v, const Tensor& gamma, const Tensor& lam,
                    const Tensor& kernel_routers, const Tensor& difference_routers, bool normalize,
                    bool router_grad, double eps) {
  const Shape s = check(q, k, q_prime, k_prime, v, gamma, lam, kernel_routers, difference_routers);
  return AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, q.scalar_type(), "dydilit::attention", [&] {
        using T = at::opmath_type<scalar_t>;
        return forward<scalar_t, T>(keep, s, even_rows(q), even_rows(k), even_rows(q_prime),
                                    even_rows(k_prime), even_rows(v), gamma.contiguous(),
                                    lam.contiguous(), kernel_routers.mT().contiguous(),
                                    difference_routers.mT().contiguous(), normalize, router_grad,
                                    T(eps));
      });
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& q_prime, const Tensor& k_prime,
                 const Tensor& v, const Tensor& gamma, const Tensor& lam,
                 const Tensor& kernel_routers, const Tensor& difference_routers, bool normalize,
                 bool router_grad, double eps) {
  return std::get<0>(run_forward(false, q, k, q_prime, k_prime, v, gamma, lam, kernel_routers,
                                 difference_routers, normalize, router_grad, eps));
}

Forward attention_fwd(const Tensor& q, const Tensor& k, const Tensor& q_prime,
                      const Tensor& k_prime, const Tensor& v, const Tensor& gamma,
                      const Tensor& lam, const Tensor& kernel_routers,
                      const Tensor& difference_routers, bool normalize, bool router_grad,
                      double eps) {
  return run_forward(true, q, k, q_prime, k_prime, v, gamma, lam, kernel_routers,
                     difference_routers, normalize, router_grad, eps);
}

Backward attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& q_prime,
                       const Tensor& k_prime, const Tensor& v, const Tensor& gamma,
                       const Tensor& lam, const Tensor& kernel_routers,
                       const Tensor& difference_routers, bool normalize, bool router_grad,
                       double eps, const Tensor& dq, const Tensor& dk, const Tensor& attn,
                       const Tensor& kernel_logits, const Tensor& difference_logits,
                       const Tensor& k_sum, const Tensor& den) {
  const Shape s = check(q, k, q_prime, k_prime, v, gamma, lam, kernel_routers, difference_routers);
  check_kept(s, normalize, at::toOpMathType(q.scalar_type()), q, dout, dq, dk, attn, kernel_logits,
             difference_logits, k_sum, den);
  return AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, q.scalar_type(), "dydilit::attention_bwd", [&] {
        using T = at::opmath_type<scalar_t>;
        return backward<scalar_t, T>(
            s, even_rows(dout), even_rows(q), even_rows(k), even_rows(q_prime), even_rows(k_prime),
            even_rows(v), gamma.contiguous(), lam.contiguous(), kernel_routers.mT().contiguous(),
            difference_routers.mT().contiguous(), normalize, router_grad, T(eps), dq.contiguous(),
            dk.contiguous(), attn.contiguous(), kernel_logits.contiguous(),
            difference_logits.contiguous(), k_sum.contiguous(), den.contiguous());
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(dydilit, CPU, m) {
  m.impl("attention", &attention);
  m.impl("attention_fwd", &attention_fwd);
  m.impl("attention_bwd", &attention_bwd);
}

}  // namespace dydilit
