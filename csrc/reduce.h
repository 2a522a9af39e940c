// A reduction of tokens by itself: the sums that ppo_loss and value_loss share, of any values.
#pragma once
#include "loss.h"

namespace tppo {

struct ReduceBatch {
  Layout layout;
  Column x;
  Share share;
  float *total, *scale;
};

// The gradient of x, c_b * factor at valid tokens of sequence b, in the type of `dtype`.
struct ReduceShares {
  Layout layout;
  bool by_length;  // c_b = 1 / tokens of b, else 1
  int dtype;
  void* out;  // [N]
};

}  // namespace tppo
