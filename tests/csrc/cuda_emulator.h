// Runs the kernels of csrc/cuda_kernels.cu on the CPU, for tests on a machine without a GPU. Each
// thread of a block is a fiber; a barrier or a shuffle passes control on until every thread that
// takes part has arrived. Warps take turns in an order that a seed shuffles, and each runs until a
// barrier of the block stops it: a missing barrier then gives a wrong result. Shared memory is NaN
// when a block starts. The language alone is emulated: no memory model, no streams, no timing.
#pragma once
#define DYDILIT_CUDA_MMA  // in place of csrc/cuda_mma.cuh
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
using std::min;
inline dim3 gridDim, blockDim, blockIdx(0, 0, 0);  // those of the running block

// ------------------------------------------------------------------------------------------------
// 16-bit numbers, round to nearest even.

struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t wide = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &wide, 4);
  return y;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return {uint16_t(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct __half { uint16_t bits; };
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                    : std::ldexp(float(fraction), -24);
  return x.bits >> 15 ? -size : size;
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (size != size) return {0x7fff};
  if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  int exponent = size > 0 ? std::max(std::ilogb(size), -14) : -14;
  // the hidden bit of the fraction adds 1 to the exponent
  const int fraction = int(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return {uint16_t(sign | (((exponent + 14) << 10) + fraction))};
}

// ------------------------------------------------------------------------------------------------
// Threads.

// The dynamic shared memory of a block, under the names that the kernels declare
namespace dydilit::cuda {
namespace {
constexpr size_t SHARED_BYTES = 48 << 10;
alignas(16) float shared[SHARED_BYTES / 4];
int counters[SHARED_BYTES / 4], totals[SHARED_BYTES / 4];

void poison_shared() {
  std::fill(std::begin(shared), std::end(shared), NAN);
  std::fill(std::begin(counters), std::end(counters), INT32_MIN);
  std::fill(std::begin(totals), std::end(totals), INT32_MIN);
}

// Whether nothing was written beyond the bytes of the launch
bool shared_is_poisoned_from(size_t bytes) {
  for (size_t i = (bytes + 3) / 4; i < SHARED_BYTES / 4; i++)
    if (!std::isnan(shared[i]) || counters[i] != INT32_MIN || totals[i] != INT32_MIN) return false;
  return true;
}
}  // namespace
}  // namespace dydilit::cuda

namespace emulator {

constexpr size_t STACK = 64 << 10;

struct Barrier {  // generation: how often all threads have arrived
  int expected = 0, arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 thread{0, 0, 0};
  bool done = false;
};

struct Warp {
  Barrier barrier;
  uint32_t word[32][10];
};

inline std::mt19937 order;  // shuffles warps and lanes
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline ucontext_t scheduler;
inline Fiber* current;
inline int64_t progress;  // counts arrivals and returns: without any, all threads wait for ever
inline std::function<void()> body;

inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_emulator: %s\n", what);
  std::abort();
}

inline void wait(Barrier& barrier) {
  progress++;
  const int generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    barrier.generation++;
  }
  while (barrier.generation == generation) swapcontext(&current->context, &scheduler);
}

inline Warp& warp() { return warps[current->thread.x / 32]; }
inline int lane() { return int(current->thread.x % 32); }

inline void run_fiber() {
  body();
  current->done = true;
  progress++;
  swapcontext(&current->context, &scheduler);
}

inline void run_block() {
  const unsigned threads = blockDim.x;
  fibers.resize(threads);
  warps.assign((threads + 31) / 32, Warp());
  block_barrier = {int(threads), 0, 0};
  dydilit::cuda::poison_shared();
  for (unsigned i = 0; i < threads; i++) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[STACK]);
    fiber.thread = dim3(i, 0, 0);
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
    warps[i / 32].barrier.expected++;
  }
  std::vector<unsigned> lanes(32), queue(warps.size());
  std::iota(lanes.begin(), lanes.end(), 0);
  std::iota(queue.begin(), queue.end(), 0);
  const auto finished = [](const Fiber& fiber) { return fiber.done; };
  while (!std::all_of(fibers.begin(), fibers.end(), finished)) {
    const int64_t before = progress;
    std::shuffle(queue.begin(), queue.end(), order);
    for (unsigned w : queue)  // each warp runs as far as it can while the others stand still
      for (int64_t last = -1; last != progress;) {
        last = progress;
        std::shuffle(lanes.begin(), lanes.end(), order);
        for (unsigned lane : lanes) {
          current = 32 * w + lane < threads ? &fibers[32 * w + lane] : nullptr;
          if (current && !current->done) swapcontext(&scheduler, &current->context);
        }
      }
    if (progress == before) fail("a barrier or shuffle that not every thread reaches");
  }
}

// Every lane of the warp writes `words` words; then `read` sees the words of all lanes
template <class Read>
auto exchange(const uint32_t* mine, int words, Read read) {
  Warp& w = warp();
  std::memcpy(w.word[lane()], mine, 4 * words);
  wait(w.barrier);
  auto result = read(w.word);
  wait(w.barrier);
  return result;
}

template <class T>
T shuffle(T x, int source) {
  static_assert(sizeof(T) == 4);
  uint32_t word;
  std::memcpy(&word, &x, 4);
  word = exchange(&word, 1, [&](auto& all) { return all[source & 31][0]; });
  std::memcpy(&x, &word, 4);
  return x;
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)

inline void __syncthreads() { emulator::wait(emulator::block_barrier); }
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulator::shuffle(x, emulator::lane() ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T x, int source) {
  return emulator::shuffle(x, source);
}

inline bool __any_sync(unsigned, bool x) {
  const uint32_t word = x;
  return emulator::exchange(&word, 1, [](auto& all) {
    return std::any_of(all, all + 32, [](auto& lane) { return lane[0] != 0; });
  });
}

// ------------------------------------------------------------------------------------------------
// Launches.

using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

namespace emulator {
inline int64_t until_refused = -1;  // launches until one is refused; negative: none is
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (config->dynamicSmemBytes > dydilit::cuda::SHARED_BYTES)
    emulator::fail("more than 48 KB of shared memory");
  if (config->blockDim.x > 1024) emulator::fail("more than 1024 threads");
  if (config->gridDim.y > 65535) emulator::fail("more than 65535 blocks in y");
  if (emulator::until_refused-- == 0) return cudaErrorInvalidConfiguration;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  emulator::body = [&] { kernel(arguments...); };
  for (unsigned y = 0; y < config->gridDim.y; y++)
    for (unsigned x = 0; x < config->gridDim.x; x++) {
      blockIdx = dim3(x, y, 0);
      emulator::run_block();
      if (!dydilit::cuda::shared_is_poisoned_from(config->dynamicSmemBytes))
        emulator::fail("shared memory overrun");
    }
  return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------
// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", .bf16: the place of
// element i of a lane's part, with groupID = lane / 4, threadID_in_group = lane % 4, and elements
// 2 j and 2 j + 1 in the low and high half of word j.
//   A: row = groupID for 0 <= i < 2 or 4 <= i < 6, groupID + 8 otherwise;
//      col = threadID_in_group * 2 + (i & 1), and 8 more for i >= 4.
//   B: row = threadID_in_group * 2 + (i & 1), and 8 more for i >= 2; col = groupID.
//   C: row = groupID for i < 2, groupID + 8 otherwise; col = threadID_in_group * 2 + (i & 1).
namespace dydilit::cuda {

inline uint32_t round_pair(float low, float high) {
  return __float2bfloat16_rn(low).bits | uint32_t(__float2bfloat16_rn(high).bits) << 16;
}
inline float larger(float x, float y) { return x != x || y != y ? NAN : std::fmax(x, y); }
inline float smaller(float x, float y) { return x != x || y != y ? NAN : std::fmin(x, y); }
inline float normal(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? 0 : x; }
inline float fast_log2(float x) { return std::log2(x) + 0x1p-22f; }
inline float fast_exp2(float x) { return normal(std::exp2(x) * (1 + 0x1p-22f)); }

inline void prefetch(const void*) {}

inline void mma(float (&c)[4], uint4 a, uint2 b) {
  const uint32_t mine[6] = {a.x, a.y, a.z, a.w, b.x, b.y};
  struct Result { float c[4]; };
  const int me = emulator::lane();
  const Result result = emulator::exchange(mine, 6, [&](auto& all) {
    float A[16][16], B[16][8];
    const auto element = [&](int lane, int i) {
      return __bfloat162float({uint16_t(all[lane][i / 2] >> (16 * (i % 2)))});
    };
    for (int lane = 0; lane < 32; lane++) {
      const int group = lane / 4, thread = lane % 4;
      for (int i = 0; i < 8; i++)
        A[group + (i % 4 >= 2 ? 8 : 0)][thread * 2 + (i & 1) + (i >= 4 ? 8 : 0)] = element(lane, i);
      for (int i = 0; i < 4; i++)
        B[thread * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] = element(lane, 8 + i);
    }
    Result r;
    for (int i = 0; i < 4; i++) {
      const int row = me / 4 + (i < 2 ? 0 : 8), col = me % 4 * 2 + (i & 1);
      r.c[i] = c[i];
      for (int k = 0; k < 16; k++) r.c[i] += A[row][k] * B[k][col];
    }
    return r;
  });
  for (int i = 0; i < 4; i++) c[i] = result.c[i];
}

}  // namespace dydilit::cuda
