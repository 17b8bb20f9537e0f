// You may skip this folder (cpu_gemm.h says why). This file compiles cpu_gemm_body.h once for each
// instruction set; the loader picks one of them when the extension is imported.
#include "cpu_gemm.h"

#define ALWAYS_INLINE __attribute__((always_inline)) inline

// Keeps the vector v in a register. Without it gcc, for AVX-512, loads v again for each of its
// uses, at half the speed.
#ifdef __x86_64__
#define IN_REGISTER(v) asm("" : "+v"(v))
#else
#define IN_REGISTER(v)
#endif

namespace dydilit {

namespace baseline {  // SSE2 on x86-64, NEON on AArch64
constexpr int BYTES = 16, ROWS = 6;
#include "cpu_gemm_body.h"
}  // namespace baseline

#if defined(__x86_64__) && defined(__GLIBC__) && __GNUC__ >= 12 && !defined(__clang__)

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace v3 {  // AVX2: 16 registers, of which 12 accumulate
constexpr int BYTES = 32, ROWS = 6;
#include "cpu_gemm_body.h"
}  // namespace v3
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace v4 {  // AVX-512: 32 registers, of which 16 accumulate; 8 rows divide BLOCK
constexpr int BYTES = 64, ROWS = 8;
#include "cpu_gemm_body.h"
}  // namespace v4
#pragma GCC pop_options

#define CHOOSE(T)                                                                    \
  __attribute__((target("arch=x86-64-v4"))) static const Gemm<T>& choose(T) {        \
    return v4::Body<T>::functions;                                                   \
  }                                                                                  \
  __attribute__((target("arch=x86-64-v3"))) static const Gemm<T>& choose(T) {        \
    return v3::Body<T>::functions;                                                   \
  }                                                                                  \
  __attribute__((target("default"))) static const Gemm<T>& choose(T) {               \
    return baseline::Body<T>::functions;                                             \
  }

#else
#define CHOOSE(T) \
  static const Gemm<T>& choose(T) { return baseline::Body<T>::functions; }
#endif

CHOOSE(float)
CHOOSE(double)

template <> const Gemm<float>& gemm<float>() { return choose(float()); }
template <> const Gemm<double>& gemm<double>() { return choose(double()); }

}  // namespace dydilit
