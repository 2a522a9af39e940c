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

__device__ __forceinline__ Kl kl(int estimator, float logprob, float ref) {
  switch (estimator) {
    case kK1: return kl_of<kK1>(logprob, ref);
    case kK2: return kl_of<kK2>(logprob, ref);
    case kK3: return kl_of<kK3>(logprob, ref);
    case kAbs: return kl_of<kAbs>(logprob, ref);
    case kK1Plus: return kl_of<kK1Plus>(logprob, ref);
    default: return kl_of<kK3Plus>(logprob, ref);
  }
}

struct Sequence {
  float c, ratio;  // its share, and e^(mean d) under a sequence ratio
  int64_t begin;   // its first token in a result
};

// Adds a valid token to the sums; returns the part of d loss/d logprob that comes from the ratio,
// before c and the clamp.
__device__ __forceinline__ float add_token(const PolicyBatch& in, const PolicyScalars& s,
                                           const Token& x, const LogRatio& at, const Kl& apart,
                                           const Sequence& own, double (&sums)[kPolicySums]) {
  const float e = exp_of(at.d);
  const float ratio = in.sequence_ratio ? own.ratio : e;
  const Clipped clipped = clipped_loss(ratio, x.advantage, x.weight, s);
  const float loss =
      clipped.loss + times(-s.entropy_coef, x.entropy) + times(s.kl_coef, apart.value);
  sums[kLoss] += double(own.c) * double(loss);
  sums[kTokens] += 1.0;
  if (clipped.low) sums[kLow] += 1.0;
  if (clipped.high) sums[kHigh] += 1.0;
  if (clipped.dual) sums[kDual] += 1.0;
  if (at.clamped) sums[kClamped] += 1.0;
  sums[kK1Sum] -= double(at.d);
  sums[kK3Sum] += double(exp_beyond_linear(at.d, e));
  sums[kRatio] += double(ratio);
  sums[kEntropySum] += double(x.entropy);
  sums[kKlSum] += double(apart.value);
  sums[kMax] = join<true>(double(ratio), sums[kMax]);
  return clipped.slope;
}

__device__ __forceinline__ void write(const PolicyBatch& in, const PolicyScalars& s, const Token& x,
                                      Bits clamped, float slope, float kl_slope, float c,
                                      int64_t i) {
  const float all = c * (keep(~clamped, slope) + times(s.kl_coef, kl_slope));
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
// for the gradient: from the L2 cache.
template <bool kFloats>
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
        float slope = 0.f;
        Kl apart{0.f, 0.f};
        LogRatio ratio{0.f, 0u};
        if (x[j].valid) {
          ratio = log_ratio(x[j].logprob, x[j].old, s.limit);
          if (in.ref_logprobs.data) apart = kl(in.estimator, x[j].logprob, x[j].ref);
          slope = add_token(in, s, x[j], ratio, apart, own, sums);
          slopes += double(slope);
        }
        if (!in.sequence_ratio)
          write(in, s, x[j], ratio.clamped, slope, apart.slope, own.c, own.begin + t);
      }
    }
    if (!in.sequence_ratio) continue;
    const float slope = float(block_total(slopes, shared) / length);
    for (int64_t t = threadIdx.x; t < whole.count; t += kThreads) {
      const Token x = load_ratio<kFloats>(in, first, mask, t, whole.count);
      const LogRatio ratio = log_ratio(x.logprob, x.old, s.limit);
      Kl apart{0.f, 0.f};
      if (in.ref_logprobs.data)
        apart = kl(in.estimator, x.logprob, read<kFloats>(in.ref_logprobs, first.ref, t));
      write(in, s, x, ratio.clamped, slope, apart.slope, own.c, own.begin + t);
    }
  }
  if (grid_totals<kPolicySums, kMax>(sums, sums_of_blocks, totals)) finish(in, totals);
}

}  // namespace

const char* ppo_loss_fwd_cuda(const PolicyBatch& in, double* sums, void* stream) {
  bool floats = true;
  for (const Column* x : {&in.logprobs, &in.old_logprobs, &in.advantages, &in.entropy,
                          &in.ref_logprobs, &in.weights})
    floats = floats && (!x->data || x->dtype == kFp32);
  return floats ? launch_over<ppo_loss_fwd_kernel<true>>(in, !in.sequence_ratio, sums, stream)
                : launch_over<ppo_loss_fwd_kernel<false>>(in, !in.sequence_ratio, sums, stream);
}

}  // namespace tppo
