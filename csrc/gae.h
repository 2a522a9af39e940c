// The step of generalised advantage estimation, shared by the C++ and the CUDA kernel.
// One token moves the carry (value of the next valid token, A_{t+1}, and A_{t+1} at value_lam);
// a masked token leaves it alone, so that walking equals compressing masked tokens away.
#pragma once
#include "common.h"

namespace tppo {

struct GaeCarry {
  float next_value;    // V_{t+1}, or the bootstrap behind the last token
  float advantage;     // A_{t+1} at lam
  float value_target;  // A_{t+1} at value_lam: returns - V
};

// delta = r + gamma V' - V;  A = delta + gamma lam A'
TPPO_HD inline GaeCarry gae_step(GaeCarry carry, float reward, float value, float gamma, float lam,
                                 float value_lam) {
  const float delta = reward + gamma * carry.next_value - value;
  return {value, delta + gamma * lam * carry.advantage,
          delta + gamma * value_lam * carry.value_target};
}

}  // namespace tppo
