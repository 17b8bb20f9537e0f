// The product of a warp on the tensor core, which has no C++ name. The PTX manual (PTX ISA, "Matrix
// Fragments for mma.m16n8k16 with floating point type") defines the layout; csrc/README.md draws
// it. Needs sm_80.
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
// low 16 bits.
__device__ __forceinline__ void mma(float (&c)[4], uint4 a, uint2 b) {
  asm volatile(  // volatile: the compiler must not move it into a branch that some lanes skip
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

}  // namespace dydilit::cuda
#endif
