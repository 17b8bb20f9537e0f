// Instructions that have no C++ name: the product of a warp on the tensor core, and fast ones that
// tokens of 16 bits take. Needs sm_80. The emulator of the tests has its own of these functions.
#ifndef DYDILIT_CUDA_MMA
#define DYDILIT_CUDA_MMA
#include <cuda_runtime.h>

namespace dydilit::cuda {

// C (16 x 8, float32) += A (16 x 16, bfloat16) B (16 x 8, bfloat16). The 32 lanes of a warp hold a
// part of each matrix. With g = lane / 4 and t = lane % 4, a lane holds
//   a.x = A[g][2t, 2t+1]        a.y = A[g+8][2t, 2t+1]
//   a.z = A[g][2t+8, 2t+9]      a.w = A[g+8][2t+8, 2t+9]
//   b.x = B[2t, 2t+1][g]        b.y = B[2t+8, 2t+9][g]
//   c[0, 1] = C[g][2t, 2t+1]    c[2, 3] = C[g+8][2t, 2t+1]
// Each word of a and b holds two neighbours, the one of lower column (of A) or row (of B) in the
// low 16 bits. The PTX manual (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point
// type") defines the layout; csrc/README.md draws it.
__device__ __forceinline__ void mma(float (&c)[4], uint4 a, uint2 b) {
  asm volatile(  // volatile: the compiler must not move it into a branch that some lanes skip
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

// Two numbers rounded to bfloat16, `low` in the low 16 bits
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// The larger and the smaller of two numbers; NaN if one of them is (fmaxf would return the other)
__device__ __forceinline__ float larger(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}
__device__ __forceinline__ float smaller(float x, float y) {
  float z;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// log2 x of a normal number x > 0. NVIDIA's manual gives __log2f, which is this instruction, an
// error of 2^-22 in [0.5, 2] and 2 ulp elsewhere.
__device__ __forceinline__ float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^x within 2 ulp; 0 where it is below the normal numbers
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Brings what is at this address closer, to be read later
__device__ __forceinline__ void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

}  // namespace dydilit::cuda
#endif
