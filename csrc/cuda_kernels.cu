// The kernels of cuda_kernels.cuh. They use two layouts, which csrc/README.md draws:
//
// Tiles (features, features_backward): a block owns 8 tokens of one side (Q and Q', or K and K'),
//   with all their columns. Lane 4 g + t of every warp works on token g. A warp owns GROUPS groups
//   of 32 columns; lane t of a token owns columns 8 t .. 8 t + 7 of each group. The tensor core
//   takes its operands in this layout, so a token goes from memory into registers, and from there
//   into the router product and into the power. A sum over a token adds 4 lanes, then, in shared
//   memory, the warps.
// Rows (the denominator): a warp owns a row; a lane owns columns 8 lane .. 8 lane + 7 of each 256.
//
// The order of every sum depends on the shape alone, and no atomic is used: the same bits on every
// run.
#include "cuda_kernels.cuh"

#include <stdexcept>
#include <string>

#include "cuda_mma.cuh"
#include "phi.h"

namespace dydilit::cuda {
namespace {

constexpr unsigned ALL = 0xffffffffu;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
            cudaStream_t stream, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forgets it: torch would report it again, at some later call
  throw std::runtime_error(std::string("the fused op could not start a kernel: ") +
                           cudaGetErrorString(error));
}

// -------------------------------------------------------------------------------------------------
// Reading and writing eight neighbouring elements as float32. `vector`: their address is a multiple
// of 16.

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void from_float(float x, float& y) { y = x; }
__device__ __forceinline__ void from_float(float x, __half& y) { y = __float2half_rn(x); }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& y) {
  y = __float2bfloat16_rn(x);
}

template <class T>
struct alignas(16) Eight {
  T x[8];
};

// row[first .. first + 7], and 0 for columns >= D; a read without a branch
template <class T>
__device__ __forceinline__ Eight<T> fetch(const T* row, int first, int D) {
  Eight<T> eight = *reinterpret_cast<const Eight<T>*>(row + (first < D ? first : 0));
  if (first >= D) eight = {};
  return eight;
}

template <class T>
__device__ __forceinline__ void unpack(const Eight<T>& eight, float* x) {
#pragma unroll
  for (int e = 0; e < 8; e++) x[e] = to_float(eight.x[e]);
}

template <class T>
__device__ __forceinline__ void load(const T* row, int first, int D, float* x) {
#pragma unroll
  for (int e = 0; e < 8; e++) x[e] = first + e < D ? to_float(row[first + e]) : 0.0f;
}

// x and y = the columns of two rows that this thread owns: COLUMNS / 8 times eight of them, group i
// from column(i) on. All reads are under way before the first is waited for.
template <class A, class B, class Column, int COLUMNS>
__device__ __forceinline__ void load_two(const A* a, const B* b, Column column, int D, bool vector,
                                         float (&x)[COLUMNS], float (&y)[COLUMNS]) {
  constexpr int GROUPS = COLUMNS / 8;
  if (vector) {
    Eight<A> of_a[GROUPS];
    Eight<B> of_b[GROUPS];
#pragma unroll
    for (int i = 0; i < GROUPS; i++)
      of_a[i] = fetch(a, column(i), D), of_b[i] = fetch(b, column(i), D);
#pragma unroll
    for (int i = 0; i < GROUPS; i++) unpack(of_a[i], x + 8 * i), unpack(of_b[i], y + 8 * i);
  } else {
#pragma unroll
    for (int i = 0; i < GROUPS; i++)
      load(a, column(i), D, x + 8 * i), load(b, column(i), D, y + 8 * i);
  }
}

template <class T>
__device__ __forceinline__ void store(T* row, int first, int D, bool vector, const float* x) {
  Eight<T> eight;
#pragma unroll
  for (int e = 0; e < 8; e++) from_float(x[e], eight.x[e]);
  if (vector && first < D) {
    *reinterpret_cast<Eight<T>*>(row + first) = eight;
  } else {
#pragma unroll
    for (int e = 0; e < 8; e++)
      if (first + e < D) row[first + e] = eight.x[e];
  }
}

// -------------------------------------------------------------------------------------------------
// Router products on the tensor core, in bfloat16. A float32 number becomes a sum of PARTS bfloat16
// numbers: part 0 is its rounding, part 1 the rounding of the remainder, and so on.

// Splits two numbers: word[i] holds part i of both, x0's in the low half
template <int PARTS>
__device__ __forceinline__ void split_pair(float x0, float x1, uint32_t (&word)[PARTS]) {
#pragma unroll
  for (int i = 0; i < PARTS; i++) {
    word[i] = round_pair(x0, x1);
    x0 -= __uint_as_float(word[i] << 16), x1 -= __uint_as_float(word[i] & 0xffff0000u);
  }
}

// Splits four numbers: out[i] holds part i of x0, x1 (first word) and of x2, x3 (second word)
template <int PARTS>
__device__ __forceinline__ void split4(float x0, float x1, float x2, float x3,
                                       uint2 (&out)[PARTS]) {
  uint32_t low[PARTS], high[PARTS];
  split_pair(x0, x1, low), split_pair(x2, x3, high);
#pragma unroll
  for (int i = 0; i < PARTS; i++) out[i] = make_uint2(low[i], high[i]);
}

constexpr int groups_per_warp(int D) { return D <= 1152 ? 3 : 4; }  // 12 warps at most
// What __launch_bounds__ of the tile kernels says, to give a thread 128 registers, or 168
template <int GROUPS>
constexpr int thread_bound = GROUPS == 3 ? 512 : 384;
int warps_of(int D) { return int(ceil_div(D, 32 * groups_per_warp(D))); }
int groups_of(int D) { return warps_of(D) * groups_per_warp(D); }

// The order of the routers' fragments in memory: (router, part, tile of 16 choices, group of 32
// columns, half, lane), one uint4 each
struct FragmentOrder {
  int tiles, groups, parts;
  __host__ __device__ int64_t part_stride() const { return int64_t(tiles) * groups * 64; }
  __host__ __device__ int64_t at(int router, int tile, int group, int lane) const {
    return router * parts * part_stride() + (int64_t(tile) * groups + group) * 64 + lane;
  }
};

// One thread writes one lane's uint4 of a fragment; g = lane / 4, t = lane % 4.
// For logits = z R: half h is a matrix A = R^T (16 choices x 16 columns). Its columns are permuted
//   so that each lane meets its own columns: columns 2t, 2t+1, 2t+8, 2t+9 of A are columns 8t + 4h,
//   8t + 4h + 1, 8t + 4h + 2, 8t + 4h + 3 of the group.
// Transposed, for dz += dlogits R^T: half h is two matrices B = R^T (16 choices x 8 columns), with
//   numbers i = 2h and i = 2h + 1. Column g of B becomes column g of the product C, which lane
//   g / 2 of each token holds: so it is column 8 (g / 2) + 2i + g % 2 of the group.
__global__ void split_routers_kernel(const float* routers, int D, int n, FragmentOrder order,
                                     bool transposed, int64_t count, uint4* fragments) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread >= count) return;
  const int lane = thread % 32, half = thread / 32 % 2, group = thread / 64 % order.groups;
  const int tile = thread / 64 / order.groups % order.tiles,
            router = int(thread / order.part_stride());
  const int g = lane / 4, t = lane % 4;
  float x[8];
#pragma unroll
  for (int e = 0; e < 8; e++) {
    const int word = e / 2, low = e % 2;
    const int choice = 16 * tile + 8 * (word % 2) + (transposed ? 2 * t + low : g);
    const int column =
        32 * group + 4 * half + 2 * (word / 2) + (transposed ? 8 * (g / 2) + g % 2 : 8 * t + low);
    x[e] = choice < n && column < D ? routers[(int64_t(router) * D + column) * n + choice] : 0.0f;
  }
  for (int part = 0; part < order.parts; part++) {
    uint32_t word[4];
#pragma unroll
    for (int w = 0; w < 4; w++) {
      word[w] = round_pair(x[2 * w], x[2 * w + 1]);
      x[2 * w] -= __uint_as_float(word[w] << 16);
      x[2 * w + 1] -= __uint_as_float(word[w] & 0xffff0000u);
    }
    fragments[order.at(router, tile, group, 32 * half + lane) + part * order.part_stride()] =
        make_uint4(word[0], word[1], word[2], word[3]);
  }
}

// logits += R^T x over the columns of this warp (Eqs. 6 and 7): 16 choices x 8 tokens, one fragment
// C for each half, to be added up: a product waits for the last one on the same C. Part i of R
// meets part j of x if i + j < P; the other products are below the rounding. `fragment` is part 0
// of this tile, group and lane.
template <int P, int X_PARTS, int COLUMNS>
__device__ __forceinline__ void add_logits(float (&logits)[2][4], const uint4* fragment,
                                           int64_t part_stride, const float (&x)[COLUMNS]) {
#pragma unroll
  for (int group = 0; group < COLUMNS / 8; group++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint2 b[X_PARTS];
      const float* four = x + 8 * group + 4 * half;
      split4(four[0], four[1], four[2], four[3], b);
#pragma unroll
      for (int i = 0; i < P; i++) {
        const uint4 a = fragment[i * part_stride + 64 * group + 32 * half];
#pragma unroll
        for (int j = 0; j < X_PARTS && i + j < P; j++) mma(logits[half], a, b[j]);
      }
    }
}

// dx += dlogits R^T: 8 tokens x the columns of this warp. Rows 0 .. 7 of matrix A are the first
// part of the 8 tokens' dlogits, rows 8 .. 15 the second part; C[g] + C[g + 8] is the product with
// both. dlogits = dgate * list (padded(n)) are those of this lane's token, 0 from n on.
template <int P, int COLUMNS>
__device__ __forceinline__ void add_dlogits(float (&dx)[COLUMNS], const uint4* fragment,
                                            const FragmentOrder& order, const float* list,
                                            float dgate, int t) {
#pragma unroll 1
  for (int tile = 0; tile < order.tiles; tile++, fragment += order.groups * 64, list += 16) {
    uint2 part[P];
    split4(dgate * list[2 * t], dgate * list[2 * t + 1], dgate * list[2 * t + 8],
           dgate * list[2 * t + 9], part);
    const uint4 a = make_uint4(part[0].x, part[1].x, part[0].y, part[1].y);
#pragma unroll
    for (int group = 0; group < COLUMNS / 8; group++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float* four = dx + 8 * group + 4 * half;
        float c0[4] = {four[0], four[1], 0, 0}, c1[4] = {four[2], four[3], 0, 0};
#pragma unroll
        for (int i = 0; i < P; i++) {
          const uint4 b = fragment[i * order.part_stride() + 64 * group + 32 * half];
          mma(c0, a, make_uint2(b.x, b.y));
          mma(c1, a, make_uint2(b.z, b.w));
          if (P == 3 && i == 0) {  // the third part of dlogits meets the first part of R only
            const uint4 last = make_uint4(part[P - 1].x, 0, part[P - 1].y, 0);
            mma(c0, last, make_uint2(b.x, b.y));
            mma(c1, last, make_uint2(b.z, b.w));
          }
        }
        four[0] = c0[0] + c0[2], four[1] = c0[1] + c0[3], four[2] = c1[0] + c1[2],
        four[3] = c1[1] + c1[3];
      }
  }
}

// -------------------------------------------------------------------------------------------------
// Tiles.

// The place of a thread in its tile: token g, columns column(group) .. column(group) + 7
template <int GROUPS>
struct Place {
  int warp, warps, lane, g, t;
  __device__ Place()
      : warp(threadIdx.x / 32),
        warps(blockDim.x / 32),
        lane(threadIdx.x % 32),
        g(lane / 4),
        t(lane % 4) {}
  __device__ int column(int group) const { return 32 * (warp * GROUPS + group) + 8 * t; }
  __device__ int operator()(int group) const { return column(group); }
};

// four[side + 2 prime], one of Q, K, Q', K'. Indexed at run time the array would move from
// registers into memory.
template <class X>
__device__ __forceinline__ X of(const X (&four)[4], int side, int prime) {
  return prime ? (side ? four[3] : four[2]) : (side ? four[1] : four[0]);
}

// Four numbers that belong together, read at once; two; or one
template <int K>
struct alignas(4 * K) Numbers {
  float x[K];
};

__device__ __forceinline__ float add(float x, float y) { return x + y; }
__device__ __forceinline__ float maximum(float x, float y) { return fmaxf(x, y); }

// x = `combine` of x over the threads of the same token, in each of them. It takes a barrier
// between `put`, which leaves what the warp has, and `get`; buffer (warps, 8, K) may be used again
// after one more. K is 1, 2 or 4.
template <float combine(float, float), int K, int GROUPS>
__device__ __forceinline__ void put(Numbers<K> x, float* buffer, const Place<GROUPS>& at) {
#pragma unroll
  for (int k = 0; k < K; k++) {
    x.x[k] = combine(x.x[k], __shfl_xor_sync(ALL, x.x[k], 1));
    x.x[k] = combine(x.x[k], __shfl_xor_sync(ALL, x.x[k], 2));
  }
  if (at.t == 0) reinterpret_cast<Numbers<K>*>(buffer)[at.warp * TILE + at.g] = x;
}

template <float combine(float, float), int K, int GROUPS>
__device__ __forceinline__ Numbers<K> get(const float* buffer, const Place<GROUPS>& at) {
  const Numbers<K>* of_token = reinterpret_cast<const Numbers<K>*>(buffer) + at.g;
  Numbers<K> x = of_token[0];
#pragma unroll 2
  for (int w = 1; w < at.warps; w++) {
    const Numbers<K> next = of_token[w * TILE];
#pragma unroll
    for (int k = 0; k < K; k++) x.x[k] = combine(x.x[k], next.x[k]);
  }
  return x;
}

template <int K, int GROUPS>
__device__ __forceinline__ void row_sum(Numbers<K>& x, float* buffer, const Place<GROUPS>& at) {
  put<add>(x, buffer, at);
  __syncthreads();
  x = get<add, K>(buffer, at);
}

// The sum of x over the 8 tokens of the tile, for lanes with the same t
__device__ __forceinline__ float tile_sum(float x) {
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) x += __shfl_xor_sync(ALL, x, lanes);
  return x;
}

// The same for all columns of a thread: x[0 .. COLUMNS / 8 - 1] = the sums of the g-th eighth of
// its columns. Each step hands half of what is left to the lane of another token.
template <int LEFT, int TOKENS, int COLUMNS>
__device__ __forceinline__ void halve(float (&x)[COLUMNS], int g) {
  const bool upper = g & TOKENS;
#pragma unroll
  for (int i = 0; i < LEFT; i++) {
    const float low = x[i], high = x[LEFT + i];
    x[i] = (upper ? high : low) + __shfl_xor_sync(ALL, upper ? low : high, 4 * TOKENS);
  }
}

template <int COLUMNS>
__device__ __forceinline__ void tile_sums(float (&x)[COLUMNS], int g) {
  halve<COLUMNS / 2, 4>(x, g);
  halve<COLUMNS / 4, 2>(x, g);
  halve<COLUMNS / 8, 1>(x, g);
}

// The largest r of z and minus the smallest positive one, as far as this thread has it. The second
// is needed for negative gammas alone.
template <int COLUMNS>
__device__ __forceinline__ Numbers<2> extremes_of(const float (&z)[COLUMNS], bool negative_gammas) {
  Numbers<2> extremes = {{0, -FLT_MAX}};
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) extremes.x[0] = fmaxf(extremes.x[0], z[i]);
  if (negative_gammas)
#pragma unroll
    for (int i = 0; i < COLUMNS; i++)
      extremes.x[1] = fmaxf(extremes.x[1], z[i] > 0 ? -z[i] : -FLT_MAX);
  return extremes;
}

// Whether a gamma is negative; asked by a whole warp
__device__ __forceinline__ bool any_negative(const float* gamma, int n) {
  bool negative = false;
#pragma unroll 1
  for (int j = threadIdx.x % 32; j < n; j += 32) negative |= gamma[j] < 0;
  return __any_sync(ALL, negative);
}

// log2 t, and u = t^(exponent - 1) from it (phi.h). Tokens of 16 bits take the fast instructions.
template <class T>
__device__ __forceinline__ float log2_in(float t) {
  return sizeof(T) == 2 ? fast_log2(fmaxf(t, FLT_MIN)) : log2_of(t);
}
template <class T>
__device__ __forceinline__ float power_in(float l, float exponent) {
  return sizeof(T) == 2 ? fast_exp2(smaller((exponent - 1) * l, 127.0f))
                        : power_less_one(l, exponent);
}

// The arg max of a token's logits (Eqs. 6 and 7), found by its 4 lanes: of equal logits the lowest
// index, of NaN the first, which comes before every number. max: the logit itself.
__device__ __forceinline__ int choose(const float* logits, int n, int t, float& max) {
  int best = t < n ? t : n;
  max = t < n ? logits[t] : -INFINITY;
#pragma unroll 1
  for (int j = t + 4; j < n; j += 4) {
    const float next = logits[j];
    if (!(next <= max) && max == max) best = j, max = next;
  }
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    const float other = __shfl_xor_sync(ALL, max, lanes);
    const int index = __shfl_xor_sync(ALL, best, lanes);
    const bool lower = index < best;
    const bool nan = other != other;
    if (nan ? max == max || lower : other > max || (other == max && lower))
      best = index, max = other;
  }
  return best;
}

// gamma or lambda of this choice, times its gate if there is one
__device__ __forceinline__ float chosen(const float* values, int best, float max, bool gated) {
  return gated ? values[best] * gate(max) : values[best];
}

// Offsets into the shared memory of a block, in floats: buffers for sums and maxima over a token,
// the logits of the three routers that a token meets, and the partial logits of each warp, or, in
// the backward, what the routers chose. A token's logits take padded(n) + 1 floats, so that the 8
// tokens lie in different banks.
struct Shared {
  int warps, stride_F, stride_D;
  __host__ __device__ Shared(int warps, int n_F, int n_D)
      : warps(warps), stride_F(padded(n_F) + 1), stride_D(padded(n_D) + 1) {}
  __host__ __device__ int sums() const { return 0; }                   // (warps, 8, 4)
  __host__ __device__ int sums2() const { return warps * TILE * 4; }   // (warps, 8, 2)
  __host__ __device__ int maxima() const { return warps * TILE * 6; }  // (warps, 8, 4)
  __host__ __device__ int kernel(int prime) const {
    return warps * TILE * 10 + prime * TILE * stride_F;
  }
  __host__ __device__ int difference() const { return kernel(2); }
  __host__ __device__ int last() const { return difference() + TILE * stride_D; }
  // (2, warps, 16, 8): the partial logits; or (3, 8) of Choice
};

// partial (warps, 16, 8) [this warp] = logits: 16 choices x 8 tokens, over the warp's columns
template <int GROUPS>
__device__ __forceinline__ void put_partial(const float (&logits)[2][4], float* partial,
                                            const Place<GROUPS>& at) {
  Numbers<2>* mine = reinterpret_cast<Numbers<2>*>(partial) + (at.warp * 16 + at.g) * 4 + at.t;
  mine[0] = {{logits[0][0] + logits[1][0], logits[0][1] + logits[1][1]}};
  mine[8 * 4] = {{logits[0][2] + logits[1][2], logits[0][3] + logits[1][3]}};
}

// The sum of `partial` over the warps, into list (8, stride), and into rows first .. end - 1 of
// out (rows, n). Each of 32 threads takes one choice and 4 tokens.
__device__ __forceinline__ void sum_partial(const float* partial, int warps, int thread, int tile,
                                            int n, float* list, int stride, int64_t first,
                                            int64_t end, float* out) {
  const int choice = 16 * tile + thread / 2, token = thread % 2 * 4;
  if (choice >= n) return;
  const Numbers<4>* four = reinterpret_cast<const Numbers<4>*>(partial) + thread;
  Numbers<4> sum = four[0];
#pragma unroll 2
  for (int w = 1; w < warps; w++) {
    const Numbers<4> next = four[w * 32];
#pragma unroll
    for (int i = 0; i < 4; i++) sum.x[i] += next.x[i];
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    list[(token + i) * stride + choice] = sum.x[i];
    if (first + token + i < end) out[(first + token + i) * n + choice] = sum.x[i];
  }
}

// Eqs. 5 to 8 for one side, and from d, before it is rounded, what Eq. 4 needs of it. Grid
// (B tiles_of(N)): a tile has tokens of one image. Block: 32 threads for every 32 GROUPS columns.
// Each token is read once, and nothing is computed twice. Shared memory: Shared and the partial
// logits, at most 40 KB.
template <class T, int GROUPS>
__global__ void __launch_bounds__(thread_bound<GROUPS>)
    features_kernel(Features<T> in, int side, float* kernel_logits, float* difference_logits,
                    typename Core<T>::type* d, Denominator denominator) {
  constexpr int P = parts<T>;
  extern __shared__ float shared[];
  const Place<GROUPS> at;
  const Shared memory(at.warps, in.n_F, in.n_D);
  const int D = in.D, tiles = tiles_of(in.N), image = blockIdx.x / tiles;
  const int64_t first = int64_t(image) * in.N + blockIdx.x % tiles * TILE, row = first + at.g,
                end = int64_t(image + 1) * in.N;
  const int width = row < end ? D : 0;  // tokens beyond the image's last are rows of zeros
  const bool negative_gammas = any_negative(in.gamma, in.n_F);
  const FragmentOrder of_F{padded(in.n_F) / 16, at.warps * GROUPS, P},
      of_D{padded(in.n_D) / 16, at.warps * GROUPS, P};

  float z[2][8 * GROUPS];  // z and z', later t and t', p and p', z~ and z~'
  const Tokens<T> tokens = of(in.z, side, 0), primes = of(in.z, side, 1);
  load_two(tokens.data + (width ? row : 0) * tokens.ld, primes.data + (width ? row : 0) * primes.ld,
           at, width, in.vector, z[0], z[1]);
  {
    const Numbers<2> of_z = extremes_of(z[0], negative_gammas),
                     of_z_prime = extremes_of(z[1], negative_gammas);
    put<maximum>(Numbers<4>{{of_z.x[0], of_z.x[1], of_z_prime.x[0], of_z_prime.x[1]}},
                 shared + memory.maxima(), at);
  }
  for (int tile = 0; tile < of_F.tiles; tile++) {  // logits = z R_F, z' R_F' (Eq. 6)
#pragma unroll
    for (int prime = 0; prime < 2; prime++) {
      float logits[2][4] = {};
      const int64_t fragment = of_F.at(side + 2 * prime, tile, at.warp * GROUPS, at.lane);
      add_logits<P, token_parts<T>>(logits, in.kernel_routers + fragment, of_F.part_stride(),
                                    z[prime]);
      put_partial(logits, shared + memory.last() + prime * at.warps * 16 * TILE, at);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < 64; e += blockDim.x) {
      const int prime = e / 32;
      sum_partial(shared + memory.last() + prime * at.warps * 16 * TILE, at.warps, e % 32, tile,
                  in.n_F, shared + memory.kernel(prime), memory.stride_F, first, end,
                  kernel_logits + (side + 2 * prime) * in.rows * in.n_F);
    }
    __syncthreads();
  }

  const Numbers<4> extremes = get<maximum, 4>(shared + memory.maxima(), at);
  float m[2];
  Numbers<4> sums = {};  // |t|^2, |p|^2, |t'|^2, |p'|^2
#pragma unroll
  for (int prime = 0; prime < 2; prime++) {
    float max;
    const int best = choose(shared + memory.kernel(prime) + at.g * memory.stride_F, in.n_F, at.t,
                            max);
    const float gamma = chosen(in.gamma, best, max, in.router_grad);  // of the arg max (Eq. 6)
    m[prime] = scale_of(gamma, extremes.x[2 * prime], -extremes.x[2 * prime + 1]);
    const float inv_m = reciprocal(m[prime]), exponent = exponent_of(gamma, m[prime]);
#pragma unroll
    for (int i = 0; i < 8 * GROUPS; i++) {
      const float t = larger(z[prime][i], 0.0f) * inv_m;       // t = r / m
      z[prime][i] = t * power_in<T>(log2_in<T>(t), exponent);  // p = t^gamma (Eq. 5)
      sums.x[2 * prime] += t * t;
      sums.x[2 * prime + 1] += z[prime][i] * z[prime][i];
    }
  }
  row_sum(sums, shared + memory.sums(), at);
#pragma unroll
  for (int prime = 0; prime < 2; prime++) {
    const float scale =
        PhiRow<float>{m[prime], sqrtf(sums.x[2 * prime]), sqrtf(sums.x[2 * prime + 1])}.scale();
#pragma unroll
    for (int i = 0; i < 8 * GROUPS; i++) z[prime][i] *= scale;  // z~ = (m s / n) p (Eq. 5)
  }

  for (int tile = 0; tile < of_D.tiles; tile++) {  // logits = [z~, z~'] R_D (Eq. 7)
    float logits[2][4] = {};
#pragma unroll
    for (int prime = 0; prime < 2; prime++) {
      const int64_t fragment = of_D.at(2 * side + prime, tile, at.warp * GROUPS, at.lane);
      add_logits<P, P>(logits, in.difference_routers + fragment, of_D.part_stride(), z[prime]);
    }
    put_partial(logits, shared + memory.last(), at);
    __syncthreads();
    if (at.warp == 0)
      sum_partial(shared + memory.last(), at.warps, at.lane, tile, in.n_D,
                  shared + memory.difference(), memory.stride_D, first, end,
                  difference_logits + side * in.rows * in.n_D);
    __syncthreads();
  }

  float max;  // lambda = that of the arg max (Eq. 7); d = z~ - lambda z~' (Eq. 8)
  const int best =
      choose(shared + memory.difference() + at.g * memory.stride_D, in.n_D, at.t, max);
  const float lam = chosen(in.lam, best, max, in.router_grad);
#pragma unroll
  for (int i = 0; i < 8 * GROUPS; i++) z[0][i] -= lam * z[1][i];
#pragma unroll
  for (int group = 0; group < GROUPS; group++)
    store(d + (width ? row : 0) * D, at.column(group), width, in.vector, z[0] + 8 * group);

  if (side == 1 && denominator.partial != nullptr) {  // sums of Dk_j and |Dk_j| over the tile
    float* partial = denominator.partial + int64_t(blockIdx.x) * (D + 1);
    Numbers<1> square = {};
#pragma unroll
    for (int i = 0; i < 8 * GROUPS; i++) {
      z[0][i] = width ? z[0][i] : 0.0f;  // a lambda or router may be NaN
      square.x[0] += z[0][i] * z[0][i];
    }
    tile_sums(z[0], at.g);
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
      const int mine = GROUPS * at.g + i, column = at.column(mine / 8) + mine % 8;
      if (column < D) partial[column] = z[0][i];
    }
    row_sum(square, shared + memory.sums2(), at);
    const float norms = tile_sum(sqrtf(square.x[0]));
    if (threadIdx.x == 0) partial[D] = norms;
  }
  if (side == 0 && denominator.den != nullptr) {  // of Dq_i (Guard in phi.h)
    const float* k_sum = denominator.k_sum + int64_t(image) * (D + 1);
    Numbers<2> sums = {};  // <Dq_i, K>, |Dq_i|^2
#pragma unroll
    for (int i = 0; i < 8 * GROUPS; i++) {
      const int column = at.column(i / 8) + i % 8;
      sums.x[0] += column < D ? z[0][i] * k_sum[column] : 0.0f;
      sums.x[1] += z[0][i] * z[0][i];
    }
    row_sum(sums, shared + memory.sums2(), at);
    const Guard<float> guard(sums.x[0], sqrtf(sums.x[1]), k_sum[D], denominator.eps);
    if (at.warp == 0 && at.t == 0 && width)
      denominator.den[row] = guard.open ? guard.den : -guard.den;
  }
}

// What a router chose for a token: gamma or lambda times its gate, the gate, the index
struct Choice {
  float value, gate;
  int index;
};

// The three routers of a side, for the tokens from row `first` on: their choices, and in `list`
// (8, stride) of each router the gradient of its gate: [j = index] - softmax_j, and 0 for j >= n.
// Four lanes work on each router and token; a lane has every fourth j.
template <class T>
__device__ __forceinline__ void choose_all(const Features<T>& in, const FeatureGradients<T>& grad,
                                           const Shared& memory, int64_t first, float* shared,
                                           Choice* choices) {
  const int side = blockIdx.y, t = threadIdx.x % 4;
#pragma unroll 1
  for (int pair = threadIdx.x / 4; pair < 3 * TILE; pair += blockDim.x / 4) {
    const int router = pair / TILE, token = pair % TILE, n = router < 2 ? in.n_F : in.n_D;
    const int64_t row = first + token;
    const float* logits = router < 2 ? grad.kernel_logits + (side + 2 * router) * in.rows * n
                                     : grad.difference_logits + side * in.rows * n;
    float* list = router < 2 ? shared + memory.kernel(router) + token * memory.stride_F
                             : shared + memory.difference() + token * memory.stride_D;
#pragma unroll 4
    for (int j = t; j < n; j += 4) list[j] = row < in.rows ? logits[row * n + j] : 0.0f;
    float max, sum = 0;
    const int best = choose(list, n, t, max);
    if (t == 0)
      choices[pair] = {chosen(router < 2 ? in.gamma : in.lam, best, max, in.router_grad),
                       in.router_grad ? gate(max) : 1.0f, best};
    if (!in.router_grad) continue;
#pragma unroll 1
    for (int j = t; j < n; j += 4) sum += list[j] = softmax_numerator(list[j], max);
    sum += __shfl_xor_sync(ALL, sum, 1);
    sum += __shfl_xor_sync(ALL, sum, 2);
#pragma unroll 1
    for (int j = t; j < padded(n); j += 4)
      list[j] = j < n ? dlogit(1.0f, j == best, list[j] / sum) : 0.0f;
  }
}

// A token's dlogits, as dlogit_parts numbers each, for the product dR = x^T dlogits; by 4 lanes
template <class S>
__device__ __forceinline__ void store_dlogits(const float* list, float dgate, int n, int t,
                                              S* out) {
  const int columns = padded(n);
#pragma unroll 1
  for (int j = t; j < columns; j += 4) {
    float d = dgate * list[j];
#pragma unroll
    for (int part = 0; part < dlogit_parts<S>; part++) {
      from_float(d, out[part * columns + j]);
      d -= to_float(out[part * columns + j]);
    }
  }
}

// The backward of Eqs. 8 to 5. Grid (ceil(rows / 8), 2): blockIdx.y is the side. Block as in
// features_kernel. The tokens are read again and their powers computed again, first those of z':
// dlambda, and with it the gradient of the difference router, which both z and z' need, depends on
// z~'. dDq (dDk) is read for both. Every element of a result is written once, by its owner. Shared
// memory: Shared and the choices, at most 28 KB.
template <class T, int GROUPS>
__global__ void __launch_bounds__(thread_bound<GROUPS>)
    features_backward_kernel(Features<T> in, FeatureGradients<T> grad) {
  using S = typename Core<T>::type;
  constexpr int P = parts<T>;
  extern __shared__ float shared[];
  const Place<GROUPS> at;
  const Shared memory(at.warps, in.n_F, in.n_D);
  const int side = blockIdx.y, D = in.D;
  const int64_t first = int64_t(blockIdx.x) * TILE, row = first + at.g, rows = in.rows;
  const int width = row < rows ? D : 0;
  const int64_t safe_row = width ? row : 0;  // so that all addresses exist
  const bool negative_gammas = any_negative(in.gamma, in.n_F);
  const FragmentOrder of_F{padded(in.n_F) / 16, at.warps * GROUPS, P},
      of_D{padded(in.n_D) / 16, at.warps * GROUPS, P};

  float t[8 * GROUPS], u[8 * GROUPS], g[8 * GROUPS];  // t = z at first; g = dd, then dz~, then dz
  const auto read = [&](int prime) {
    const Tokens<T> tokens = of(in.z, side, prime);
    load_two(tokens.data + safe_row * tokens.ld, (side ? grad.ddk : grad.ddq) + safe_row * D, at,
             width, in.vector, t, g);
  };
  read(1);
  const Tokens<T> later = of(in.z, side, 0);
#pragma unroll
  for (int group = 0; group < GROUPS; group++)  // for read(0)
    if (at.column(group) < width) prefetch(later.data + row * later.ld + at.column(group));

  Choice* choices = reinterpret_cast<Choice*>(shared + memory.last());
  choose_all(in, grad, memory, first, shared, choices);
  __syncthreads();
  choices += at.g;
  const Choice& difference = choices[2 * TILE];
  const float lam = difference.value;
  const float* of_difference = shared + memory.difference() + at.g * memory.stride_D;
  float dgate_D = 0;

#pragma unroll  // as a loop it would keep the addresses of its next round in registers, and spill
  for (int prime = 1; prime >= 0; prime--) {
    const int router = side + 2 * prime;
    const float* of_kernel = shared + memory.kernel(prime) + at.g * memory.stride_F;
    const Choice& kernel = choices[prime * TILE];
    const float gamma = kernel.value;
    if (!prime) read(0);
    put<maximum>(extremes_of(t, negative_gammas), shared + memory.maxima(), at);
    __syncthreads();
    const Numbers<2> extremes = get<maximum, 2>(shared + memory.maxima(), at);
    const float m = scale_of(gamma, extremes.x[0], -extremes.x[1]);
    const float inv_m = reciprocal(m), exponent = exponent_of(gamma, m);
    Numbers<4> sums = {};  // |t|^2, |p|^2, h = <p, p l>, <dd, p>
#pragma unroll
    for (int i = 0; i < 8 * GROUPS; i++) {
      t[i] = larger(t[i], 0.0f) * inv_m;  // t = r / m
      const float l = log2_in<T>(t[i]);   // l = log2 t
      u[i] = power_in<T>(l, exponent);    // u = t^(gamma - 1)
      const float p = t[i] * u[i];        // p = t^gamma
      sums.x[0] += t[i] * t[i];
      sums.x[1] += p * p;
      sums.x[2] += p * (p * l);
      sums.x[3] += g[i] * p;
    }
    row_sum(sums, shared + memory.sums(), at);
    const PhiRow<float> stats{m, sqrtf(sums.x[0]), sqrtf(sums.x[1])};

    if (prime) {
      const float dlam = -stats.scale() * sums.x[3];  // dlambda = -<dd, z~'> (Eq. 8)
      dgate_D = dlam * lam;
      if (at.warp == 0 && width) {
        if (in.router_grad)
          store_dlogits(of_difference, dgate_D, in.n_D, at.t,
                        grad.difference_dlogits +
                            (side * rows + row) * dlogit_parts<S> * padded(in.n_D));
        if (at.t == 0) {
          grad.dchosen[(4 + side) * rows + row] = dlam * difference.gate;
          grad.index[(4 + side) * rows + row] = difference.index;
        }
      }
    }
    if (in.router_grad) {
      const float scale = stats.scale();
      S* pair = grad.pair + (side * rows + safe_row) * 2 * D + prime * D;
#pragma unroll
      for (int group = 0; group < GROUPS; group++) {
        float y[8];
#pragma unroll
        for (int e = 0; e < 8; e++) y[e] = scale * (t[8 * group + e] * u[8 * group + e]);
        store(pair, at.column(group), width, in.vector, y);
      }
    }
#pragma unroll
    for (int i = 0; i < 8 * GROUPS; i++)
      g[i] *= prime ? -lam : 1.0f;  // dz~ = dd, dz~' = -lambda dd
    if (in.router_grad)           // += dlogits R_D^T (Eq. 7)
      add_dlogits<P>(
          g, in.difference_routers + of_D.at(2 * side + prime, 0, at.warp * GROUPS, at.lane), of_D,
          of_difference, dgate_D, at.t);
    Numbers<2> ab = {};  // a = <G, p>, b = <G, p l>
#pragma unroll
    for (int i = 0; i < 8 * GROUPS; i++) {
      const float gp = g[i] * (t[i] * u[i]);
      ab.x[0] += gp;
      ab.x[1] += gp * log2_in<T>(t[i]);
    }
    row_sum(ab, shared + memory.sums2(), at);
    const PhiRowBackward<float> back(stats, gamma, ab.x[0], ab.x[1], sums.x[2]);
#pragma unroll
    for (int i = 0; i < 8 * GROUPS; i++) g[i] = back.dz(g[i], t[i], u[i]);  // dz~ -> dz (Eq. 5)

    const float dgate = back.dgamma * gamma;
    if (at.warp == 0 && width) {
      if (in.router_grad)
        store_dlogits(of_kernel, dgate, in.n_F, at.t,
                      grad.kernel_dlogits +
                          (router * rows + row) * dlogit_parts<S> * padded(in.n_F));
      if (at.t == 0) {
        grad.dchosen[router * rows + row] = back.dgamma * kernel.gate;
        grad.index[router * rows + row] = kernel.index;
      }
    }
    if (in.router_grad)  // dz += dlogits R_F^T (Eq. 6)
      add_dlogits<P>(g, in.kernel_routers + of_F.at(router, 0, at.warp * GROUPS, at.lane), of_F,
                     of_kernel, dgate, at.t);
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
      store(of(grad.dz, side, prime) + safe_row * D, at.column(group), width, in.vector,
            g + 8 * group);
  }
}

// Grid (at most BIN_BLOCKS, ceil(n / BINS)), block 256. A block has BINS of the bins; a thread
// takes every (256 blocks)-th element. partial (blocks * WARPS, n).
constexpr int BIN_BLOCKS = 32, WARPS = 8, BINS = 16;

__global__ void __launch_bounds__(32 * WARPS)
    bin_sums_kernel(int64_t count, int n, const int* index, const float* values, float* partial) {
  const int first = BINS * blockIdx.y, warp = blockIdx.x * WARPS + threadIdx.x / 32;
  float sums[BINS] = {};
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * blockDim.x) {
    const int choice = index[i] - first;
    const float value = values[i];
#pragma unroll
    for (int k = 0; k < BINS; k++) sums[k] += choice == k ? value : 0.0f;
  }
#pragma unroll
  for (int k = 0; k < BINS; k++) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sums[k] += __shfl_xor_sync(ALL, sums[k], lanes);
    if (threadIdx.x % 32 == 0 && first + k < n) partial[warp * n + first + k] = sums[k];
  }
}

// sums (B, groups, width) = the sum of partial (B, splits, width) over every `size` splits, in
// order. Grid (B groups, ceil(width / 256)); a thread owns a column.
__global__ void sum_partials_kernel(int splits, int groups, int size, int width,
                                    const float* partial, float* sums) {
  const int j = blockIdx.y * blockDim.x + threadIdx.x;
  if (j >= width) return;
  const int first = blockIdx.x % groups * size, end = min(splits, first + size);
  partial += int64_t(blockIdx.x / groups) * splits * width + j;
  float sum = 0;
  for (int split = first; split < end; split++) sum += partial[int64_t(split) * width];
  sums[int64_t(blockIdx.x) * width + j] = sum;
}

// -------------------------------------------------------------------------------------------------
// Rows. Grid (ceil(rows / 8)), block 256: each of the 8 warps owns a row of at most CHUNKS * 256
// columns.

template <int K>
__device__ __forceinline__ void warp_sum(float (&x)[K]) {
#pragma unroll
  for (int k = 0; k < K; k++)
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x[k] += __shfl_xor_sync(ALL, x[k], lanes);
}

// The columns of a lane: column(i) .. column(i) + 7
__device__ __forceinline__ int column(int i) { return 8 * int(threadIdx.x % 32) + 256 * i; }

template <class T, int COLUMNS>
__device__ __forceinline__ void load_row(const T* row, int D, bool vector, float (&x)[COLUMNS]) {
#pragma unroll
  for (int i = 0; i < COLUMNS / 8; i++) {
    if (vector) unpack(fetch(row, column(i), D), x + 8 * i);
    else load(row, column(i), D, x + 8 * i);
  }
}

template <class T, int COLUMNS>
__device__ __forceinline__ void store_row(T* row, int D, bool vector, const float (&x)[COLUMNS]) {
#pragma unroll
  for (int i = 0; i < COLUMNS / 8; i++)
    store(row, column(i), D, vector, x + 8 * i);
}

template <int COLUMNS>
__device__ __forceinline__ float dot(const float (&x)[COLUMNS], const float (&y)[COLUMNS]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) sum += x[i] * y[i];
  return sum;
}

template <int COLUMNS>
__device__ __forceinline__ void add_scaled(float scale, const float (&x)[COLUMNS],
                                           float (&y)[COLUMNS]) {
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) y[i] += scale * x[i];
}

// out (D + 1) = the sum of `columns`, and of `last`, over the 8 warps of a block, in their order.
// total: D + 1 floats of shared memory
template <int COLUMNS>
__device__ __forceinline__ void block_total(const float (&columns)[COLUMNS], float last, int D,
                                            float* total, float* out) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int w = 0; w < WARPS; w++) {
    if (warp == w) {
#pragma unroll
      for (int i = 0; i < COLUMNS; i++) {
        const int j = 8 * lane + i / 8 * 256 + i % 8;
        if (j < D) total[j] = (w ? total[j] : 0.0f) + columns[i];
      }
      if (lane == 0) total[D] = (w ? total[D] : 0.0f) + last;
    }
    __syncthreads();
  }
  for (int j = threadIdx.x; j <= D; j += blockDim.x) out[j] = total[j];
}

// ddk += c + c_norm Dk / |Dk|, in place; c (B, D + 1) ends with c_norm. Grid (B, splits), as below.
template <class S, int CHUNKS>
__global__ void __launch_bounds__(32 * WARPS)
    sum_keys_backward_kernel(int N, int D, const S* dk, const float* c, S* ddk) {
  const int64_t image = blockIdx.x;
  const int split = blockIdx.y, end = min(N, (split + 1) * SPLIT);
  const bool vector = D % 8 == 0;
  c += image * (D + 1);
  float y[8 * CHUNKS];
  load_row(c, D, false, y);
  for (int i = split * SPLIT + int(threadIdx.x / 32); i < end; i += WARPS) {
    const int64_t row = image * N + i;
    float x[8 * CHUNKS], gradient[8 * CHUNKS];
    load_two(dk + row * D, ddk + row * D, column, D, vector, x, gradient);
    float square[1] = {dot(x, x)};
    warp_sum(square);
    add_scaled(1.0f, y, gradient);
    add_scaled(square[0] > 0 ? c[D] / sqrtf(square[0]) : 0.0f, x, gradient);  // |0| has gradient 0
    store_row(ddk + row * D, D, vector, gradient);
  }
}

// y = x / |den|; y may be x
template <class S, int CHUNKS>
__global__ void __launch_bounds__(32 * WARPS)
    divide_kernel(int64_t rows, int D, const S* x, const float* den, S* y) {
  const int64_t row = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (row >= rows) return;
  const bool vector = D % 8 == 0;
  float from[8 * CHUNKS], result[8 * CHUNKS] = {};
  load_row(x + row * D, D, vector, from);
  add_scaled(1 / fabsf(den[row]), from, result);
  store_row(y + row * D, D, vector, result);
}

// The backward of den. out = num / den, and num is linear in Dq: with ddq, on entry the gradient
// through num, dden = -<dnum, num> / den = -<ddq, Dq> / den. Then ddq += the gradient through den,
// in place; partial (B, splits, D + 1) = the gradient of k_sum. Grid (B, splits), splits =
// ceil(N / SPLIT): a block owns SPLIT rows of one image, warp w of it rows w, w + 8, ... Shared
// memory: D + 1 floats.
template <class S, int CHUNKS>
__global__ void __launch_bounds__(32 * WARPS, CHUNKS == 2 ? 3 : 1)
    denominator_backward_kernel(int N, int D, const S* dq, const float* k_sum, const float* den,
                                S* ddq, float* partial) {
  extern __shared__ float shared[];
  const int64_t image = blockIdx.x;
  const int split = blockIdx.y, splits = gridDim.y, end = min(N, (split + 1) * SPLIT);
  const bool vector = D % 8 == 0;
  k_sum += image * (D + 1);
  float k[8 * CHUNKS], c[8 * CHUNKS] = {}, c_norm = 0;
  load_row(k_sum, D, false, k);
  for (int i = split * SPLIT + int(threadIdx.x / 32); i < end; i += WARPS) {
    const int64_t row = image * N + i;
    float q[8 * CHUNKS], gradient[8 * CHUNKS];
    load_two(dq + row * D, ddq + row * D, column, D, vector, q, gradient);
    float sums[2] = {dot(q, q), dot(gradient, q)};
    warp_sum(sums);
    const float norm = sqrtf(sums[0]), dden = -sums[1] / fabsf(den[row]);
    if (!(den[row] < 0)) {  // den = <Dq, k_sum> + eps
      add_scaled(dden, k, gradient);
      add_scaled(dden, q, c);
    } else {  // den = 1e-3 |Dq| sum |Dk| + eps
      add_scaled(norm > 0 ? 1e-3f * dden * k_sum[D] / norm : 0.0f, q, gradient);
      c_norm += 1e-3f * dden * norm;
    }
    store_row(ddq + row * D, D, vector, gradient);
  }
  block_total(c, c_norm, D, shared, partial + (image * splits + split) * (D + 1));
}

}  // namespace

// -------------------------------------------------------------------------------------------------
// Launches.

int64_t fragments(int D, int n, int parts) {
  return 4 * parts * FragmentOrder{padded(n) / 16, groups_of(D), parts}.part_stride();
}

void split_routers(const float* routers, int D, int n, int parts, bool transposed, uint4* fragments,
                   cudaStream_t stream) {
  const FragmentOrder order{padded(n) / 16, groups_of(D), parts};
  const int64_t count = 4 * order.part_stride();
  launch(split_routers_kernel, dim3(unsigned(ceil_div(count, 256))), 256, 0, stream, routers, D, n,
         order, transposed, count, fragments);
}

template <class T>
void features(const Features<T>& in, int side, float* kernel_logits, float* difference_logits,
              typename Core<T>::type* d, const Denominator& denominator, cudaStream_t stream) {
  const int warps = warps_of(in.D);
  const size_t shared =
      (Shared(warps, in.n_F, in.n_D).last() + 2 * warps * 16 * TILE) * sizeof(float);
  const auto kernel = groups_per_warp(in.D) == 3 ? features_kernel<T, 3> : features_kernel<T, 4>;
  const int64_t images = in.N ? in.rows / in.N : 0;
  launch(kernel, dim3(unsigned(images * tiles_of(in.N))), 32 * warps, shared, stream, in, side,
         kernel_logits, difference_logits, d, denominator);
}

template <class T>
void features_backward(const Features<T>& in, const FeatureGradients<T>& grad,
                       cudaStream_t stream) {
  const int warps = warps_of(in.D);
  const size_t shared =
      Shared(warps, in.n_F, in.n_D).last() * sizeof(float) + 3 * TILE * sizeof(Choice);
  const auto kernel =
      groups_per_warp(in.D) == 3 ? features_backward_kernel<T, 3> : features_backward_kernel<T, 4>;
  launch(kernel, dim3(unsigned(ceil_div(in.rows, TILE)), 2), 32 * warps, shared, stream, in, grad);
}

int bin_sums_partial(int n) { return BIN_BLOCKS * WARPS * n; }

// sums (B, groups, width), where each group has `size` splits
static void sum_partials(int B, int splits, int size, int width, const float* partial, float* sums,
                         cudaStream_t stream) {
  const int groups = splits > size ? int(ceil_div(splits, size)) : 1;
  launch(sum_partials_kernel, dim3(unsigned(B * groups), unsigned(ceil_div(width, 256))), 256, 0,
         stream, splits, groups, size, width, partial, sums);
}

int64_t sum_keys_partial(int B, int N, int D) {
  return B * (tiles_of(N) + ceil_div(tiles_of(N), SPLIT)) * (D + 1);
}

void sum_keys(int B, int N, int D, float* partial, float* k_sum, cudaStream_t stream) {
  const int tiles = tiles_of(N), groups = int(ceil_div(tiles, SPLIT));
  float* of_group = partial + int64_t(B) * tiles * (D + 1);
  if (groups > 1) sum_partials(B, tiles, SPLIT, D + 1, partial, of_group, stream);
  if (groups > 1) sum_partials(B, groups, groups, D + 1, of_group, k_sum, stream);
  else sum_partials(B, tiles, SPLIT, D + 1, partial, k_sum, stream);
}

void bin_sums(int64_t count, int n, const int* index, const float* values, float* partial,
              float* sums, cudaStream_t stream) {
  const int64_t needed = ceil_div(count, 32 * WARPS);
  const int blocks = needed < 1 ? 1 : needed > BIN_BLOCKS ? BIN_BLOCKS : int(needed);
  const dim3 grid(unsigned(blocks), unsigned(ceil_div(n, BINS)));
  launch(bin_sums_kernel, grid, 32 * WARPS, 0, stream, count, n, index, values, partial);
  sum_partials(1, blocks * WARPS, blocks * WARPS, n, partial, sums, stream);
}

template <class S>
void Rows<S>::sum_keys_backward(int B, int N, int D, const S* dk, const float* c, S* ddk,
                                cudaStream_t stream) {
  const auto kernel = D <= 512    ? sum_keys_backward_kernel<S, 2>
                      : D <= 1024 ? sum_keys_backward_kernel<S, 4>
                                  : sum_keys_backward_kernel<S, 6>;
  const dim3 grid(unsigned(B), unsigned(ceil_div(N, SPLIT)));
  launch(kernel, grid, 32 * WARPS, 0, stream, N, D, dk, c, ddk);
}

template <class S>
void Rows<S>::divide(int B, int N, int D, const S* x, const float* den, S* y, cudaStream_t stream) {
  const int64_t rows = int64_t(B) * N;
  const auto kernel = D <= 512    ? divide_kernel<S, 2>
                      : D <= 1024 ? divide_kernel<S, 4>
                                  : divide_kernel<S, 6>;
  launch(kernel, dim3(unsigned(ceil_div(rows, WARPS))), 32 * WARPS, 0, stream, rows, D, x, den, y);
}

template <class S>
void Rows<S>::denominator_backward(int B, int N, int D, const S* dq, const float* k_sum,
                                   const float* den, S* ddq, float* partial, float* c,
                                   cudaStream_t stream) {
  const int splits = int(ceil_div(N, SPLIT));
  const auto kernel = D <= 512    ? denominator_backward_kernel<S, 2>
                      : D <= 1024 ? denominator_backward_kernel<S, 4>
                                  : denominator_backward_kernel<S, 6>;
  launch(kernel, dim3(unsigned(B), unsigned(splits)), 32 * WARPS, (D + 1) * sizeof(float), stream,
         N, D, dq, k_sum, den, ddq, partial);
  sum_partials(B, splits, splits, D + 1, partial, c, stream);
}

#define INSTANTIATE(T)                                                                          \
  template void features<T>(const Features<T>&, int, float*, float*, Core<T>::type*,            \
                            const Denominator&, cudaStream_t);                                  \
  template void features_backward<T>(const Features<T>&, const FeatureGradients<T>&, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)
template struct Rows<float>;
template struct Rows<__nv_bfloat16>;

}  // namespace dydilit::cuda
