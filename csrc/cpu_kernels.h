// Loops over a few rows of D elements; free of torch headers. T is float or double. `ld...` is the distance between rows.
// Forward and backward of each step are neighbours; dX is the gradient with respect to X, "+=" marks accumulation.
#pragma once
#include <cstdint>

#include "phi.h"

namespace dydilit {

// Rows that will be read next, `bytes` of each, `ld` bytes apart: they come into the second-level cache during other work
struct Ahead {
  const char* row = nullptr;
  int64_t ld = 0, bytes = 0;
};

template <class T>
struct Rows {
  // y = phi(z; gamma) (Eq. 5), one gamma per row. What the backward needs: u, l (ldu apart; 0: not kept) and stats (rows)
  static void phi(int64_t rows, int64_t D, const T* z, int64_t ldz, const T* gamma, T* y, int64_t ldy, T* u, T* l,
                  int64_t ldu, PhiRow<T>* stats, Ahead next = {});
  // dz and dgamma (rows) from dy and what phi left; u, l and dy are ldy apart; dz may be dy
  static void phi_backward(int64_t rows, int64_t D, const T* z, int64_t ldz, const T* gamma, const PhiRow<T>* stats,
                           const T* u, const T* l, const T* dy, int64_t ldy, T* dz, int64_t lddz, T* dgamma);

  // index = arg max of the logits (rows, n), the lowest in a tie; chosen = values[index] (Eqs. 6 and 7)
  static void choose(int64_t rows, int64_t n, const T* logits, const T* values, int32_t* index, T* chosen);
  // from dchosen (rows): dvalues (n) += ; dlogits (rows, n)
  static void choose_backward(int64_t rows, int64_t n, const T* logits, const T* values, const int32_t* index,
                              const T* dchosen, T* dvalues, T* dlogits);

  // d = y - lambda y' (Eq. 8); pair (rows, 2D) holds y and y' side by side
  static void difference(int64_t rows, int64_t D, const T* pair, const T* lam, T* d);
  // dpair = (dd, -lambda dd), dlambda = -<dd, y'>
  static void difference_backward(int64_t rows, int64_t D, const T* pair, const T* lam, const T* dd, T* dpair, T* dlam);

  // k_sum (D + 1) = sum_j Dk_j, followed by sum_j |Dk_j|
  static void sum_keys(int64_t rows, int64_t D, const T* dk, T* k_sum);
  // ddk_j += c + c_norm Dk_j / |Dk_j|; c (D + 1) ends with c_norm
  static void sum_keys_backward(int64_t rows, int64_t D, const T* dk, const T* c, T* ddk);

  // den (rows) of Eq. 4, guarded
  static void denominator(int64_t rows, int64_t D, const T* dq, const T* k_sum, T eps, T* den);
  // ddq: on entry the gradient that reaches Dq through the numerator; on exit all of it. c (D + 1) +=
  static void denominator_backward(int64_t rows, int64_t D, const T* dq, const T* k_sum, T eps, T* ddq, T* c);

  // y = x / den, row by row (den null: a copy)
  static void divide(int64_t rows, int64_t D, const T* x, int64_t ldx, const T* den, T* y, int64_t ldy);
  // y += x
  static void add(int64_t n, const T* x, T* y);
};

// 16 bits <-> float32, round to nearest even
void widen_bfloat16(int64_t rows, int64_t D, const uint16_t* x, int64_t ldx, float* y);
void narrow_bfloat16(int64_t rows, int64_t D, const float* x, int64_t ldx, uint16_t* y);
void widen_float16(int64_t rows, int64_t D, const uint16_t* x, int64_t ldx, float* y);
void narrow_float16(int64_t rows, int64_t D, const float* x, int64_t ldx, uint16_t* y);

const char* cpu_isa();  // the instruction set that the dispatcher chose for the functions above

}  // namespace dydilit
