#include <cuda_runtime.h>

#include "gae.h"
#include "kernels.h"

namespace tppo {
namespace {

// One thread walks one sequence. lam, value_lam, bootstrap: [B]; offsets: [B + 1] or null.
__global__ void gae_fwd_kernel(const float* rewards, const float* values, const uint8_t* mask,
                               const float* lam, const float* value_lam, const float* bootstrap,
                               const int32_t* offsets, const float* gamma, int64_t B, int64_t T,
                               float* advantages, float* returns) {
  const int64_t b = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (b >= B) return;
  const int64_t begin = offsets ? offsets[b] : b * T;
  const int64_t end = offsets ? offsets[b + 1] : (b + 1) * T;
  GaeCarry carry{bootstrap[b], 0.f, 0.f};
  for (int64_t i = end - 1; i >= begin; --i) {
    if (mask && !mask[i]) {
      advantages[i] = returns[i] = 0.f;
      continue;
    }
    carry = gae_step(carry, rewards[i], values[i], *gamma, lam[b], value_lam[b]);
    advantages[i] = carry.advantage;
    returns[i] = carry.value_target + values[i];
  }
}

}  // namespace

const char* gae_fwd_cuda(const float* rewards, const float* values, const uint8_t* mask,
                         const float* lam, const float* value_lam, const float* bootstrap,
                         const int32_t* offsets, const float* gamma, int64_t B, int64_t T,
                         float* advantages, float* returns, void* stream) {
  constexpr int kThreads = 64;  // few, so that few sequences still spread over the chip
  if (B > 0)
    gae_fwd_kernel<<<unsigned((B + kThreads - 1) / kThreads), kThreads, 0,
                     static_cast<cudaStream_t>(stream)>>>(rewards, values, mask, lam, value_lam,
                                                          bootstrap, offsets, gamma, B, T,
                                                          advantages, returns);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tppo
