// You may skip this folder (cpu_gemm.h says why). This file holds the loops of cpu_gemm.h, for
// vectors of BYTES bytes and ROWS x 2 accumulators. cpu_gemm.cpp includes it once for each
// instruction set, between pragmas and inside a namespace: so it has no include guard and uses
// nothing of std.

// Two types, because clang ignores an alignment that depends on T
template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(BYTES), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(BYTES), aligned(8), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
struct Body {
  using V = Vector<T>;
  static constexpr int64_t LANES = BYTES / sizeof(T), PANEL = 2 * LANES;
  // Rows of B that are multiplied at a time: these rows of one panel stay in the first-level cache,
  // and the matching part of A in the second-level cache
  static constexpr int64_t CHUNK = 384;

  // C (R, columns) = A (R, K) B (K, PANEL), or += if `accumulate`. The sums stay in registers, and
  // each load of B serves R rows.
  template <int R>
  ALWAYS_INLINE static void tile(int64_t K, const T* A, int64_t sm, int64_t sk, const T* B,
                                 int64_t ldb, T* C, int64_t ldc, int64_t columns, bool accumulate) {
    V left[R], right[R];
    for (int r = 0; r < R; r++) left[r] = right[r] = V{};
    for (int64_t k = 0; k < K; k++, A += sk, B += ldb) {
      const V b0 = *(const V*)B, b1 = *(const V*)(B + LANES);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        left[r] += A[r * sm] * b0;
        right[r] += A[r * sm] * b1;
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++, C += ldc) {
      if (columns == PANEL) {
        V *c0 = (V*)C, *c1 = (V*)(C + LANES);
        *c0 = accumulate ? *c0 + left[r] : left[r];
        *c1 = accumulate ? *c1 + right[r] : right[r];
      } else {
        const V row[] = {left[r], right[r]};
        for (int64_t j = 0; j < columns; j++)
          C[j] = ((const T*)row)[j] + (accumulate ? C[j] : T(0));
      }
    }
  }

  // The same for fewer than ROWS rows
  template <int R>
  static void last_tile(int64_t rows, int64_t K, const T* A, int64_t sm, int64_t sk, const T* B,
                        int64_t ldb, T* C, int64_t ldc, int64_t columns, bool accumulate) {
    if constexpr (R > 0) {
      if (rows == R) tile<R>(K, A, sm, sk, B, ldb, C, ldc, columns, accumulate);
      else last_tile<R - 1>(rows, K, A, sm, sk, B, ldb, C, ldc, columns, accumulate);
    }
  }

  // C (M, columns) = A (M, K) B (K, PANEL), or += if `accumulate`
  static void column_of_tiles(int64_t M, int64_t K, const T* A, int64_t sm, int64_t sk, const T* B,
                              int64_t ldb, T* C, int64_t ldc, int64_t columns, bool accumulate) {
    int64_t i = 0;
    for (; i + ROWS <= M; i += ROWS)
      tile<ROWS>(K, A + i * sm, sm, sk, B, ldb, C + i * ldc, ldc, columns, accumulate);
    last_tile<ROWS - 1>(M - i, K, A + i * sm, sm, sk, B, ldb, C + i * ldc, ldc, columns,
                        accumulate);
  }

  static void pack(int64_t K, int64_t N, const T* B, int64_t sk, int64_t sn, T* P, int64_t K_all) {
    for (int64_t n = 0; n < N; n += PANEL, B += PANEL * sn, P += K_all * PANEL) {
      const int64_t columns = N - n < PANEL ? N - n : PANEL;
      for (int64_t k = 0; k < K; k++) {
        T* row = P + k * PANEL;
        if (columns == PANEL && sn == 1) {
          *(V*)row = *(const V*)(B + k * sk);
          *(V*)(row + LANES) = *(const V*)(B + k * sk + LANES);
        } else if (columns == PANEL)
          for (int64_t j = 0; j < PANEL; j++) row[j] = B[k * sk + j * sn];
        else
          for (int64_t j = 0; j < PANEL; j++) row[j] = j < columns ? B[k * sk + j * sn] : T(0);
      }
    }
  }

  static void multiply(int64_t M, int64_t N, int64_t K_all, const T* A, int64_t sm, int64_t sk,
                       const T* P, T* C, int64_t ldc, bool accumulate, T* scratch) {
    for (int64_t k = 0; k < K_all; k += CHUNK, A += CHUNK * sk, accumulate = true) {
      const int64_t K = K_all - k < CHUNK ? K_all - k : CHUNK;
      // If A is transposed, the K numbers for one row of C lie far apart, each in a cache line of
      // its own. They are copied close together first.
      const bool across = sk > BLOCK;
      for (int64_t l = 0; l < K && across; l++)
        for (int64_t i = 0; i < M; i++) scratch[l * BLOCK + i] = A[l * sk + i * sm];
      for (int64_t n = 0; n < N; n += PANEL)
        column_of_tiles(M, K, across ? scratch : A, across ? 1 : sm, across ? BLOCK : sk,
                        P + n * K_all + k * PANEL, PANEL, C + n, ldc, N - n < PANEL ? N - n : PANEL,
                        accumulate);
    }
    if (K_all == 0 && !accumulate)
      for (int64_t i = 0; i < M; i++)
        for (int64_t j = 0; j < N; j++) C[i * ldc + j] = 0;
  }

  static void add_product(int64_t M, int64_t N, int64_t K_all, const T* A, int64_t sm, int64_t sk,
                          const T* B, int64_t ldb, T* C, int64_t ldc, T* scratch) {
    const int64_t whole = N / PANEL * PANEL;
    for (int64_t n = 0; n < whole; n += PANEL)
      column_of_tiles(M, K_all, A, sm, sk, B + n, ldb, C + n, ldc, PANEL, true);
    // The last columns, fewer than PANEL, are packed in `scratch`
    for (int64_t k = 0; k < K_all && whole < N; k += CHUNK) {
      const int64_t K = K_all - k < CHUNK ? K_all - k : CHUNK;
      pack(K, N - whole, B + k * ldb + whole, ldb, 1, scratch, K);
      column_of_tiles(M, K, A + k * sk, sm, sk, scratch, PANEL, C + whole, ldc, N - whole, true);
    }
  }

  // The sum of the numbers in the WIDTH bytes at v: first half plus second half, and so on
  template <int64_t WIDTH>
  ALWAYS_INLINE static T sum_of(const void* v) {
    if constexpr (WIDTH == sizeof(T)) return *(const T*)v;
    else {
      using Half __attribute__((vector_size(WIDTH / 2), may_alias)) = T;
      const Half sum = ((const Half*)v)[0] + ((const Half*)v)[1];
      return sum_of<WIDTH / 2>(&sum);
    }
  }

  // C (R, S) = A (R, K) B (S, K)^T. If `ahead` is given, the row at `ahead` is prefetched.
  template <int R, int S>
  ALWAYS_INLINE static void dot_tile(int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb,
                                     T* C, int64_t ldc, const T* ahead = nullptr) {
    V sum[R][S];
    for (int r = 0; r < R; r++)
      for (int s = 0; s < S; s++) sum[r][s] = V{};
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES) {
      if (ahead) __builtin_prefetch(ahead + k);
      V b[S];
#pragma GCC unroll 4
      for (int s = 0; s < S; s++) b[s] = *(const V*)(B + s * ldb + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        V a = *(const V*)(A + r * lda + k);
        IN_REGISTER(a);
#pragma GCC unroll 4
        for (int s = 0; s < S; s++) sum[r][s] += a * b[s];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int s = 0; s < S; s++) C[r * ldc + s] = sum_of<BYTES>(&sum[r][s]);
    for (; k < K; k++)
      for (int r = 0; r < R; r++)
        for (int s = 0; s < S; s++) C[r * ldc + s] += A[r * lda + k] * B[s * ldb + k];
  }

  // C (R, N) = A (R, K) B (N, K)^T, three rows of B at a time: 3 R accumulators. The R rows of A
  // after these are prefetched.
  template <int R>
  static void dot_rows(int64_t N, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, T* C,
                       int64_t ldc) {
    int64_t n = 0;
    for (; n + 3 <= N; n += 3)
      dot_tile<R, 3>(K, A, lda, B + n * ldb, ldb, C + n, ldc,
                     n < 3 * R ? A + (R + n / 3) * lda : nullptr);
    if (N - n == 2) dot_tile<R, 2>(K, A, lda, B + n * ldb, ldb, C + n, ldc);
    if (N - n == 1) dot_tile<R, 1>(K, A, lda, B + n * ldb, ldb, C + n, ldc);
  }

  static void dots(int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B,
                   int64_t ldb, T* C, int64_t ldc) {
    int64_t i = 0;
    for (; i + 4 <= M; i += 4) dot_rows<4>(N, K, A + i * lda, lda, B, ldb, C + i * ldc, ldc);
    for (; i < M; i++) dot_rows<1>(N, K, A + i * lda, lda, B, ldb, C + i * ldc, ldc);
  }

  static constexpr Gemm<T> functions = {PANEL, CHUNK * BLOCK, pack, multiply, add_product, dots};
};
