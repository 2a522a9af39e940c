// The per-token formula of the critic's loss, shared by the C++ and the CUDA kernel. In Python it
// stands in ops/value_loss/reference.py; tests/test_value_loss.py compares the two.
#pragma once
#include "loss.h"

namespace tppo {

struct Squared {
  float loss, slope;
  Bits clipped;
};

// 0.5 max((V - R)^2, (V_clip - R)^2). Within the clip V_clip is V itself; a negative clip is off.
TPPO_INLINE Squared squared_error(float value, float target, float old, float clip) {
  const float error = value - target, drift = value - old;
  const Bits outside = ~(bits_if(drift <= clip) & bits_if(drift >= -clip)) & bits_if(clip >= 0.f);
  const float held_error = pick(outside, old + clamp_to(drift, -clip, clip), value) - target;
  const float free = 0.5f * error * error, held = 0.5f * held_error * held_error;
  const Bits clipped = bits_if(held > free), lower = bits_if(free >= held);
  // NaN of either shows in both results
  return {pick(lower, free, pick(clipped, held, free + held)), pick(lower, error, 0.f * held),
          clipped};
}

// Sums over the mask. kSumLoss is weighted by c_b; kSumLive counts sequences with a valid token.
// Returns and errors R - V give mean and M2 from sums of squares in fp64.
enum ValueSum { kSumLoss, kSumTokens, kSumClipped, kSumReturn, kSumReturn2, kSumError, kSumError2,
                kSumLive, kValueSums };

struct ValueBatch {
  Layout layout;
  Column values, returns, old_values;
  Scalar clip;  // negative: off
  Share share;
  float* dvalues;  // [N] or null
  float *loss, *metrics, *scale;
};

TPPO_HD inline void moments_of(double n, double sum, double squares, float* out) {
  const double mean = sum / (n < 1.0 ? 1.0 : n), m2 = squares - sum * mean;
  out[0] = float(mean);
  out[1] = m2 < 0.0 ? 0.f : float(m2);  // NaN stays NaN
}

// Loss, metrics and scale from the sums [kValueSums].
TPPO_HD inline void finish(const ValueBatch& in, const double* sums) {
  const double scale = scale_of(in.share, sums[kSumTokens], sums[kSumLive]);
  *in.loss = float(scale * sums[kSumLoss]);
  *in.scale = float(scale);
  in.metrics[0] = float(sums[kSumTokens]);
  in.metrics[1] = float(sums[kSumClipped]);
  moments_of(sums[kSumTokens], sums[kSumReturn], sums[kSumReturn2], in.metrics + 2);
  moments_of(sums[kSumTokens], sums[kSumError], sums[kSumError2], in.metrics + 4);
}

}  // namespace tppo
