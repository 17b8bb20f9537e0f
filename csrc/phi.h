// The mathematics of one element and of one row, shared by the CPU (float and double) and CUDA
// (float). No torch headers. dX is the gradient with respect to X; csrc/README.md derives the
// backward.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace dydilit {

constexpr double LN2 = 0.69314718055994530942;

// log2 x for a normal number x > 0, within 2 ulp; finite for every other x, NaN included: the t of
// that element is 0 or not finite, and so is t times its power. On the host log2_of and exp2_of are
// minimax polynomials, because a loop over polynomials vectorises.
HOST_DEVICE float log2_of(float x) {
#ifdef __CUDA_ARCH__
  return log2f(x < FLT_MIN ? FLT_MIN : x);
#else
  uint32_t bits;  // unsigned, because the bits of -0 and of NaN overflow
  std::memcpy(&bits, &x, 4);
  // x = 2^e (1 + f), 1 + f in [sqrt(1/2), sqrt(2))
  const int32_t e = int32_t(bits - 0x3f3504f3u) >> 23;
  bits -= uint32_t(e) << 23;
  float f;
  std::memcpy(&f, &bits, 4);
  f -= 1;
  // A polynomial for log2(1 + f) / f: its relative error stays small near x = 1. The high terms are
  // paired (Estrin's scheme): the dependency chain is shorter than Horner's.
  const float f2 = f * f, f4 = f2 * f2;
  const float high = (0.287916243f - 0.238944829f * f) + (0.215715602f - 0.207269728f * f) * f2 +
                     0.125837013f * f4;
  const float c = (0.480910629f - 0.360703677f * f) + high * f2;
  return float(e) + (1.44269502f + (c * f - 0.721347332f) * f) * f;
#endif
}

// 2^x for |x| < 2^22, within 1 ulp for -126 <= x <= 127, and NaN for NaN. Below it goes to 0, above
// it stays near 2^127: the result is never infinite.
HOST_DEVICE float exp2_of(float x) {
#ifdef __CUDA_ARCH__
  return exp2f(x > 127.0f ? 127.0f : x);
#else
  // Floats of the size of 1.5 * 2^23 are the integers: the sum is rounded to one, n = round(x)
  const float offset = 12582912.0f + 127.0f;
  const float shifted = x + offset, f = x - (shifted - offset);  // f = x - n, in [-1/2, 1/2]
  int32_t n;
  std::memcpy(&n, &shifted, 4);  // the bits of `shifted`: 0x4b400000 + 127 + round(x)
  n = n < 0x4b400000 ? 0x4b400000 : n;
  n = n > 0x4b400000 + 254 ? 0x4b400000 + 254 : n;
  n = int32_t(uint32_t(n) << 23);  // the bits of 2^round(x), or of 0 for round(x) = -127
  float two_n;
  std::memcpy(&two_n, &n, 4);
  const float f2 = f * f;
  const float high =
      (0.0555032864f + 0.00961848907f * f) + (0.00133999309f + 0.000153458124f * f) * f2;
  return (1.0f + (0.693147182f + (0.240226462f + high * f) * f) * f) * two_n;
#endif
}

HOST_DEVICE double log2_of(double x) { return log2(x < DBL_MIN ? DBL_MIN : x); }
HOST_DEVICE double exp2_of(double x) { return exp2(x > 1023 ? 1023 : x); }
HOST_DEVICE float smallest(float) { return FLT_MIN; }
HOST_DEVICE double smallest(double) { return DBL_MIN; }

// -------------------------------------------------------------------------------------------------
// The kernel phi (Eq. 5) on one row z:
//   r = relu(z), t = r / m, p = t^gamma, s = |t|, n = |p|,
//   y = (|r| / |p|) p = (m s / n) p
// for any m > 0. m = max r, so that t and p lie in [0, 1]; for gamma < 0 m is the smallest positive
// r, so that p does.

template <class T>
struct PhiRow {
  T m, s, n;
  // |r| / |p| = m s / n; 0 for a row without a positive entry
  HOST_DEVICE T scale() const { return n != 0 ? m * s / n : T(0); }
};

// m, from the largest r and the smallest positive one (any number if there is none). For gamma < 0
// it is at least 2^-50 of the largest r, so that |t|^2 stays finite.
template <class T>
HOST_DEVICE T scale_of(T gamma, T largest, T smallest_positive) {
  const T least = largest * T(0x1p-50);
  return gamma < 0 ? (smallest_positive > least ? smallest_positive : least) : largest;
}

// The exponent of a row with this m: gamma, but at most 2^14 in size, the limit of exp2_of. NaN and
// -infinity give NaN; but a row without a positive entry is 0 for every gamma.
template <class T>
HOST_DEVICE T exponent_of(T gamma, T m) {
  const T below = gamma > T(0x1p14) ? T(0x1p14) : gamma + (gamma - gamma);
  return m > 0 ? (below < T(-0x1p14) ? T(-0x1p14) : below) : T(1);
}

// r = relu(z); NaN stays NaN
template <class T>
HOST_DEVICE T relu(T z) {
  return z < 0 ? T(0) : z;
}

// 1 / m, finite for every finite m, NaN for infinity
template <class T>
HOST_DEVICE T reciprocal(T m) {
  return 1 / (m < smallest(m) ? smallest(m) : m) + (m - m);
}

// u = t^(exponent - 1) from l = log2 t, so that p = t u; finite for t = 0
template <class T>
HOST_DEVICE T power_less_one(T l, T exponent) {
  return exp2_of((exponent - 1) * l);
}

// With G = dy and the row sums a = <G, p>, b = <G, p l>, h = <p, p l>:
//   dz_j   = (s / n) gamma u_j (G_j - c p_j) + a / (n s) t_j,  c = a / n^2   (0 where z_j <= 0)
//   dgamma = (m s / n) ln 2 (b - c h)
// m has no gradient, because y does not depend on it: m s = |r|, and m cancels in p / n.
template <class T>
struct PhiRowBackward {
  T c, of_u, of_t, dgamma;
  HOST_DEVICE PhiRowBackward(PhiRow<T> row, T gamma, T a, T b, T h)
      : c(0), of_u(0), of_t(0), dgamma(0) {
    if (row.n == 0) return;  // a row without a positive entry: all gradients are 0
    c = a / (row.n * row.n);
    of_u = row.s / row.n * gamma;
    of_t = a / (row.n * row.s);
    dgamma = row.scale() * T(LN2) * (b - c * h);
  }
  HOST_DEVICE T dz(T g, T t, T u) const {
    const T both = of_u * u * (g - c * t * u) + of_t * t;
    return t < smallest(t) ? T(0) : both;  // 0 for z <= 0
  }
};

// -------------------------------------------------------------------------------------------------
// The gate (straight-through): the chosen value is multiplied by w / stop_gradient(w), where
// w = softmax(logits)[index]. The gate is 1, and its gradient is
//   dlogits_j = dgate ([j = index] - softmax(logits)_j),  dgate = dvalue * value

// 1, or NaN where the softmax is: a logit is NaN (which then counts as max) or max is infinite
template <class T>
HOST_DEVICE T gate(T max) {
  return 1 + (max - max);
}

// exp(logit - max), the numerator of the softmax
template <class T>
HOST_DEVICE T softmax_numerator(T logit, T max) {
  const T x = (logit - max) * T(1 / LN2);
  return exp2_of(x < -2000 ? T(-2000) : x);  // exp2_of takes |x| < 2^22; 2^-2000 is 0 in every type
}

template <class T>
HOST_DEVICE T dlogit(T dgate, bool chosen, T softmax) {
  return dgate * ((chosen ? T(1) : T(0)) - softmax);
}

// -------------------------------------------------------------------------------------------------
// The denominator of Eq. 4 for one query, kept above a floor:
//   den = max(dot, floor) + eps,  dot = <Dq, sum_j Dk_j>,  floor = 1e-3 |Dq| sum_j |Dk_j|
// The gradient flows through the larger of dot and floor.

template <class T>
struct Guard {
  bool open;  // dot >= floor: the gradient flows through dot
  T den;
  HOST_DEVICE Guard(T dot, T norm_q, T norms_k, T eps) {
    const T floor = T(1e-3) * norm_q * norms_k;
    open = dot >= floor || dot != dot;  // a NaN in either reaches den
    den = (open ? dot : floor) + eps;
  }
};

}  // namespace dydilit
