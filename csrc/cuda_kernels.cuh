// What the row kernels of cuda_kernels.cu offer to the binding; free of torch headers, so that nvcc compiles them next
// to any torch. Pointers are device pointers, every call is asynchronous on `stream`, nothing is allocated or read
// back. The names are those of cpu_kernels.h; dX is the gradient with respect to X, "+=" marks accumulation.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace dydilit::cuda {

constexpr int MAX_WIDTH = 1536;   // D: a row lies in the registers of one thread block
constexpr int MAX_CHOICES = 256;  // n_F, n_D: their logits lie in its shared memory
constexpr int SPLIT = 64;         // rows of one image that a block sums before the sums of blocks are added

// Dq, Dk and the operands of the large products: bfloat16 stays bfloat16; float16, whose range they leave, becomes
// float32
template <class T> struct Core { using type = float; };
template <> struct Core<__nv_bfloat16> { using type = __nv_bfloat16; };

// Router products run on the tensor cores in bfloat16, with each float32 operand as a sum of `parts` bfloat16 numbers:
// 2 parts keep 16 bits, 3 all 24. A token as it comes is exact in `token_parts` of them.
template <class T> constexpr int parts = sizeof(T) == 2 ? 2 : 3;
template <class T> constexpr int token_parts = 3;
template <> constexpr int token_parts<__half> = 2;
template <> constexpr int token_parts<__nv_bfloat16> = 1;

// dlogits leave the kernel as operands of products with Core rows: in bfloat16 as the sum of two numbers
template <class S> constexpr int dlogit_parts = sizeof(S) == 2 ? 2 : 1;

// A router's columns, in multiples of the tensor core's tile
__host__ __device__ constexpr int padded(int n) { return (n + 15) / 16 * 16; }

// Rows of D elements, ld apart, one for every token of the batch
template <class T>
struct Tokens {
  const T* data;
  int64_t ld;
};

template <class T>
struct Features {  // what forward and backward of the rows both take
  using S = typename Core<T>::type;
  int64_t rows;  // B N
  int D, n_F, n_D;
  bool vector;        // every row starts at a multiple of 16 bytes and D % 8 == 0
  Tokens<T> z[4];     // Q, K, Q', K'
  const float *gamma, *lam;                           // (n_F), (n_D)
  const uint4 *kernel_routers, *difference_routers;   // as split_routers left them: 4 x (D, n_F), 2 x 2 x (D, n_D)
};

int64_t fragments(int D, int n, int parts);  // uint4 elements that split_routers writes

// routers (4, D, n) as bfloat16 parts in the order in which a warp reads them as a matrix fragment, for the product
// with rows of D (logits = z R), or, `transposed`, with rows of n (dz += dlogits R^T)
void split_routers(const float* routers, int D, int n, int parts, bool transposed, uint4* fragments,
                   cudaStream_t stream);

// Eqs. 5 to 8: kernel_logits (4, rows, n_F), difference_logits (2, rows, n_D), dq = Q~ - lambda Q~', dk likewise (rows,
// D)
template <class T>
void features(const Features<T>& in, float* kernel_logits, float* difference_logits, typename Core<T>::type* dq,
              typename Core<T>::type* dk, cudaStream_t stream);

template <class T>
struct FeatureGradients {
  using S = typename Core<T>::type;
  const float *kernel_logits, *difference_logits;  // from the forward
  const S *ddq, *ddk;                              // (rows, D)
  bool router_grad;                                // else pair and the dlogits are not touched
  T* dz[4];                                        // (rows, D)
  float* dchosen;                                  // (6, rows): dgamma for Q, K, Q', K', dlambda for Q, K
  int* index;                                      // (6, rows): which gamma, which lambda
  S* pair;                                         // (2, rows, 2D): Q~ and Q~' side by side; K~ and K~'
  S *kernel_dlogits, *difference_dlogits;          // (4, rows, dlogit_parts, padded(n_F)); (2, ..., padded(n_D))
};
template <class T>
void features_backward(const Features<T>& in, const FeatureGradients<T>& grad, cudaStream_t stream);

// sums (n) = the sum of `values` (count) of each index; partial: `bin_sums_partial(n)` floats of scratch
int bin_sums_partial(int n);
void bin_sums(int64_t count, int n, const int* index, const float* values, float* partial, float* sums,
              cudaStream_t stream);

// The guarded denominator. S is float or __nv_bfloat16; rows are contiguous; `partial` is scratch of
// B * ceil(N / SPLIT) * (D + 1) floats; k_sum and c are (B, D + 1).
template <class S>
struct Rows {
  // k_sum = sum_j Dk_j, followed by sum_j |Dk_j|
  static void sum_keys(int B, int N, int D, const S* dk, float* partial, float* k_sum, cudaStream_t stream);
  // ddk_j += c + c_norm Dk_j / |Dk_j|
  static void sum_keys_backward(int B, int N, int D, const S* dk, const float* c, S* ddk, cudaStream_t stream);
  // den (B, N); out /= den
  static void denominator(int B, int N, int D, const S* dq, const float* k_sum, float eps, float* den, S* out,
                          cudaStream_t stream);
  // y = x / den
  static void divide(int B, int N, int D, const S* x, const float* den, S* y, cudaStream_t stream);
  // ddq: on entry the gradient that reaches Dq through the numerator; on exit all of it. c = what reaches k_sum
  static void denominator_backward(int B, int N, int D, const S* dq, const float* k_sum, float eps, S* ddq,
                                   float* partial, float* c, cudaStream_t stream);
};

}  // namespace dydilit::cuda
