// Every kernel that bindings.cpp exposes. A pointer may be null where its kernel says so.
#pragma once
#include <cstdint>

namespace tppo {

void gae_fwd(const float* rewards, const float* values, const uint8_t* mask, const float* lam,
             const float* value_lam, const float* bootstrap, const int32_t* offsets, float gamma,
             int64_t B, int64_t T, float* advantages, float* returns, int threads);

#if TPPO_CUDA
// Returns null, or the CUDA error's text. gamma: one float on the device.
const char* gae_fwd_cuda(const float* rewards, const float* values, const uint8_t* mask,
                         const float* lam, const float* value_lam, const float* bootstrap,
                         const int32_t* offsets, const float* gamma, int64_t B, int64_t T,
                         float* advantages, float* returns, void* stream);
#endif

}  // namespace tppo
