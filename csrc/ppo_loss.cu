#include "loss.cuh"
#include "ppo_loss.h"

namespace tppo {
namespace {

struct Token {
  bool valid;
  float logprob, old, advantage, weight, entropy, ref;
};

struct Firsts {  // the element of each column at which a sequence begins
  int64_t logprob, old, advantage, weight, entropy, ref;
};

template <bool kFloats>
__device__ __forceinline__ Token load_ratio(const PolicyBatch& in, const Firsts& first,
                                            const uint8_t* mask, int64_t t, int64_t count) {
  Token x{t < count, 0.f, 0.f, 0.f, 1.f, 0.f, 0.f};
  if (!x.valid) return x;
  x.logprob = read<kFloats>(in.logprobs, first.logprob, t);
  x.old = read<kFloats>(in.old_logprobs, first.old, t);
  if (mask) x.valid = mask[t] != 0;
  return x;
}

template <bool kFloats>
__device__ __forceinline__ Token load_token(const PolicyBatch& in, const Firsts& first,
                                            const uint8_t* mask, int64_t t, int64_t count) {
  Token x = load_ratio<kFloats>(in, first, mask, t, count);
  if (t >= count) return x;
  x.advantage = read<kFloats>(in.advantages, first.advantage, t);
  if (in.weights.data) x.weight = read<kFloats>(in.weights, first.weight, t);
  if (in.entropy.data) x.entropy = read<kFloats>(in.entropy, first.entropy, t);
  if (in.ref_logprobs.data) x.ref = read<kFloats>(in.ref_logprobs, first.ref, t);
  return x;
}

template <int kEstimator, bool kClamps>
__device__ __forceinline__ Kl kl_of_token(float logprob, float ref, float clamp) {
  return kClamps ? kl_of<kEstimator>(logprob, ref, clamp) : kl_of<kEstimator>(logprob, ref);
}

template <bool kClamps>
__device__ __forceinline__ Kl kl(int estimator, float logprob, float ref, float clamp) {
  switch (estimator) {
    case kK1: return kl_of_token<kK1, kClamps>(logprob, ref, clamp);
    case kK2: return kl_of_token<kK2, kClamps>(logprob, ref, clamp);
    case kK3: return kl_of_token<kK3, kClamps>(logprob, ref, clamp);
    case kAbs: return kl_of_token<kAbs, kClamps>(logprob, ref, clamp);
    case kK1Plus: return kl_of_token<kK1Plus, kClamps>(logprob, ref, clamp);
    default: return kl_of_token<kK3Plus, kClamps>(logprob, ref, clamp);
  }
}

struct Sequence {
  float c, ratio;  // its share, and e^(mean d) under a sequence ratio
  int64_t begin;   // its first token in a result
};

struct Terms {
  Policy policy;  // by_ratio and by_logprob with the parts that KL has in them
  float kl;
};

// kPlain: of kClip, with KL neither clamped nor weighted.
template <bool kPlain>
__device__ __forceinline__ Terms terms_of(const PolicyBatch& in, const PolicyScalars& s,
                                          const Token& x, float ratio) {
  Terms at;
  if (kPlain || in.objective == kClip)
    at.policy = policy_loss<kClip>(ratio, x.logprob, x.advantage, x.weight, s);
  else if (in.objective == kCispo)
    at.policy = policy_loss<kCispo>(ratio, x.logprob, x.advantage, x.weight, s);
  else
    at.policy = policy_loss<kSapo>(ratio, x.logprob, x.advantage, x.weight, s);
  Kl apart{0.f, 0.f};
  if (in.ref_logprobs.data) {
    apart = kl<!kPlain>(in.estimator, x.logprob, x.ref, s.kl_clamp);  // infinite: no clamp
    if (!kPlain && in.kl_ratio_weighted) {
      apart = {ratio * apart.value, ratio * apart.slope};
      at.policy.by_ratio += times(s.kl_coef, apart.value);  // d(r k)/dd = r k
    }
  }
  const float by_kl = times(s.kl_coef, apart.slope);
  const bool has_own = !kPlain && in.objective == kCispo;
  at.policy.by_logprob = has_own ? at.policy.by_logprob + by_kl : by_kl;
  at.kl = apart.value;
  return at;
}

// Adds a valid token to the sums.
__device__ __forceinline__ void add_token(const PolicyBatch& in, const PolicyScalars& s,
                                          const Token& x, const LogRatio& at, const Terms& terms,
                                          float e, float ratio, float c,
                                          double (&sums)[kPolicySums]) {
  const Policy& policy = terms.policy;
  const float loss =
      policy.loss + times(-s.entropy_coef, x.entropy) + times(s.kl_coef, terms.kl);
  sums[kLoss] += double(c) * double(loss);
  sums[kTokens] += 1.0;
  if (policy.low) sums[kLow] += 1.0;
  if (policy.high) sums[kHigh] += 1.0;
  if (policy.dual) sums[kDual] += 1.0;
  if (at.clamped) sums[kClamped] += 1.0;
  sums[kK1Sum] -= double(at.d);
  sums[kK3Sum] += double(exp_beyond_linear(at.d, e));
  sums[kRatio] += double(ratio);
  sums[kEntropySum] += double(x.entropy);
  sums[kKlSum] += double(terms.kl);
  sums[kMax] = join<true>(double(ratio), sums[kMax]);
}

__device__ __forceinline__ void write(const PolicyBatch& in, const PolicyScalars& s, const Token& x,
                                      Bits clamped, float by_ratio, float by_logprob, float c,
                                      int64_t i) {
  const float all = c * (keep(~clamped, by_ratio) + by_logprob);
  if (in.dlogprobs) in.dlogprobs[i] = x.valid ? all : 0.f;
  if (in.dentropy) in.dentropy[i] = x.valid ? c * -s.entropy_coef : 0.f;
}

// The sum of d of one sequence, in every thread of the block.
template <bool kFloats>
__device__ double sum_ratios(const PolicyBatch& in, const PolicyScalars& s, const Firsts& first,
                             const uint8_t* mask, int64_t count, double* shared) {
  double own = 0;
  for (int64_t t = threadIdx.x; t < count; t += kThreads) {
    const Token x = load_ratio<kFloats>(in, first, mask, t, count);
    if (x.valid) own += double(log_ratio(x.logprob, x.old, s.limit).d);
  }
  return block_total(own, shared);
}

// One pass over a token's columns; 33 B a token with all of them and both gradients in fp32. One
// more over the whole sequence's mask where its length is asked for; under a sequence ratio, whose
// sequences are never split, one more over logprobs, old and mask, and one more over those and ref
// (all columns unless kPlain) for the gradient: from the L2 cache.
template <bool kFloats, bool kPlain>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    ppo_loss_fwd_kernel(PolicyBatch in, int parts, double* sums_of_blocks) {
  __shared__ double shared[kWarps], totals[kPolicySums];
  const Layout& at = in.layout;
  const PolicyScalars s = scalars_of(in);
  const bool counts_live = in.share.count_of == Share::kSequences;
  double sums[kPolicySums] = {};
  for (int64_t task = blockIdx.x; task < at.B * parts; task += gridDim.x) {
    const int64_t b = task / parts;
    const int part = int(task % parts);
    const Span whole = span(at, b);
    const Range range = range_of(whole.count, part, parts);
    if (range.first == range.last) continue;
    const uint8_t* mask = mask_of(at, b, whole.begin);
    const auto from = [&](const Column& x) { return first_of(x, at, b, whole.begin); };
    const Firsts first{from(in.logprobs), from(in.old_logprobs), from(in.advantages),
                       from(in.weights), from(in.entropy), from(in.ref_logprobs)};
    double length = 1.0, d = 0.0, slopes = 0.0;
    if (in.sequence_ratio || in.share.by_length || counts_live)
      length = count_tokens(mask, whole.count, shared);
    if (in.sequence_ratio) d = sum_ratios<kFloats>(in, s, first, mask, whole.count, shared);
    if (counts_live && part == 0 && threadIdx.x == 0 && length > 0.0) sums[kLive] += 1.0;
    length = length < 1.0 ? 1.0 : length;
    const Sequence own{in.share.by_length ? float(1.0 / length) : 1.f,
                       in.sequence_ratio ? exp_of(float(d / length)) : 0.f, whole.begin};
    for (int64_t start = range.first + threadIdx.x; start < range.last;
         start += kThreads * kItems) {
      Token x[kItems];
#pragma unroll
      for (int j = 0; j < kItems; ++j)
        x[j] = load_token<kFloats>(in, first, mask, start + j * kThreads, range.last);
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        const int64_t t = start + j * kThreads;
        if (t >= range.last) break;
        float by_ratio = 0.f, by_logprob = 0.f;
        LogRatio d{0.f, 0u};
        if (x[j].valid) {
          d = log_ratio(x[j].logprob, x[j].old, s.limit);
          const float e = exp_of(d.d), ratio = in.sequence_ratio ? own.ratio : e;
          const Terms terms = terms_of<kPlain>(in, s, x[j], ratio);
          add_token(in, s, x[j], d, terms, e, ratio, own.c, sums);
          by_ratio = terms.policy.by_ratio;
          by_logprob = terms.policy.by_logprob;
          slopes += double(by_ratio);
        }
        if (!in.sequence_ratio)
          write(in, s, x[j], d.clamped, by_ratio, by_logprob, own.c, own.begin + t);
      }
    }
    if (!in.sequence_ratio) continue;
    const float slope = float(block_total(slopes, shared) / length);
    for (int64_t t = threadIdx.x; t < whole.count; t += kThreads) {
      Token x;
      float by_logprob = 0.f;
      if (kPlain) {
        x = load_ratio<kFloats>(in, first, mask, t, whole.count);
        if (in.ref_logprobs.data) {
          const float ref = read<kFloats>(in.ref_logprobs, first.ref, t);
          by_logprob = times(s.kl_coef, kl<false>(in.estimator, x.logprob, ref, 0.f).slope);
        }
      } else {
        x = load_token<kFloats>(in, first, mask, t, whole.count);
        by_logprob = terms_of<kPlain>(in, s, x, own.ratio).policy.by_logprob;
      }
      const LogRatio d = log_ratio(x.logprob, x.old, s.limit);
      write(in, s, x, d.clamped, slope, by_logprob, own.c, own.begin + t);
    }
  }
  if (grid_totals<kPolicySums, kMax>(sums, sums_of_blocks, totals)) finish(in, totals);
}

template <bool kFloats>
const char* launch(const PolicyBatch& in, double* sums, void* stream) {
  const bool plain = in.objective == kClip && !in.kl_clamped && !in.kl_ratio_weighted;
  const bool divisible = !in.sequence_ratio;
  return plain ? launch_over<ppo_loss_fwd_kernel<kFloats, true>>(in, divisible, sums, stream)
               : launch_over<ppo_loss_fwd_kernel<kFloats, false>>(in, divisible, sums, stream);
}

}  // namespace

const char* ppo_loss_fwd_cuda(const PolicyBatch& in, double* sums, void* stream) {
  bool floats = true;
  for (const Column* x : {&in.logprobs, &in.old_logprobs, &in.advantages, &in.entropy,
                          &in.ref_logprobs, &in.weights})
    floats = floats && (!x->data || x->dtype == kFp32);
  return floats ? launch<true>(in, sums, stream) : launch<false>(in, sums, stream);
}

}  // namespace tppo
