// The per-token formula of the clipped policy loss, shared by the C++ and the CUDA kernel. In
// Python it stands in ops/ppo_loss/reference.py; tests/test_ppo_loss.py compares the two.
#pragma once
#include "loss.h"

#if defined(__CUDA_ARCH__)
#include <cmath>
#endif

namespace tppo {

enum KlEstimator { kK1, kK2, kK3, kAbs, kK1Plus, kK3Plus };

struct PolicyScalars {
  float low, high;  // 1 - clip_low, 1 + clip_high
  float dual;       // infinite: none
  float limit, entropy_coef, kl_coef;
};

// e^x: to 1e-7; on the host infinite from 88.4 on.
TPPO_INLINE float exp_of(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  return exp_in_range(clamp_to(x, -88.f, 88.5f));
#endif
}

// e^x - 1 - x without cancellation, by its series below 1. `e` is e^x.
TPPO_INLINE float exp_beyond_linear(float x, float e) {
  float q = 1.f / 3628800.f;
  q = q * x + 1.f / 362880.f;
  q = q * x + 1.f / 40320.f;
  q = q * x + 1.f / 5040.f;
  q = q * x + 1.f / 720.f;
  q = q * x + 1.f / 120.f;
  q = q * x + 1.f / 24.f;
  q = q * x + 1.f / 6.f;
  q = q * x + 0.5f;
  const float near = x * x * q, far = e - 1.f - x;
  return pick(bits_if(x < 1.f) & bits_if(x > -1.f), near, far);
}

struct LogRatio {
  float d;
  Bits clamped;
};

TPPO_INLINE LogRatio log_ratio(float logprob, float old, float limit) {
  const float raw = logprob - old;
  return {clamp_to(raw, -limit, limit), bits_if(raw > limit) | bits_if(raw < -limit)};
}

struct Clipped {
  float loss, slope;  // w l and w dl/dd
  Bits low, high, dual;
};

// l = max(-A r, -A clip(r)), then min(l, -c A) where A < 0; r = e^d.
TPPO_INLINE Clipped clipped_loss(float ratio, float advantage, float weight,
                                 const PolicyScalars& s) {
  const float free = -advantage * ratio;
  const float held = -advantage * clamp_to(ratio, s.low, s.high);
  const Bits clipped = bits_if(held > free);
  const float higher = pick(clipped, held, free);
  const float ceiling = -s.dual * advantage;
  const Bits dual = bits_if(advantage < 0.f) & bits_if(higher > ceiling);
  return {times(weight, pick(dual, ceiling, higher)), times(weight, keep(~(clipped | dual), free)),
          clipped & bits_if(ratio < s.low), clipped & bits_if(ratio > s.high), dual};
}

struct Kl {
  float value, slope;
};

// d = logprob - ref clamped to +-20; the slope is 0 beyond.
template <int kEstimator>
TPPO_INLINE Kl kl_of(float logprob, float ref) {
  constexpr float kLimit = 20.f;
  const float raw = logprob - ref;
  const float d = clamp_to(raw, -kLimit, kLimit);
  const Bits outside = bits_if(raw > kLimit) | bits_if(raw < -kLimit);
  float value = d, slope = 1.f;
  if (kEstimator == kK2) value = 0.5f * d * d;
  if (kEstimator == kAbs) {
    value = pick(bits_if(d < 0.f), -d, d);
    slope = pick(bits_if(d > 0.f), 1.f, pick(bits_if(d < 0.f), -1.f, d));  // d: 0, or NaN
  }
  if (kEstimator == kK3 || kEstimator == kK3Plus) {
    value = exp_beyond_linear(-d, exp_of(-d));
    slope = d - value;  // 1 - e^-d
  }
  if (kEstimator == kK2 || kEstimator == kK1Plus || kEstimator == kK3Plus) slope = d;
  return {value, keep(~outside, slope)};
}

// Sums over the mask. kLoss is weighted by c_b; kLive counts sequences with a valid token; kMax,
// the largest ratio, is not a sum. kTokens to kMax are the metrics, in their order.
enum PolicySum { kLoss, kTokens, kLow, kHigh, kDual, kClamped, kK1Sum, kK3Sum, kRatio, kEntropySum,
                 kKlSum, kMax, kLive, kPolicySums };

struct PolicyBatch {
  Layout layout;
  Column logprobs, old_logprobs, advantages, entropy, ref_logprobs, weights;
  Scalar clip_low, clip_high, dual_clip, limit, entropy_coef, kl_coef;  // limit: max_log_ratio
  Share share;
  int estimator;
  bool sequence_ratio;
  float *dlogprobs, *dentropy;  // [N] or null
  float *loss, *metrics, *scale;
};

TPPO_HD inline PolicyScalars scalars_of(const PolicyBatch& in) {
  return {float(1.0 - value_of(in.clip_low)), float(1.0 + value_of(in.clip_high)),
          float(value_of(in.dual_clip)), float(value_of(in.limit)),
          float(value_of(in.entropy_coef)), float(value_of(in.kl_coef))};
}

// Loss, metrics and scale from the sums [kPolicySums]. A coefficient that is not 0 without its
// tensor gives NaN, and so does the largest of ratios of which one is NaN.
TPPO_HD inline void finish(const PolicyBatch& in, const double* sums) {
  const PolicyScalars s = scalars_of(in);
  const double scale = scale_of(in.share, sums[kTokens], sums[kLive]);
  const bool lacking = (!in.entropy.data && s.entropy_coef != 0.f) ||
                       (!in.ref_logprobs.data && s.kl_coef != 0.f);
  *in.loss = lacking ? float_of(0x7fc00000u) : float(scale * sums[kLoss]);
  *in.scale = float(scale);
  for (int k = kTokens; k <= kMax; ++k) in.metrics[k - kTokens] = float(sums[k]);
  if (sums[kRatio] != sums[kRatio]) in.metrics[kMax - kTokens] = float(sums[kRatio]);
}

}  // namespace tppo
