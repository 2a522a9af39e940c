#include "gae.h"

#include "kernels.h"

namespace tppo {

// lam, value_lam, bootstrap: [B]. offsets: [B + 1] of a packed batch, or null for padded rows of T.
void gae_fwd(const float* rewards, const float* values, const uint8_t* mask, const float* lam,
             const float* value_lam, const float* bootstrap, const int32_t* offsets, float gamma,
             int64_t B, int64_t T, float* advantages, float* returns, int threads) {
  const int64_t grain = offsets ? 16 : std::max<int64_t>(1, 65536 / std::max<int64_t>(T, 1));
  parallel_for(B, grain, threads, [=](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = offsets ? offsets[b] : b * T;
      const int64_t end = offsets ? offsets[b + 1] : (b + 1) * T;
      const GaeScale scale{gamma, lam[b], value_lam[b]};
      GaeCarry carry{bootstrap[b], bootstrap[b]};
      for (int64_t i = end - 1; i >= begin; --i) {
        if (mask && !mask[i]) {
          advantages[i] = returns[i] = 0.f;
          continue;
        }
        const GaeResult result = gae_result(rewards[i], values[i], carry, scale);
        advantages[i] = result.advantage;
        returns[i] = result.returns;
        carry = gae_apply(gae_map(rewards[i], values[i], scale), carry);
      }
    }
  });
}

}  // namespace tppo
