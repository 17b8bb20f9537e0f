// The row kernels of the CPU: loops over a few rows of D elements. No torch headers. T is float or
// double; ldx is the distance between two rows of x. Each function stands next to its backward. dX
// is the gradient with respect to X; "+=" marks an output that is added to.
#pragma once
#include <cstdint>

#include "phi.h"

namespace dydilit {

// Rows that will be read next, `ld` bytes apart: the first `bytes` of each are prefetched into the
// second-level cache
struct Ahead {
  const char* row = nullptr;
  int64_t ld = 0, bytes = 0;
};

template <class T>
struct Rows {
  // y = phi(z; gamma) (Eq. 5), one gamma per row. For the backward: stats (rows), and the rows of u
  // and l, ldu apart. Where no backward follows, ldu = 0, and every row overwrites the last one
  static void phi(int64_t rows, int64_t D, const T* z, int64_t ldz, const T* gamma, T* y,
                  int64_t ldy, T* u, T* l, int64_t ldu, PhiRow<T>* stats, Ahead next = {});
  // dz and dgamma (rows) from dy and the stats, u, l that phi wrote. Rows of u, l and dy are ldy
  // apart; dz may be dy
  static void phi_backward(int64_t rows, int64_t D, const T* z, int64_t ldz, const T* gamma,
                           const PhiRow<T>* stats, const T* u, const T* l, const T* dy, int64_t ldy,
                           T* dz, int64_t lddz, T* dgamma);

  // index = arg max of the logits (rows, n), the lowest index in a tie; chosen = values[index]: the
  // gamma of Eq. 6 or the lambda of Eq. 7, times its gate if there is one
  static void choose(int64_t rows, int64_t n, const T* logits, const T* values, bool gated,
                     int32_t* index, T* chosen);
  // From dchosen (rows): dvalues (n) += and dlogits (rows, n)
  static void choose_backward(int64_t rows, int64_t n, const T* logits, const T* values, bool gated,
                              const int32_t* index, const T* dchosen, T* dvalues, T* dlogits);

  // d = y - lambda y' (Eq. 8); pair (rows, 2D) holds y and y' side by side
  static void difference(int64_t rows, int64_t D, const T* pair, const T* lam, T* d);
  // dpair = (dd, -lambda dd), dlambda = -<dd, y'>
  static void difference_backward(int64_t rows, int64_t D, const T* pair, const T* lam, const T* dd,
                                  T* dpair, T* dlam);

  // k_sum (D + 1) = sum_j Dk_j and, as its last element, sum_j |Dk_j|
  static void sum_keys(int64_t rows, int64_t D, const T* dk, T* k_sum);
  // ddk_j += c + c_norm Dk_j / |Dk_j|; c (D + 1) ends with c_norm
  static void sum_keys_backward(int64_t rows, int64_t D, const T* dk, const T* c, T* ddk);

  // den (rows): the denominator of Eq. 4, kept above a floor (Guard in phi.h)
  static void denominator(int64_t rows, int64_t D, const T* dq, const T* k_sum, T eps, T* den);
  // ddq: on entry the gradient that reaches Dq through the numerator, on exit the whole gradient.
  // c (D + 1) += the gradient of k_sum
  static void denominator_backward(int64_t rows, int64_t D, const T* dq, const T* k_sum, T eps,
                                   T* ddq, T* c);

  // y = x / den, row by row; y = x if den is null
  static void divide(int64_t rows, int64_t D, const T* x, int64_t ldx, const T* den, T* y,
                     int64_t ldy);
  // y += x
  static void add(int64_t n, const T* x, T* y);
};

// Between float32 and 16 bits, rounded to nearest even; y is contiguous
void widen_bfloat16(int64_t rows, int64_t D, const uint16_t* x, int64_t ldx, float* y);
void narrow_bfloat16(int64_t rows, int64_t D, const float* x, int64_t ldx, uint16_t* y);
void widen_float16(int64_t rows, int64_t D, const uint16_t* x, int64_t ldx, float* y);
void narrow_float16(int64_t rows, int64_t D, const float* x, int64_t ldx, uint16_t* y);

const char* cpu_isa();  // the instruction set that the loader chose for the functions above

}  // namespace dydilit
