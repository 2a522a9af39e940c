// An estimate of the KL divergence of one token and its derivative, of `kl` and of all operators
// with a KL term. In Python it is `kl` of tppo_kernels/_math/sequence.py.
#pragma once
#include "loss.h"

#if defined(__CUDA_ARCH__)
#include <cmath>
#endif

namespace tppo {

enum KlEstimator { kK1, kK2, kK3, kAbs, kK1Plus, kK3Plus };

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

struct Kl {
  float value, slope;
};

// d = logprob - ref clamped to +-20; the slope, d value / d logprob, is 0 beyond.
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

// The value clamped to +-clamp, with slope 0 beyond too. The slope of k1+ and k3+ is k2's: the
// clamp of another value does not reach it.
template <int kEstimator>
TPPO_INLINE Kl kl_of(float logprob, float ref, float clamp) {
  const Kl x = kl_of<kEstimator>(logprob, ref);
  const bool own = kEstimator != kK1Plus && kEstimator != kK3Plus;
  const Bits beyond = bits_if(x.value > clamp) | bits_if(x.value < -clamp);
  return {clamp_to(x.value, -clamp, clamp), own ? keep(~beyond, x.slope) : x.slope};
}

struct KlTokens {
  Column logprobs, ref_logprobs;  // [N], dense
  const uint8_t* mask;            // [N], or null
  int64_t N;
  int estimator;
  float clamp;
};

}  // namespace tppo
