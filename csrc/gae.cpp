#include "gae.h"

#include "kernels.h"

namespace tppo {

void gae_fwd(const GaeRows& in, float* advantages, float* returns, int threads) {
  const int64_t grain = in.offsets ? 16 : std::max<int64_t>(1, 65536 / std::max<int64_t>(in.T, 1));
  parallel_for(in.B, grain, threads, [=](int64_t first, int64_t last) {
    const float *rewards = in.rewards, *values = in.values;
    const uint8_t* mask = in.mask;
    const int32_t* offsets = in.offsets;
    const int64_t T = in.T;
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = offsets ? offsets[b] : b * T;
      const int64_t end = offsets ? offsets[b + 1] : (b + 1) * T;
      const GaeScale scale{in.gamma, in.lam[b], in.value_lam[b]};
      GaeCarry carry{in.bootstrap[b], in.bootstrap[b]};
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
