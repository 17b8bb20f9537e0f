// Matrix products for one core; free of torch headers. T is float or double; all matrices are row-major unless strides
// say otherwise. Why not a library's: these products are small and many, their operands are transposed as often as not,
// and half of them have 9 or 21 columns. Here a transposed operand costs one copy, and MKL is slow on other makers' cores.
#pragma once
#include <cstdint>

namespace dydilit {

constexpr int64_t BLOCK = 64;  // the most rows of C in one call

template <class T>
struct Gemm {
  // B (K, N) packed: panels of a few columns, each row after row, the last one padded with zeros.
  int64_t panel;  // columns of a panel; divides BLOCK
  int64_t packed(int64_t K, int64_t N) const { return (N + panel - 1) / panel * panel * K; }  // numbers that it takes
  // where row k, column n of it begins; n is a multiple of the panel
  int64_t offset(int64_t K, int64_t k, int64_t n) const { return n * K + k * panel; }

  // Part of a packed matrix with K_all rows: K rows and N columns of it, from B with strides sk and sn, to P
  void (*pack)(int64_t K, int64_t N, const T* B, int64_t sk, int64_t sn, T* P, int64_t K_all);
  // C (M, N) = A B, or += where `accumulate`; A (M, K) with strides sm and sk, B packed, M <= BLOCK
  void (*multiply)(int64_t M, int64_t N, int64_t K, const T* A, int64_t sm, int64_t sk, const T* P, T* C, int64_t ldc,
                   bool accumulate);
  // C (M, N) += A B; A (M, K) with strides sm and sk, B (K, N) as it is: for a small M or K, where packing does not pay
  void (*add_product)(int64_t M, int64_t N, int64_t K, const T* A, int64_t sm, int64_t sk, const T* B, int64_t ldb, T* C,
                      int64_t ldc);
  // C (M, N) = A B^T; A (M, K), B (N, K): rows of A by rows of B, for a small N
  void (*dots)(int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, T* C, int64_t ldc);
};

template <class T>
const Gemm<T>& gemm();  // compiled for the instruction set of this machine

}  // namespace dydilit
