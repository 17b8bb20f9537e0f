// For test_op_build.py: compares every build of csrc/gemm/cpu_gemm_body.h that this machine can run
// with a triple loop, on integers so small that both are exact. Prints a line for each build; the
// exit status is the number of builds with a wrong product.
#include "gemm/cpu_gemm.cpp"

#include <cstdio>
#include <random>
#include <vector>

using namespace dydilit;

template <class T>
bool check(const char* name, const Gemm<T>& g) {
  std::mt19937 random(0);
  const auto pick = [&](int64_t from, int64_t to) {
    return from + int64_t(random() % (to - from + 1));
  };
  int wrong = 0, calls = 0;
  for (int round = 0; round < 400; round++) {
    const int64_t M = pick(1, BLOCK), N = pick(1, 100), K = pick(0, 800), ldb = N + pick(0, 5),
                  ldc = N + pick(0, 3);
    const bool transposed = pick(0, 1), accumulate = pick(0, 1);
    const int64_t lda = (transposed ? M : K) + pick(0, 70), sm = transposed ? 1 : lda,
                  sk = transposed ? lda : 1;
    std::vector<T> A((M + K) * (lda + 1)), B((K + 1) * ldb), B_t(N * K + 1), C(M * ldc, 1);
    for (T& x : A) x = T(pick(-3, 3));
    for (T& x : B) x = T(pick(-3, 3));
    for (int64_t k = 0; k < K; k++)
      for (int64_t n = 0; n < N; n++) B_t[n * K + k] = B[k * ldb + n];
    const int which = int(pick(0, 3));
    if ((which == 2 && !accumulate) || (which == 3 && (accumulate || transposed))) continue;
    std::vector<T> want = C;  // the gaps between the rows of C stay 1
    for (int64_t i = 0; i < M; i++)
      for (int64_t j = 0; j < N; j++) {
        T sum = accumulate ? want[i * ldc + j] : T(0);
        for (int64_t k = 0; k < K; k++) sum += A[i * sm + k * sk] * B[k * ldb + j];
        want[i * ldc + j] = sum;
      }
    std::vector<T> P(g.packed(K, N)), scratch(g.scratch);
    if (which == 0) {  // packed in two pieces
      const int64_t half = K / 2;
      g.pack(half, N, B.data(), ldb, 1, P.data(), K);
      g.pack(K - half, N, B.data() + half * ldb, ldb, 1, P.data() + g.offset(K, half, 0), K);
    } else if (which == 1) {
      g.pack(K, N, B_t.data(), 1, K, P.data(), K);
    }
    if (which < 2)
      g.multiply(M, N, K, A.data(), sm, sk, P.data(), C.data(), ldc, accumulate, scratch.data());
    if (which == 2)
      g.add_product(M, N, K, A.data(), sm, sk, B.data(), ldb, C.data(), ldc, scratch.data());
    if (which == 3) g.dots(M, N, K, A.data(), lda, B_t.data(), K, C.data(), ldc);
    calls++;
    wrong += C != want;
  }
  std::printf("%s, %zu bytes: panel %d, %d of %d products wrong\n", name, sizeof(T), int(g.panel),
              wrong, calls);
  return wrong > 0;
}

int main() {
  int wrong = check("baseline", baseline::Body<float>::functions) +
              check("baseline", baseline::Body<double>::functions);
#if defined(__x86_64__) && defined(__GLIBC__) && __GNUC__ >= 12 && !defined(__clang__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    wrong += check("v3", v3::Body<float>::functions) + check("v3", v3::Body<double>::functions);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
    wrong += check("v4", v4::Body<float>::functions) + check("v4", v4::Body<double>::functions);
#endif
  return wrong + check("chosen", gemm<float>()) + check("chosen", gemm<double>());
}
