// You may skip this folder: it multiplies matrices, as at::bmm does, and makes the op about a tenth
// faster than at::bmm does (both times: csrc/README.md, "The products on the CPU").
//
// One core, no torch headers; T is float or double. All matrices are row-major unless strides say
// otherwise. The products of the op are small and many, their operands are often transposed, and
// half of the products have n_F or n_D columns. Here a transposed operand costs one copy.
#pragma once
#include <cstdint>

namespace dydilit {

constexpr int64_t BLOCK = 64;  // the largest M of `multiply`

template <class T>
struct Gemm {
  // A packed matrix B (K, N) is cut into panels of `panel` columns; the rows of a panel follow each
  // other, and zeros fill up the last panel.
  int64_t panel;    // divides BLOCK
  int64_t scratch;  // the size, in numbers, of the argument `scratch` below

  // The size of a packed matrix (K, N), in numbers
  int64_t packed(int64_t K, int64_t N) const { return (N + panel - 1) / panel * panel * K; }
  // The place of row k, column n in a packed matrix of K rows; n is a multiple of `panel`
  int64_t offset(int64_t K, int64_t k, int64_t n) const { return n * K + k * panel; }

  // P = K rows and N columns of B (strides sk, sn); P lies in a packed matrix of K_all rows
  void (*pack)(int64_t K, int64_t N, const T* B, int64_t sk, int64_t sn, T* P, int64_t K_all);

  // C (M, N) = A B, or C += A B if `accumulate`; A (M, K) has strides sm and sk, B is packed in P,
  // M <= BLOCK
  void (*multiply)(int64_t M, int64_t N, int64_t K, const T* A, int64_t sm, int64_t sk, const T* P,
                   T* C, int64_t ldc, bool accumulate, T* scratch);

  // C (M, N) += A B; A (M, K) has strides sm and sk, B (K, N) is not packed: for an M or a K so
  // small that packing B costs more than it saves
  void (*add_product)(int64_t M, int64_t N, int64_t K, const T* A, int64_t sm, int64_t sk,
                      const T* B, int64_t ldb, T* C, int64_t ldc, T* scratch);

  // C (M, N) = A B^T; A (M, K), B (N, K): the inner products of rows, for a small N
  void (*dots)(int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb,
               T* C, int64_t ldc);
};

template <class T>
const Gemm<T>& gemm();  // compiled for the instruction set of this machine

}  // namespace dydilit
