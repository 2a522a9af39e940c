// Generalised advantage estimation as one scalar recurrence, shared by the C++ and the CUDA kernel.
//
// With X_t = V_t + lam A_t the two lines of the textbook are
//     A_t = r_t + gamma X_{t+1} - V_t        X_t = V_t + lam (r_t - V_t) + gamma lam X_{t+1}
// and X behind the last token is the bootstrap. So a token is an affine map of the number behind
// it, a masked token the identity, and a stretch of tokens the composition of their maps, which is
// associative: what a parallel scan needs. returns = r_t + gamma Y_{t+1}, Y as X at value_lam.
#pragma once
#include "common.h"

namespace tppo {

struct GaeScale {  // of one sequence
  float gamma, lam, value_lam;
};

struct GaeCarry {
  float x, y;  // V + lam A of the next valid token, at lam and at value_lam
};

struct GaeMap {
  float decay, add, value_decay, value_add;  // X -> add + decay X, and the same for Y
};

struct GaeResult {
  float advantage, returns;
};

TPPO_HD inline GaeMap gae_identity() { return {1.f, 0.f, 1.f, 0.f}; }

TPPO_HD inline GaeMap gae_map(float reward, float value, const GaeScale& scale) {
  const float difference = reward - value;
  return {scale.gamma * scale.lam, value + scale.lam * difference, scale.gamma * scale.value_lam,
          value + scale.value_lam * difference};
}

TPPO_HD inline GaeCarry gae_apply(const GaeMap& map, const GaeCarry& behind) {
  return {map.add + map.decay * behind.x, map.value_add + map.value_decay * behind.y};
}

// The map of two adjacent stretches: first the one behind, then the one before it.
TPPO_HD inline GaeMap gae_join(const GaeMap& before, const GaeMap& behind) {
  return {before.decay * behind.decay, before.add + before.decay * behind.add,
          before.value_decay * behind.value_decay,
          before.value_add + before.value_decay * behind.value_add};
}

TPPO_HD inline GaeResult gae_result(float reward, float value, const GaeCarry& behind,
                                    const GaeScale& scale) {
  return {reward + scale.gamma * behind.x - value, reward + scale.gamma * behind.y};
}

}  // namespace tppo
