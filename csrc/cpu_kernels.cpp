// The loops of cpu_kernels.h. The compiler makes three versions of each, for AVX-512, AVX2 and the
// baseline, and the loader picks one when the extension is imported. This file must not include a
// torch header: the linker keeps one copy of each inline function, which could be one that was
// compiled here, for AVX-512.
#include "cpu_kernels.h"

#if defined(__x86_64__) && defined(__GLIBC__) && __GNUC__ >= 12 && !defined(__clang__)
#define DISPATCH __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DISPATCH
#endif

namespace dydilit {

template <class T>
DISPATCH void Rows<T>::phi(int64_t rows, int64_t D, const T* z, int64_t ldz, const T* gamma, T* y,
                           int64_t ldy, T* u, T* l, int64_t ldu, PhiRow<T>* stats, Ahead next) {
  for (int64_t i = 0; i < rows; i++, z += ldz, y += ldy, u += ldu, l += ldu, next.row += next.ld) {
    for (int64_t b = 0; b < next.bytes; b += 64) __builtin_prefetch(next.row + b, 0, 2);
    T m = 0;  // m = max_j relu(z_j)
#pragma omp simd reduction(max : m)
    for (int64_t j = 0; j < D; j++) m = z[j] > m ? z[j] : m;
    if (gamma[i] < 0) {
      T least = m;  // the smallest positive z_j
#pragma omp simd reduction(min : least)
      for (int64_t j = 0; j < D; j++) least = (z[j] > 0) & (z[j] < least) ? z[j] : least;
      m = scale_of(gamma[i], m, least);
    }
    const T inv_m = reciprocal(m), g = exponent_of(gamma[i], m);
#pragma omp simd
    for (int64_t j = 0; j < D; j++) {
      y[j] = relu(z[j]) * inv_m;  // t = r / m
      l[j] = log2_of(y[j]);       // log2 t
    }
    T tt = 0, pp = 0;
#pragma omp simd reduction(+ : tt, pp)
    for (int64_t j = 0; j < D; j++) {  // a loop of its own: a core overlaps short dependency chains
      const T t = y[j];
      u[j] = power_less_one(l[j], g);  // u = t^(gamma - 1)
      y[j] = t * u[j];                 // p = t^gamma
      tt += t * t;
      pp += y[j] * y[j];
    }
    stats[i] = {m, std::sqrt(tt), std::sqrt(pp)};  // s = |t|, n = |p|
    const T scale = stats[i].scale();
    for (int64_t j = 0; j < D; j++) y[j] *= scale;  // y = (m s / n) p = (|r| / |p|) p (Eq. 5)
  }
}

template <class T>
DISPATCH void Rows<T>::phi_backward(int64_t rows, int64_t D, const T* z, int64_t ldz,
                                    const T* gamma, const PhiRow<T>* stats, const T* u, const T* l,
                                    const T* dy, int64_t ldy, T* dz, int64_t lddz, T* dgamma) {
  for (int64_t i = 0; i < rows; i++, z += ldz, u += ldy, l += ldy, dy += ldy, dz += lddz) {
    const T inv_m = reciprocal(stats[i].m);
    T a = 0, b = 0, h = 0;
#pragma omp simd reduction(+ : a, b, h)
    for (int64_t j = 0; j < D; j++) {
      const T p = relu(z[j]) * inv_m * u[j], pl = p * l[j];  // p = t u = t^gamma
      a += dy[j] * p;   // a = <G, p>, G = dy
      b += dy[j] * pl;  // b = <G, p log2 t>
      h += p * pl;      // h = <p, p log2 t>
    }
    const PhiRowBackward<T> row(stats[i], gamma[i], a, b, h);
    dgamma[i] = row.dgamma;
#pragma omp simd  // dz = (s / n) gamma u (G - c p) + a / (n s) t
    for (int64_t j = 0; j < D; j++) dz[j] = row.dz(dy[j], relu(z[j]) * inv_m, u[j]);
  }
}

template <class T>
DISPATCH void Rows<T>::choose(int64_t rows, int64_t n, const T* logits, const T* values, bool gated,
                              int32_t* index, T* chosen) {
  for (int64_t i = 0; i < rows; i++, logits += n) {
    int32_t best = 0;
    T largest = logits[0];
    for (int32_t j = 1; j < n; j++) {
      // The first NaN, if any, counts as the largest. Bitwise &: && compiles to a branch, and the
      // branch is unpredictable.
      const bool more = !(logits[j] <= largest) & (largest == largest);
      best = more ? j : best;
      largest = more ? logits[j] : largest;
    }
    index[i] = best;  // arg max (Eqs. 6 and 7)
    chosen[i] = gated ? values[best] * gate(largest) : values[best];
  }
}

template <class T>
DISPATCH void Rows<T>::choose_backward(int64_t rows, int64_t n, const T* logits, const T* values,
                                       bool gated, const int32_t* index, const T* dchosen,
                                       T* dvalues, T* dlogits) {
  for (int64_t i = 0; i < rows; i++, logits += n, dlogits += n) {
    const int32_t best = index[i];
    const T max = logits[best], dgate = dchosen[i] * values[best];
    // dgamma or dlambda of the chosen index
    dvalues[best] += gated ? dchosen[i] * gate(max) : dchosen[i];
    if (!gated) continue;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) {
      dlogits[j] = softmax_numerator(logits[j], max);
      sum += dlogits[j];
    }
    for (int64_t j = 0; j < n; j++)  // dl_j = dgate ([j = best] - softmax(l)_j)
      dlogits[j] = dlogit(dgate, j == best, dlogits[j] / sum);
  }
}

template <class T>
DISPATCH void Rows<T>::difference(int64_t rows, int64_t D, const T* pair, const T* lam, T* d) {
  for (int64_t i = 0; i < rows; i++, pair += 2 * D, d += D)
    for (int64_t j = 0; j < D; j++) d[j] = pair[j] - lam[i] * pair[D + j];  // y - lambda y' (Eq. 8)
}

template <class T>
DISPATCH void Rows<T>::difference_backward(int64_t rows, int64_t D, const T* pair, const T* lam,
                                           const T* dd, T* dpair, T* dlam) {
  for (int64_t i = 0; i < rows; i++, pair += 2 * D, dd += D, dpair += 2 * D) {
    T dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < D; j++) {
      dpair[j] = dd[j];                // dy = dd
      dpair[D + j] = -lam[i] * dd[j];  // dy' = -lambda dd
      dot += dd[j] * pair[D + j];
    }
    dlam[i] = -dot;  // dlambda = -<dd, y'>
  }
}

template <class T>
DISPATCH void Rows<T>::sum_keys(int64_t rows, int64_t D, const T* dk, T* k_sum) {
  for (int64_t j = 0; j <= D; j++) k_sum[j] = 0;
  for (int64_t i = 0; i < rows; i++, dk += D) {
    T square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t j = 0; j < D; j++) {
      k_sum[j] += dk[j];
      square += dk[j] * dk[j];
    }
    k_sum[D] += std::sqrt(square);  // += |Dk_j|
  }
}

template <class T>
DISPATCH void Rows<T>::sum_keys_backward(int64_t rows, int64_t D, const T* dk, const T* c, T* ddk) {
  for (int64_t i = 0; i < rows; i++, dk += D, ddk += D) {
    T square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t j = 0; j < D; j++) square += dk[j] * dk[j];
    const T of_dk = square > 0 ? c[D] / std::sqrt(square) : T(0);    // |0| has gradient 0
    for (int64_t j = 0; j < D; j++) ddk[j] += c[j] + of_dk * dk[j];  // c + c_norm Dk_j / |Dk_j|
  }
}

template <class T>
DISPATCH void Rows<T>::denominator(int64_t rows, int64_t D, const T* dq, const T* k_sum, T eps,
                                   T* den) {
  for (int64_t i = 0; i < rows; i++, dq += D) {
    T dot = 0, square = 0;
#pragma omp simd reduction(+ : dot, square)
    for (int64_t j = 0; j < D; j++) {
      dot += dq[j] * k_sum[j];
      square += dq[j] * dq[j];
    }
    den[i] = Guard<T>(dot, std::sqrt(square), k_sum[D], eps).den;  // the denominator of Eq. 4
  }
}

template <class T>
DISPATCH void Rows<T>::denominator_backward(int64_t rows, int64_t D, const T* dq, const T* k_sum,
                                            T eps, T* ddq, T* c) {
  for (int64_t i = 0; i < rows; i++, dq += D, ddq += D) {
    T dot = 0, square = 0, along = 0;
#pragma omp simd reduction(+ : dot, square, along)
    for (int64_t j = 0; j < D; j++) {
      dot += dq[j] * k_sum[j];
      square += dq[j] * dq[j];
      along += ddq[j] * dq[j];
    }
    const T norm = std::sqrt(square);
    const Guard<T> guard(dot, norm, k_sum[D], eps);
    // out = num / den, and num is linear in Dq: dden = -<dnum, num> / den = -<ddq, Dq> / den
    const T dden = -along / guard.den;
    if (guard.open) {  // den = <Dq, k_sum> + eps
      for (int64_t j = 0; j < D; j++) {
        ddq[j] += dden * k_sum[j];
        c[j] += dden * dq[j];
      }
    } else {  // den = 1e-3 |Dq| sum |Dk| + eps
      const T of_dq = norm > 0 ? T(1e-3) * dden * k_sum[D] / norm : T(0);
      for (int64_t j = 0; j < D; j++) ddq[j] += of_dq * dq[j];
      c[D] += T(1e-3) * dden * norm;
    }
  }
}

template <class T>
DISPATCH void Rows<T>::divide(int64_t rows, int64_t D, const T* x, int64_t ldx, const T* den, T* y,
                              int64_t ldy) {
  for (int64_t i = 0; i < rows; i++, x += ldx, y += ldy) {
    const T inv = den ? 1 / den[i] : T(1);
#pragma omp simd
    for (int64_t j = 0; j < D; j++) y[j] = x[j] * inv;
  }
}

template <class T>
DISPATCH void Rows<T>::add(int64_t n, const T* x, T* y) {
  for (int64_t j = 0; j < n; j++) y[j] += x[j];
}

template struct Rows<float>;
template struct Rows<double>;

static inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

DISPATCH void widen_bfloat16(int64_t rows, int64_t D, const uint16_t* x, int64_t ldx, float* y) {
  for (int64_t i = 0; i < rows; i++, x += ldx, y += D)
    for (int64_t j = 0; j < D; j++) y[j] = float_of(uint32_t(x[j]) << 16);
}

DISPATCH void narrow_bfloat16(int64_t rows, int64_t D, const float* x, int64_t ldx, uint16_t* y) {
  for (int64_t i = 0; i < rows; i++, x += ldx, y += D)
    for (int64_t j = 0; j < D; j++) {
      const uint32_t bits = bits_of(x[j]);
      y[j] = uint16_t(x[j] != x[j] ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

DISPATCH void widen_float16(int64_t rows, int64_t D, const uint16_t* x, int64_t ldx, float* y) {
  for (int64_t i = 0; i < rows; i++, x += ldx, y += D)
    for (int64_t j = 0; j < D; j++) {
      // The exponent of float16 has the bias 15, that of float32 127: the result is 2^112 too small
      const uint32_t magnitude = (x[j] & 0x7fffu) << 13;
      const float finite = float_of(magnitude) * 0x1p112f;
      const uint32_t bits = magnitude >= 0x7c00u << 13 ? magnitude | 0x7f800000u : bits_of(finite);
      y[j] = float_of(bits | (x[j] & 0x8000u) << 16);
    }
}

DISPATCH void narrow_float16(int64_t rows, int64_t D, const float* x, int64_t ldx, uint16_t* y) {
  for (int64_t i = 0; i < rows; i++, x += ldx, y += D)
    for (int64_t j = 0; j < D; j++) {
      const uint32_t bits = bits_of(x[j]), magnitude = bits & 0x7fffffffu;
      const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
      // Floats near 0.5 are 2^-24 apart, as float16's subnormal numbers are
      const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
      const uint32_t beyond = magnitude > 0x7f800000u ? 0x7e00 : 0x7c00;  // NaN or infinity
      const uint32_t half = magnitude >= 0x477ff000u  ? beyond
                            : magnitude < 0x38800000u ? subnormal
                                                      : normal;
      y[j] = uint16_t(half | (bits >> 16 & 0x8000u));
    }
}

#if defined(__x86_64__) && defined(__GLIBC__) && __GNUC__ >= 12 && !defined(__clang__)
__attribute__((target("arch=x86-64-v4"))) static const char* isa() { return "x86-64-v4 (AVX-512)"; }
__attribute__((target("arch=x86-64-v3"))) static const char* isa() { return "x86-64-v3 (AVX2)"; }
__attribute__((target("default"))) static const char* isa() { return "x86-64"; }
#else
static const char* isa() { return "the compiler's default"; }
#endif
const char* cpu_isa() { return isa(); }

}  // namespace dydilit
