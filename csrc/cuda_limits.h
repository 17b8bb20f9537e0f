// The largest sizes that the CUDA kernels take. A header of its own, because build_info() reports
// them in a build without CUDA too.
#pragma once

namespace dydilit::cuda {

constexpr int MAX_WIDTH = 1536;   // of D: a row lies in the registers of one thread block
constexpr int MAX_CHOICES = 256;  // of n_F and n_D: the logits lie in its shared memory

}  // namespace dydilit::cuda
