#include "ppo_loss.h"

#include "kernels.h"

namespace tppo {
namespace {

struct Block {
  int64_t begin, count;  // where its tokens lie in a result, and how many there are
  alignas(64) Bits valid[kBlock];
  alignas(64) float logprob[kBlock], old[kBlock], advantage[kBlock], weight[kBlock],
      entropy[kBlock], ref[kBlock];
  alignas(64) float d[kBlock], clamped[kBlock], ratio[kBlock], loss[kBlock], slope[kBlock],
      minus_d[kBlock], k3[kBlock], low[kBlock], high[kBlock], dual[kBlock], kl[kBlock],
      kl_slope[kBlock];
  alignas(64) float by_logprob[kBlock];  // of kCispo
};

TPPO_CLONES void log_ratios(float limit, Block& x) {
  for (int64_t i = 0; i < kBlock; ++i) {
    const LogRatio at = log_ratio(x.logprob[i], x.old[i], limit);
    x.d[i] = at.d;
    x.clamped[i] = keep(at.clamped, 1.f);
  }
}

void load(const PolicyBatch& in, const Column& column, int64_t b, const Span& whole, int64_t start,
          const Block& x, float* out) {
  const int64_t first = first_of(column, in.layout, b, whole.begin) + (column.step ? start : 0);
  load_column(column, first, x.count, x.valid, out);
}

// Which tokens of a block are valid, and their d.
void load_ratios(const PolicyBatch& in, const PolicyScalars& s, int64_t b, const Span& whole,
                 int64_t start, Block& x) {
  const uint8_t* mask = mask_of(in.layout, b, whole.begin);
  x.begin = whole.begin + start;
  x.count = std::min(kBlock, whole.count - start);
  load_mask(mask ? mask + start : nullptr, x.count, x.valid);
  load(in, in.logprobs, b, whole, start, x, x.logprob);
  load(in, in.old_logprobs, b, whole, start, x, x.old);
  log_ratios(s.limit, x);
}

void load_rest(const PolicyBatch& in, int64_t b, const Span& whole, int64_t start, Block& x) {
  load(in, in.advantages, b, whole, start, x, x.advantage);
  load(in, in.entropy, b, whole, start, x, x.entropy);
  if (in.weights.data)
    load(in, in.weights, b, whole, start, x, x.weight);
  else
    std::fill(x.weight, x.weight + kBlock, 1.f);
}

template <int kObjective>
TPPO_INLINE void policy_loop(const PolicyScalars& s, const float* sequence_d, Block& x) {
  const bool by_sequence = sequence_d != nullptr;
  const float shared = by_sequence ? exp_of(*sequence_d) : 0.f;
  for (int64_t i = 0; i < kBlock; ++i) {
    const Bits valid = x.valid[i];
    const float e = exp_of(x.d[i]);
    const float k3 = exp_beyond_linear(x.d[i], e);
    const float ratio = by_sequence ? shared : e;
    const Policy at =
        policy_loss<kObjective>(ratio, x.logprob[i], x.advantage[i], x.weight[i], s);
    x.ratio[i] = keep(valid, ratio);
    x.loss[i] = keep(valid, at.loss);
    x.slope[i] = keep(valid, at.by_ratio);
    if (kObjective == kCispo) x.by_logprob[i] = keep(valid, at.by_logprob);
    x.minus_d[i] = -x.d[i];
    x.k3[i] = k3;
    const Bits counted = kObjective == kCispo ? valid : ~0u;  // others need an advantage
    x.low[i] = keep(at.low & counted, 1.f);
    x.high[i] = keep(at.high & counted, 1.f);
    x.dual[i] = keep(at.dual, 1.f);
  }
}

// The loss of a block without KL and entropy. sequence_d: null, or the mean d of the sequence.
TPPO_CLONES void clip_part(const PolicyScalars& s, const float* sequence_d, Block& x) {
  policy_loop<kClip>(s, sequence_d, x);
}

TPPO_CLONES void cispo_part(const PolicyScalars& s, const float* sequence_d, Block& x) {
  policy_loop<kCispo>(s, sequence_d, x);
}

TPPO_CLONES void sapo_part(const PolicyScalars& s, const float* sequence_d, Block& x) {
  policy_loop<kSapo>(s, sequence_d, x);
}

template <int kEstimator, bool kClamps>
TPPO_INLINE void kl_loop(float clamp, Block& x) {
  for (int64_t i = 0; i < kBlock; ++i) {
    const Kl at = kClamps ? kl_of<kEstimator>(x.logprob[i], x.ref[i], clamp)
                          : kl_of<kEstimator>(x.logprob[i], x.ref[i]);
    x.kl[i] = at.value;
    x.kl_slope[i] = at.slope;
  }
}

template <bool kClamps>
TPPO_INLINE void kl_of_block(int estimator, float clamp, Block& x) {
  if (estimator == kK1) kl_loop<kK1, kClamps>(clamp, x);
  if (estimator == kK2) kl_loop<kK2, kClamps>(clamp, x);
  if (estimator == kK3) kl_loop<kK3, kClamps>(clamp, x);
  if (estimator == kAbs) kl_loop<kAbs, kClamps>(clamp, x);
  if (estimator == kK1Plus) kl_loop<kK1Plus, kClamps>(clamp, x);
  if (estimator == kK3Plus) kl_loop<kK3Plus, kClamps>(clamp, x);
}

TPPO_CLONES void kl_part(int estimator, Block& x) { kl_of_block<false>(estimator, 0.f, x); }

TPPO_CLONES void clamped_kl_part(int estimator, float clamp, Block& x) {
  kl_of_block<true>(estimator, clamp, x);
}

// KL times r, which has a part in the derivative by the ratio.
TPPO_CLONES void weight_kl(float kl_coef, Block& x) {
  for (int64_t i = 0; i < kBlock; ++i) {
    x.kl[i] = keep(x.valid[i], x.ratio[i] * x.kl[i]);
    x.kl_slope[i] = keep(x.valid[i], x.ratio[i] * x.kl_slope[i]);
    x.slope[i] += times(kl_coef, x.kl[i]);
  }
}

TPPO_CLONES void add_other_terms(const PolicyScalars& s, Block& x) {
  for (int64_t i = 0; i < kBlock; ++i)
    x.loss[i] += times(-s.entropy_coef, x.entropy[i]) + times(s.kl_coef, x.kl[i]);
}

// slope: null, or what every token of the sequence that is not clamped has in common.
TPPO_CLONES void write_gradients(const PolicyScalars& s, float c, const float* slope,
                                 const Block& x, float* dlogprobs, float* dentropy) {
  const bool by_sequence = slope != nullptr;
  const float shared = by_sequence ? *slope : 0.f, by_entropy = c * -s.entropy_coef;
  if (dlogprobs)
    for (int64_t i = 0; i < x.count; ++i) {
      const float own = by_sequence ? shared : x.slope[i];
      const float clipped = keep(bits_if(x.clamped[i] == 0.f), own);
      const float all = c * (clipped + times(s.kl_coef, x.kl_slope[i]));
      dlogprobs[x.begin + i] = keep(x.valid[i], all);
    }
  if (dentropy)
    for (int64_t i = 0; i < x.count; ++i) dentropy[x.begin + i] = keep(x.valid[i], by_entropy);
}

TPPO_CLONES void add_by_logprob(float c, const Block& x, float* dlogprobs) {
  for (int64_t i = 0; i < x.count; ++i) dlogprobs[x.begin + i] += c * x.by_logprob[i];
}

TPPO_CLONES float largest_of(const float* x) {
  float lanes[16] = {};
  for (int64_t i = 0; i < kBlock; i += 16)
    for (int j = 0; j < 16; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  return *std::max_element(lanes, lanes + 16);
}

void load_kl(const PolicyBatch& in, const PolicyScalars& s, int64_t b, const Span& whole,
             int64_t start, Block& x) {
  if (!in.ref_logprobs.data) return;
  load(in, in.ref_logprobs, b, whole, start, x, x.ref);
  if (in.kl_clamped)
    clamped_kl_part(in.estimator, s.kl_clamp, x);
  else
    kl_part(in.estimator, x);
}

// All terms of a block but the entropy's.
void load_terms(const PolicyBatch& in, const PolicyScalars& s, int64_t b, const Span& whole,
                int64_t start, const float* sequence_d, Block& x) {
  load_ratios(in, s, b, whole, start, x);
  load_rest(in, b, whole, start, x);
  if (in.objective == kClip) clip_part(s, sequence_d, x);
  if (in.objective == kCispo) cispo_part(s, sequence_d, x);
  if (in.objective == kSapo) sapo_part(s, sequence_d, x);
  load_kl(in, s, b, whole, start, x);
  if (in.ref_logprobs.data && in.kl_ratio_weighted) weight_kl(s.kl_coef, x);
}

// slope: null, or what the tokens of a sequence have in common.
void write(const PolicyBatch& in, const PolicyScalars& s, float c, const float* slope,
           const Block& x) {
  write_gradients(s, c, slope, x, in.dlogprobs, in.dentropy);
  if (in.objective == kCispo && in.dlogprobs) add_by_logprob(c, x, in.dlogprobs);
}

// The sums of one sequence are added to sums [kPolicySums]; its gradients are written.
void sequence(const PolicyBatch& in, const PolicyScalars& s, int64_t b, Block& x, double* sums) {
  const Span whole = span(in.layout, b);
  const uint8_t* mask = mask_of(in.layout, b, whole.begin);
  const double tokens = double(mask ? count_valid(mask, whole.count) : whole.count);
  const double length = std::max(tokens, 1.0), c = in.share.by_length ? 1.0 / length : 1.0;
  double d = 0, slopes = 0;
  for (int64_t start = 0; in.sequence_ratio && start < whole.count; start += kBlock) {
    load_ratios(in, s, b, whole, start, x);
    d += block_sum(x.d);
  }
  const float mean_d = float(d / length);
  for (int64_t start = 0; start < whole.count; start += kBlock) {
    load_terms(in, s, b, whole, start, in.sequence_ratio ? &mean_d : nullptr, x);
    add_other_terms(s, x);
    sums[kLoss] += c * block_sum(x.loss);
    const float* columns[] = {x.low, x.high, x.dual, x.clamped, x.minus_d, x.k3, x.ratio,
                              x.entropy, x.kl};
    for (int k = 0; k < kMax - kLow; ++k) sums[kLow + k] += block_sum(columns[k]);
    sums[kMax] = std::max(sums[kMax], double(largest_of(x.ratio)));
    if (in.sequence_ratio)
      slopes += block_sum(x.slope);
    else
      write(in, s, float(c), nullptr, x);
  }
  sums[kTokens] += tokens;
  sums[kLive] += tokens > 0;
  if (!in.sequence_ratio || !(in.dlogprobs || in.dentropy)) return;
  const float shared = float(slopes / length);
  for (int64_t start = 0; start < whole.count; start += kBlock) {
    if (in.objective == kCispo || in.kl_ratio_weighted) {  // by_logprob, kl_slope hold the ratio
      load_terms(in, s, b, whole, start, &mean_d, x);
    } else {
      load_ratios(in, s, b, whole, start, x);
      load_kl(in, s, b, whole, start, x);
    }
    write(in, s, float(c), &shared, x);
  }
}

}  // namespace

void ppo_loss_fwd(const PolicyBatch& in, int threads) {
  const PolicyScalars s = scalars_of(in);
  const int64_t B = in.layout.B, groups = std::min(B, kGroups);
  std::vector<double> parts(groups * kPolicySums);
  parallel_for(groups, group_grain(groups, in.layout.N), threads, [&](int64_t first, int64_t last) {
    Block x;
    std::fill(x.kl, x.kl + kBlock, 0.f);
    std::fill(x.kl_slope, x.kl_slope + kBlock, 0.f);
    for (int64_t g = first; g < last; ++g)
      for (int64_t b = B * g / groups; b < B * (g + 1) / groups; ++b)
        sequence(in, s, b, x, &parts[g * kPolicySums]);
  });
  double sums[kPolicySums] = {};
  for (int64_t g = 0; g < groups; ++g)
    for (int k = 0; k < kPolicySums; ++k) {
      const double part = parts[g * kPolicySums + k];
      sums[k] = k == kMax ? std::max(sums[k], part) : sums[k] + part;
    }
  finish(in, sums);
}

}  // namespace tppo
