// token_advantages on a GPU in two launches. The first shapes rewards, walks (gae.cuh) and writes
// raw advantages, returns and rewards: 29 bytes a token; each block leaves the statistics of its
// tokens. In the second every block merges those in the same order and whitens a share of the
// advantages where they lie, 8 bytes a token and the masks; its first blocks write the statistics.
// Nothing is atomic: the same call gives the same bits.
#include "gae.cuh"
#include "kl.h"
#include "whiten.h"

namespace tppo::sequence {
namespace {

enum Quantity { kRewards, kAdvantages, kReturns, kTrained, kDivergence, kQuantities };

struct Tally {
  double sum = 0, squares = 0;
  __device__ void add(float x) {
    sum += x;
    squares += double(x) * x;
  }
};

// out = the estimator's value for each of a group; asked once, not once a token.
__device__ inline void kl_values(int estimator, const float* logprob, const float* ref,
                                 float* out) {
#define TPPO_EACH(kEstimator)         \
  _Pragma("unroll")                   \
  for (int j = 0; j < kGroup; ++j) out[j] = kl_of<kEstimator>(logprob[j], ref[j]).value
  if (estimator == kK2) {
    TPPO_EACH(kK2);
  } else if (estimator == kAbs) {
    TPPO_EACH(kAbs);
  } else if (estimator == kK3 || estimator == kK3Plus) {
    TPPO_EACH(kK3);
  } else {
    TPPO_EACH(kK1);
  }
#undef TPPO_EACH
}

// What is not valid counts as 0 in every sum, and adds nothing to it.
template <bool kEmit, bool kFloats>
struct AdvantageTokens {
  const AdvantageInputs& in;
  AdvantageOutputs out;
  float kl_coef;
  int valid = 0, trained = 0;
  float largest = 0;
  Tally tallies[kQuantities];

  struct Raw {
    Group reward, value, logprob, ref;
    uint32_t inside, valid, trained;
  };

  __device__ Raw load(const Span& span, int64_t t) const {
    Raw raw;
    raw.inside = inside(span, t);
    raw.reward = sequence::load<kFloats>(in.walk.rewards, span, t, raw.inside);
    raw.value = sequence::load<kFloats>(in.walk.values, span, t, raw.inside);
    if (in.logprobs.data) {
      raw.logprob = sequence::load<kFloats>(in.logprobs, span, t, raw.inside);
      raw.ref = sequence::load<kFloats>(in.ref_logprobs, span, t, raw.inside);
    }
    raw.valid = load_mask(in.walk.mask, span, t, raw.inside);
    if (kEmit) raw.trained = load_mask(in.train_mask, span, t, raw.inside);
    return raw;
  }

  __device__ Steps steps(const Raw& raw) {
    Steps steps;
    steps.valid = flags(raw.valid);
    unpack<kFloats>(raw.reward, in.walk.rewards.dtype, steps.reward);
    unpack<kFloats>(raw.value, in.walk.values.dtype, steps.value);
    if (in.logprobs.data) {
      float logprob[kGroup], ref[kGroup], divergence[kGroup];
      unpack<kFloats>(raw.logprob, in.logprobs.dtype, logprob);
      unpack<kFloats>(raw.ref, in.ref_logprobs.dtype, ref);
      kl_values(in.estimator, logprob, ref, divergence);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        steps.reward[j] -= times(kl_coef, divergence[j]);
        if (kEmit) tallies[kDivergence].sum += has(steps.valid, j) ? divergence[j] : 0.f;
      }
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      steps.reward[j] = has(steps.valid, j) ? steps.reward[j] : 0.f;
      steps.value[j] = has(steps.valid, j) ? steps.value[j] : 0.f;
    }
    return steps;
  }

  __device__ void emit(const Span& span, int64_t t, const Raw& raw, const Steps& steps,
                       const GaeResult* results) {
    const uint32_t both = steps.valid & flags(raw.trained);
    valid += __popc(steps.valid);
    trained += __popc(both);
    float advantage[kGroup], back[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      advantage[j] = results[j].advantage;
      back[j] = results[j].returns;
      tallies[kRewards].add(steps.reward[j]);
      tallies[kAdvantages].add(advantage[j]);
      tallies[kReturns].add(back[j]);
      const float whitened = has(both, j) ? advantage[j] : 0.f;
      tallies[kTrained].add(whitened);
      largest = fmaxf(largest, fabsf(whitened));
    }
    store(out.advantages, span, t, raw.inside, advantage);
    store(out.returns, span, t, raw.inside, back);
    store(out.rewards, span, t, raw.inside, steps.reward);
  }
};

// The sum over the block's threads, for every one of them; in a fixed order.
__device__ double block_sum(double x) {
  __shared__ double shared[kThreads / kWarp];
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_down_sync(kAll, x, step);
  __syncthreads();  // who still reads the last result
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  double all = 0;
  for (double part : shared) all += part;
  return all;
}

__device__ double block_max(double x) {
  __shared__ double shared[kThreads / kWarp];
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmax(x, __shfl_down_sync(kAll, x, step));
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  double all = 0;
  for (double part : shared) all = fmax(all, part);
  return all;
}

// From sums over a block's tokens: in double some thousands of them leave 1e-14 of max|x|^2, far
// below what counts as no variance.
__device__ Moments moments_of(double n, const Tally& tally, double largest) {
  const double mean = tally.sum / at_least_one(n), m2 = tally.squares - tally.sum * mean;
  return {n, mean, m2 < 0 ? 0 : m2, largest};
}

// partials [5, blocks]: the statistics of a block's tokens.
template <class Source>
__device__ void leave_moments(const Source& tokens, Moments* partials) {
  const double valid = block_sum(tokens.valid), trained = block_sum(tokens.trained);
  const double largest = block_max(tokens.largest);
#pragma unroll
  for (int q = 0; q < kQuantities; ++q) {
    const Tally all{block_sum(tokens.tallies[q].sum), block_sum(tokens.tallies[q].squares)};
    if (threadIdx.x == q)
      partials[q * int64_t(gridDim.x) + blockIdx.x] =
          moments_of(q == kTrained ? trained : valid, all, q == kTrained ? largest : 0);
  }
}

template <bool kEmit, bool kFloats>
__global__ void __launch_bounds__(kThreads, 2)
    token_advantages_blocks_kernel(AdvantageInputs in, int parts, GaeMap* maps,
                                   AdvantageOutputs out, Moments* partials) {
  AdvantageTokens<kEmit, kFloats> tokens{in, out, value_at(in.kl_coef, 0)};
  walk_by_blocks<kEmit, kFloats ? 2 : 1>(tokens, in.walk, parts, maps);  // as registers allow
  if (kEmit) leave_moments(tokens, partials);
}

template <bool kFloats>
__global__ void __launch_bounds__(kThreads, 2)
    token_advantages_warps_kernel(AdvantageInputs in, AdvantageOutputs out, Moments* partials) {
  AdvantageTokens<true, kFloats> tokens{in, out, value_at(in.kl_coef, 0)};
  walk_by_warps(tokens, in.walk);
  leave_moments(tokens, partials);
}

// The moments of all blocks' tokens: the common mean first, then the spread around it.
__device__ Moments merge_partials(const Moments* partials, int count) {
  double n = 0, sum = 0, m2 = 0, largest = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    n += partials[i].n;
    sum += partials[i].n * partials[i].mean;
    largest = fmax(largest, partials[i].largest);
  }
  n = block_sum(n);
  const double mean = block_sum(sum) / at_least_one(n);
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const double difference = partials[i].mean - mean;
    m2 += partials[i].m2 + partials[i].n * difference * difference;
  }
  return {n, mean, block_sum(m2), block_max(largest)};
}

__device__ void write_statistics(int q, const Moments& all, bool unbiased,
                                 const AdvantageStatistics& out) {
  if (q == kDivergence) {
    out.scalars[0] = float(all.mean);
  } else if (q == kTrained) {
    out.moments[0] = all.n, out.moments[1] = all.mean;
    out.moments[2] = all.m2, out.moments[3] = all.largest;
  } else {
    out.scalars[1 + q] = float(all.mean);
    out.scalars[4 + q] = float(sqrt(variance(all, unbiased)));
    if (q == kRewards) *out.n = int64_t(all.n);
  }
}

// x, out: [N], or the same memory; trained: both masks [N], of which each may be null. Partials
// [count] of what is trained; all of them [5, count], or null: no statistics are wanted.
__global__ void __launch_bounds__(kThreads)
    token_advantages_whiten_kernel(WhitenInputs in, const Moments* trained, const Moments* all,
                                   int count, AdvantageStatistics statistics, float* out) {
  if (all && blockIdx.x < kQuantities) {  // a block for each quantity
    const Moments merged = merge_partials(all + blockIdx.x * int64_t(count), count);
    if (threadIdx.x == 0) write_statistics(blockIdx.x, merged, in.unbiased, statistics);
  }
  if (in.N == 0) return;
  const Whitening by = whitening(merge_partials(trained, count), 1e-8, in.unbiased, true);
  const Span span{0, in.N, 0, true};
  const Tokens x{in.x, kFp32, 0};
  for (int64_t t = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kGroup; t < in.N;
       t += int64_t(gridDim.x) * kThreads * kGroup) {
    const uint32_t there = inside(span, t);
    float result[kGroup];
    unpack<true>(sequence::load<true>(x, span, t, there), kFp32, result);
    const uint32_t valid = flags(load_mask({in.mask, 0}, span, t, there)) &
                           flags(load_mask({in.train_mask, 0}, span, t, there));
#pragma unroll
    for (int j = 0; j < kGroup; ++j) result[j] = has(valid, j) ? whitened(result[j], by) : 0.f;
    store(out, span, t, there, result);
  }
}

template <bool kFloats>
const char* fwd_typed(const AdvantageInputs& in, bool wide, int parts, int blocks, GaeMap* maps,
                      Moments* partials, const AdvantageOutputs& out, void* stream) {
  if (!wide)
    return launch(token_advantages_warps_kernel<kFloats>, blocks, stream, in, out, partials);
  if (parts > 1)
    if (const char* error = launch(token_advantages_blocks_kernel<false, kFloats>, blocks, stream,
                                   in, parts, maps, out, partials))
      return error;
  return launch(token_advantages_blocks_kernel<true, kFloats>, blocks, stream, in, parts, maps, out,
                partials);
}

}  // namespace
}  // namespace tppo::sequence

namespace tppo {
using namespace sequence;

const char* token_advantages_fwd_cuda(const AdvantageInputs& in, bool wide, int parts, int blocks,
                                      float* maps, double* partials, const AdvantageOutputs& out,
                                      void* stream) {
  bool floats = true;
  for (const Tokens* x : {&in.walk.rewards, &in.walk.values, &in.logprobs, &in.ref_logprobs})
    floats = floats && (!x->data || x->dtype == kFp32);
  return (floats ? fwd_typed<true> : fwd_typed<false>)(
      in, wide, parts, blocks, reinterpret_cast<GaeMap*>(maps),
      reinterpret_cast<Moments*>(partials), out, stream);
}

const char* token_advantages_whiten_cuda(const WhitenInputs& in, const double* partials, int count,
                                         const AdvantageStatistics& statistics, float* out,
                                         void* stream) {
  const auto all = reinterpret_cast<const Moments*>(partials);
  const int64_t groups = (in.N + kThreads * kGroup - 1) / (kThreads * kGroup);
  const int64_t blocks = std::max<int64_t>(kQuantities, std::min<int64_t>(groups, 1024));
  const bool statistics_too = statistics.scalars != nullptr;
  return launch(token_advantages_whiten_kernel, blocks, stream, in,
                statistics_too ? all + kTrained * int64_t(count) : all,
                statistics_too ? all : nullptr, count, statistics, out);
}

}  // namespace tppo
