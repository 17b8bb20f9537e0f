// Every loop of the CPU's row kernels over the values that a float can have: zeros of both signs,
// subnormal and huge numbers, infinities, NaN of both signs. test_op_build.py compiles it with
// -fsanitize=undefined -fno-wrapv, so that an overflow ends the program.
#include <cstdio>
#include <limits>
#include <vector>

#include "cpu_kernels.cpp"

using namespace dydilit;

template <class T>
void run() {
  using L = std::numeric_limits<T>;
  const T values[] = {T(0),         T(-0.0),       T(1),           T(-1),         T(1e-30),
                      L::min(),     -L::min(),     L::denorm_min(), -L::denorm_min(), L::max(),
                      -L::max(),    L::infinity(), -L::infinity(), L::quiet_NaN(), -L::quiet_NaN(),
                      T(0.3)};
  constexpr int64_t D = 16, rows = 16;
  // row i: every value once, or the i-th value alone among ordinary numbers
  std::vector<T> z(2 * rows * D), y(2 * rows * D), u(y), l(y), dy(2 * rows * D), dz(y);
  for (int64_t i = 0; i < 2 * rows; i++)
    for (int64_t j = 0; j < D; j++) {
      const T ordinary = T(0.1) * T(j + 1);
      z[i * D + j] = i < rows ? values[(i + j) % D] : j == 0 ? values[i - rows] : ordinary;
      dy[i * D + j] = ordinary;
    }
  for (T gamma : {T(3), T(-5), T(0), T(1e30), T(-1e30), L::infinity(), -L::infinity(),
                  L::quiet_NaN()}) {
    const std::vector<T> gammas(2 * rows, gamma);
    std::vector<PhiRow<T>> stats(2 * rows);
    std::vector<T> dgamma(2 * rows), logits(2 * rows * D), dlogits(logits), chosen(2 * rows);
    std::vector<T> sums(D + 1), den(2 * rows), c(D + 1), values_of(D, gamma), dvalues(D);
    std::vector<int32_t> index(2 * rows);
    Rows<T>::phi(2 * rows, D, z.data(), D, gammas.data(), y.data(), D, u.data(), l.data(), D,
                 stats.data());
    Rows<T>::phi_backward(2 * rows, D, z.data(), D, gammas.data(), stats.data(), u.data(),
                          l.data(), dy.data(), D, dz.data(), D, dgamma.data());
    for (bool gated : {true, false}) {
      Rows<T>::choose(2 * rows, D, z.data(), values_of.data(), gated, index.data(), chosen.data());
      Rows<T>::choose_backward(2 * rows, D, z.data(), values_of.data(), gated, index.data(),
                               dgamma.data(), dvalues.data(), dlogits.data());
    }
    Rows<T>::sum_keys(2 * rows, D, z.data(), sums.data());
    Rows<T>::denominator(2 * rows, D, z.data(), sums.data(), T(1e-6), den.data());
    Rows<T>::denominator_backward(2 * rows, D, z.data(), sums.data(), T(1e-6), dz.data(), c.data());
    Rows<T>::sum_keys_backward(2 * rows, D, z.data(), c.data(), dz.data());
  }
}

int main() {
  run<float>();
  run<double>();
  std::vector<uint16_t> bits(1 << 16), back(1 << 16);
  std::vector<float> wide(1 << 16);
  for (int i = 0; i < 1 << 16; i++) bits[i] = uint16_t(i);
  widen_float16(1, 1 << 16, bits.data(), 1 << 16, wide.data());
  narrow_float16(1, 1 << 16, wide.data(), 1 << 16, back.data());
  for (int i = 0; i < 1 << 16; i++)
    if (wide[i] == wide[i] && back[i] != bits[i]) return 1;
  widen_bfloat16(1, 1 << 16, bits.data(), 1 << 16, wide.data());
  narrow_bfloat16(1, 1 << 16, wide.data(), 1 << 16, back.data());
  narrow_float16(1, 1 << 16, wide.data(), 1 << 16, back.data());
  std::puts("no undefined behaviour");
}
