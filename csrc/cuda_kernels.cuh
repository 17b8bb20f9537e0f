// The row kernels of cuda_kernels.cu, as cuda_ops.cpp calls them. No torch headers: nvcc compiles
// the kernels beside any torch. All pointers are device pointers. Every call is asynchronous on
// `stream`, allocates nothing and reads nothing back. The names are those of cpu_kernels.h; dX is
// the gradient with respect to X; "+=" marks an output that is added to.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda_limits.h"

namespace dydilit::cuda {

constexpr int SPLIT = 64;  // a thread or block sums this many rows of one image, or sums of rows
constexpr int MAX_TOKENS = 65535 * SPLIT;  // of N: a grid has at most 65535 blocks in y
constexpr int TILE = 8;  // tokens of a block, and of a fragment of the tensor core
__host__ __device__ constexpr int tiles_of(int N) { return (N + TILE - 1) / TILE; }

// The type of Dq, Dk and the operands of the large products, for tokens of type T. bfloat16 stays
// bfloat16; float16 becomes float32, because the products leave float16's range.
template <class T>
struct Core {
  using type = float;
};
template <>
struct Core<__nv_bfloat16> {
  using type = __nv_bfloat16;
};

// The router products run on the tensor cores, in bfloat16. Each float32 operand is split into a
// sum of `parts` bfloat16 numbers: 2 parts keep 16 bits of it, 3 parts all 24 (csrc/README.md says
// what is left of them in a sum). A token of type T is exactly a sum of `token_parts`.
template <class T>
constexpr int parts = sizeof(T) == 2 ? 2 : 3;
template <class T>
constexpr int token_parts = 3;
template <>
constexpr int token_parts<__half> = 2;
template <>
constexpr int token_parts<__nv_bfloat16> = 1;

// The dlogits become operands of cuBLAS products: in bfloat16 each is the sum of two numbers
template <class S>
constexpr int dlogit_parts = sizeof(S) == 2 ? 2 : 1;

// n rounded up to a multiple of 16, the tensor core's tile
__host__ __device__ constexpr int padded(int n) { return (n + 15) / 16 * 16; }

// The tokens of a batch: rows of D elements, ld elements apart
template <class T>
struct Tokens {
  const T* data;
  int64_t ld;
};

template <class T>
struct Features {  // the arguments that `features` and `features_backward` share
  using S = typename Core<T>::type;
  int64_t rows;  // B N
  int N, D, n_F, n_D;
  bool vector;               // D % 8 == 0, and the address of every row is a multiple of 16
  bool router_grad;          // choices have gates; if false, pair and the dlogits are not written
  Tokens<T> z[4];            // Q, K, Q', K'
  const float *gamma, *lam;  // (n_F), (n_D)
  const uint4 *kernel_routers, *difference_routers;  // from split_routers: 4 (D, n_F), 4 (D, n_D)
};

int64_t fragments(int D, int n, int parts);  // the number of uint4 that split_routers writes

// Splits routers (4, D, n) into bfloat16 parts and puts them into the order in which a warp reads a
// fragment: for logits = z R, or, if `transposed`, for dz += dlogits R^T
void split_routers(const float* routers, int D, int n, int parts, bool transposed, uint4* fragments,
                   cudaStream_t stream);

// What `features` finds for Eq. 4 in Dq and Dk before they are rounded
struct Denominator {
  float* partial;      // side 1: the sums that sum_keys adds up; null if there is no denominator
  const float* k_sum;  // side 0: from sum_keys
  float eps;
  float* den;  // side 0: (rows), negative where Guard (phi.h) takes the floor; or null
};

// Eqs. 5 to 8 for side 0, which is Q and Q', or side 1, K and K': kernel_logits (4, rows, n_F),
// difference_logits (2, rows, n_D), d = z~ - lambda z~' (rows, D)
template <class T>
void features(const Features<T>& in, int side, float* kernel_logits, float* difference_logits,
              typename Core<T>::type* d, const Denominator& denominator, cudaStream_t stream);

// k_sum (B, D + 1) = sum_j Dk_j and, as its last element, sum_j |Dk_j|, from `partial`, which has
// sum_keys_partial floats
int64_t sum_keys_partial(int B, int N, int D);
void sum_keys(int B, int N, int D, float* partial, float* k_sum, cudaStream_t stream);

template <class T>
struct FeatureGradients {
  using S = typename Core<T>::type;
  const float *kernel_logits, *difference_logits;  // from the forward
  const S *ddq, *ddk;                              // (rows, D)
  T* dz[4];                                        // (rows, D)
  float* dchosen;         // (6, rows): dgamma of Q, K, Q', K'; dlambda of Q, K
  int* index;             // (6, rows): the index of this gamma or lambda
  S* pair;                // (2, rows, 2D): Q~ and Q~' side by side; K~ and K~'
  S* kernel_dlogits;      // (4, rows, dlogit_parts, padded(n_F))
  S* difference_dlogits;  // (2, rows, dlogit_parts, padded(n_D))
};
template <class T>
void features_backward(const Features<T>& in, const FeatureGradients<T>& grad, cudaStream_t stream);

// sums[j] = the sum of values[i] over all i < count with index[i] == j, for j < n. partial: scratch
// of bin_sums_partial(n) floats
int bin_sums_partial(int n);
void bin_sums(int64_t count, int n, const int* index, const float* values, float* partial,
              float* sums, cudaStream_t stream);

// The denominator of Eq. 4. S is float or __nv_bfloat16. Rows are contiguous; k_sum and c are
// (B, D + 1); partial is scratch of B * ceil(N / SPLIT) * (D + 1) floats.
template <class S>
struct Rows {
  // y = x / |den|
  static void divide(int B, int N, int D, const S* x, const float* den, S* y, cudaStream_t stream);
  // ddq: on entry the gradient that reaches Dq through the numerator, on exit the whole gradient.
  // c = the gradient of k_sum
  static void denominator_backward(int B, int N, int D, const S* dq, const float* k_sum,
                                   const float* den, S* ddq, float* partial, float* c,
                                   cudaStream_t stream);
  // ddk_j += c + c_norm Dk_j / |Dk_j|
  static void sum_keys_backward(int B, int N, int D, const S* dk, const float* c, S* ddk,
                                cudaStream_t stream);
};

}  // namespace dydilit::cuda
