// The per-token formula of the policy loss, shared by the C++ and the CUDA kernel. In Python it
// stands in ops/ppo_loss/reference.py; tests/test_ppo_loss_backends.py compares the two.
#pragma once
#include "kl.h"

namespace tppo {

enum Objective { kClip, kCispo, kSapo };

struct PolicyScalars {
  float low, high;  // 1 - clip_low, 1 + clip_high
  float dual;       // infinite: none
  float limit, entropy_coef, kl_coef;
  float kl_clamp;          // infinite: none
  float tau_pos, tau_neg;  // of kSapo
};

struct LogRatio {
  float d;
  Bits clamped;
};

TPPO_INLINE LogRatio log_ratio(float logprob, float old, float limit) {
  const float raw = logprob - old;
  return {clamp_to(raw, -limit, limit), bits_if(raw > limit) | bits_if(raw < -limit)};
}

struct Policy {
  float loss, by_ratio;  // w l and w dl/dd, r = e^d
  float by_logprob;      // w dl/dlogprob beside it
  Bits low, high, dual;
};

// l = max(-A r, -A clip(r)), then min(l, -c A) where A < 0.
TPPO_INLINE Policy clip_loss(float ratio, float advantage, float weight, const PolicyScalars& s) {
  const float free = -advantage * ratio;
  const float held = -advantage * clamp_to(ratio, s.low, s.high);
  const Bits clipped = bits_if(held > free);
  const float higher = pick(clipped, held, free);
  const float ceiling = -s.dual * advantage;
  const Bits dual = bits_if(advantage < 0.f) & bits_if(higher > ceiling);
  return {times(weight, pick(dual, ceiling, higher)), times(weight, keep(~(clipped | dual), free)),
          0.f, clipped & bits_if(ratio < s.low), clipped & bits_if(ratio > s.high), dual};
}

// l = -A clip(r) logprob, where clip(r) is a constant of the differentiation.
TPPO_INLINE Policy cispo_loss(float ratio, float logprob, float advantage, float weight,
                              const PolicyScalars& s) {
  const float slope = -advantage * clamp_to(ratio, s.low, s.high);
  return {times(weight, slope * logprob), 0.f, times(weight, slope), bits_if(ratio < s.low),
          bits_if(ratio > s.high), 0u};
}

// l = -A (4 / tau) sigmoid(x), x = tau (r - 1); of |x| and -|x| with e^-|x|, which never overflows.
TPPO_INLINE Policy sapo_loss(float ratio, float advantage, float weight, const PolicyScalars& s) {
  const float tau = pick(bits_if(advantage > 0.f), s.tau_pos, s.tau_neg);
  const float x = tau * (ratio - 1.f);
  const Bits below = bits_if(x < 0.f);
  const float e = exp_of(pick(below, x, -x));
  const float of_size = 1.f / (1.f + e), of_minus = e * of_size;
  const float loss = -advantage * (4.f / tau) * pick(below, of_minus, of_size);
  const float slope = -advantage * 4.f * times(of_size * of_minus, ratio);  // flat: 0 * inf is 0
  return {times(weight, loss), times(weight, slope), 0.f,
          bits_if(advantage < 0.f) & bits_if(ratio < s.low),
          bits_if(advantage > 0.f) & bits_if(ratio > s.high), 0u};
}

template <int kObjective>
TPPO_INLINE Policy policy_loss(float ratio, float logprob, float advantage, float weight,
                               const PolicyScalars& s) {
  if (kObjective == kCispo) return cispo_loss(ratio, logprob, advantage, weight, s);
  if (kObjective == kSapo) return sapo_loss(ratio, advantage, weight, s);
  return clip_loss(ratio, advantage, weight, s);
}

// Sums over the mask. kLoss is weighted by c_b; kLive counts sequences with a valid token; kMax,
// the largest ratio, is not a sum. kTokens to kMax are the metrics, in their order.
enum PolicySum { kLoss, kTokens, kLow, kHigh, kDual, kClamped, kK1Sum, kK3Sum, kRatio, kEntropySum,
                 kKlSum, kMax, kLive, kPolicySums };

struct PolicyBatch {
  Layout layout;
  Column logprobs, old_logprobs, advantages, entropy, ref_logprobs, weights;
  Scalar clip_low, clip_high, dual_clip, limit, entropy_coef, kl_coef;  // limit: max_log_ratio
  Scalar kl_clamp, tau_pos, tau_neg;
  Share share;
  int estimator, objective;
  bool sequence_ratio, kl_ratio_weighted, kl_clamped;
  float *dlogprobs, *dentropy;  // [N] or null
  float *loss, *metrics, *scale;
};

TPPO_HD inline PolicyScalars scalars_of(const PolicyBatch& in) {
  return {float(1.0 - value_of(in.clip_low)), float(1.0 + value_of(in.clip_high)),
          float(value_of(in.dual_clip)), float(value_of(in.limit)),
          float(value_of(in.entropy_coef)), float(value_of(in.kl_coef)),
          float(value_of(in.kl_clamp)), float(value_of(in.tau_pos)), float(value_of(in.tau_neg))};
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
