// token_advantages on a GPU in two launches. The first shapes rewards, walks (gae.cuh) and writes
// raw advantages, returns and rewards: 29 bytes a token; each block leaves the statistics of its
// tokens. In the second every block merges those in the same order and whitens a share of the
// advantages where they lie, 8 bytes a token and the masks; its first block writes the statistics.
// Nothing is atomic: the same call gives the same bits.
#include "gae.cuh"
#include "ppo_loss.h"
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
  // In double a thread's few hundred tokens leave 1e-14 of max|x|^2, far below kTiny^2.
  __device__ Moments moments(int n, float largest) const {
    const double mean = sum / at_least_one(n), m2 = squares - sum * mean;
    return {double(n), mean, m2 < 0 ? 0 : m2, double(largest)};
  }
};

__device__ inline float kl_value(int estimator, float logprob, float ref) {
  if (estimator == kK2) return kl_of<kK2>(logprob, ref).value;
  if (estimator == kAbs) return kl_of<kAbs>(logprob, ref).value;
  if (estimator == kK3 || estimator == kK3Plus) return kl_of<kK3>(logprob, ref).value;
  return kl_of<kK1>(logprob, ref).value;
}

template <bool kEmit>
struct AdvantageTokens {
  const AdvantageInputs& in;
  AdvantageOutputs out;
  float kl_coef;
  int valid = 0, trained = 0;
  float largest = 0;
  Tally tallies[kQuantities];

  struct Raw {
    Group reward, value, logprob, ref;
    unsigned valid, trained;
  };

  __device__ Raw load(const Span& span, int64_t t) const {
    Raw raw = {sequence::load(in.walk.rewards, span, t), sequence::load(in.walk.values, span, t)};
    if (in.logprobs.data) {
      raw.logprob = sequence::load(in.logprobs, span, t);
      raw.ref = sequence::load(in.ref_logprobs, span, t);
    }
    raw.valid = raw.trained = load_mask(in.walk.mask, span, t);
    if (kEmit && in.train_mask.data) raw.trained &= load_mask(in.train_mask, span, t);
    return raw;
  }

  __device__ Steps steps(const Raw& raw) {
    Steps steps;
    steps.valid = raw.valid;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      steps.reward[j] = steps.value[j] = 0.f;
      if (!(raw.valid >> j & 1)) continue;
      steps.reward[j] = value_of(raw.reward, in.walk.rewards.dtype, j);
      steps.value[j] = value_of(raw.value, in.walk.values.dtype, j);
      if (!in.logprobs.data) continue;
      const float divergence =
          kl_value(in.estimator, value_of(raw.logprob, in.logprobs.dtype, j),
                   value_of(raw.ref, in.ref_logprobs.dtype, j));
      steps.reward[j] -= kl_coef * divergence;
      if (kEmit) tallies[kDivergence].add(divergence);
    }
    return steps;
  }

  __device__ void emit(const Span& span, int64_t t, const Raw& raw, const Steps& steps,
                       const GaeResult* results) {
    float advantage[kGroup], back[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      advantage[j] = results[j].advantage;
      back[j] = results[j].returns;
      if (!(raw.valid >> j & 1)) continue;
      ++valid;
      tallies[kRewards].add(steps.reward[j]);
      tallies[kAdvantages].add(advantage[j]);
      tallies[kReturns].add(back[j]);
      if (!(raw.trained >> j & 1)) continue;
      ++trained;
      tallies[kTrained].add(advantage[j]);
      largest = fmaxf(largest, fabsf(advantage[j]));
    }
    store(out.advantages, span, t, advantage);
    store(out.returns, span, t, back);
    store(out.rewards, span, t, steps.reward);
  }
};

// The moments of all threads of the block, for every thread, merged in a fixed order.
__device__ Moments merge_block(Moments mine) {
  __shared__ Moments shared[kThreads / kWarp];
  for (int step = kWarp / 2; step > 0; step /= 2)
    mine = merge(mine, {__shfl_down_sync(kAll, mine.n, step),
                        __shfl_down_sync(kAll, mine.mean, step),
                        __shfl_down_sync(kAll, mine.m2, step),
                        __shfl_down_sync(kAll, mine.largest, step)});
  __syncthreads();  // who still reads the last result
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = mine;
  __syncthreads();
  Moments all = shared[0];
  for (int warp = 1; warp < kThreads / kWarp; ++warp) all = merge(all, shared[warp]);
  return all;
}

template <int kWarps, bool kEmit>
__global__ void __launch_bounds__(kThreads, 2)
    token_advantages_fwd_kernel(AdvantageInputs in, int parts, GaeMap* maps, AdvantageOutputs out,
                                Moments* partials) {
  constexpr int kTasks = kThreads / kWarp / kWarps;  // of a block at a time
  __shared__ GaeMap shared[2][kWarps];
  AdvantageTokens<kEmit> tokens{in, out, value_at(in.kl_coef, 0)};
  int turn = 0;
  for (int64_t task = int64_t(blockIdx.x) * kTasks + threadIdx.x / kWarp / kWarps;
       task < in.walk.sequences.B * parts; task += int64_t(gridDim.x) * kTasks)
    walk_task<kWarps, kEmit>(tokens, in.walk, task, parts, maps, shared, turn);
  if constexpr (kEmit) {
#pragma unroll
    for (int q = 0; q < kQuantities; ++q) {
      const Moments all = merge_block(tokens.tallies[q].moments(
          q == kTrained ? tokens.trained : tokens.valid, q == kTrained ? tokens.largest : 0.f));
      if (threadIdx.x == 0) partials[q * int64_t(gridDim.x) + blockIdx.x] = all;  // [5, blocks]
    }
  }
}

__device__ Moments merge_partials(const Moments* partials, int count) {
  Moments mine;
  for (int i = threadIdx.x; i < count; i += kThreads) mine = merge(mine, partials[i]);
  return merge_block(mine);
}

__device__ void write_statistics(const Moments* partials, int count, bool unbiased,
                                 const AdvantageStatistics& out) {
  for (int q = 0; q < kQuantities; ++q) {
    const Moments all = merge_partials(partials + q * int64_t(count), count);
    if (threadIdx.x) continue;
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
}

// x, out: [N], or the same memory; trained: both masks [N], of which each may be null. Partials
// [count] of what is trained; all of them [5, count], or null: no statistics are wanted.
__global__ void __launch_bounds__(kThreads)
    token_advantages_whiten_kernel(WhitenInputs in, const Moments* trained, const Moments* all,
                                   int count, AdvantageStatistics statistics, float* out) {
  if (all && blockIdx.x == 0) write_statistics(all, count, in.unbiased, statistics);
  if (in.N == 0) return;
  const Whitening by = whitening(merge_partials(trained, count), 1e-8, in.unbiased, true);
  const Span span{0, in.N, 0, true};
  const Tokens x{in.x, kFp32, 0};
  for (int64_t t = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kGroup; t < in.N;
       t += int64_t(gridDim.x) * kThreads * kGroup) {
    const Group group = sequence::load(x, span, t);
    unsigned valid = load_mask({in.mask, 0}, span, t);
    if (in.train_mask) valid &= load_mask({in.train_mask, 0}, span, t);
    float result[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      result[j] = valid >> j & 1 ? whitened(value_of(group, kFp32, j), by) : 0.f;
    store(out, span, t, result);
  }
}

}  // namespace
}  // namespace tppo::sequence

namespace tppo {
using namespace sequence;

const char* token_advantages_fwd_cuda(const AdvantageInputs& in, bool wide, int parts, int blocks,
                                      float* maps, double* partials, const AdvantageOutputs& out,
                                      void* stream) {
  const auto joined = reinterpret_cast<GaeMap*>(maps);
  const auto left = reinterpret_cast<Moments*>(partials);
  if (!wide)
    return launch(token_advantages_fwd_kernel<1, true>, blocks, stream, in, 1, joined, out, left);
  if (parts > 1)
    if (const char* error = launch(token_advantages_fwd_kernel<8, false>, blocks, stream, in,
                                   parts, joined, out, left))
      return error;
  return launch(token_advantages_fwd_kernel<8, true>, blocks, stream, in, parts, joined, out, left);
}

const char* token_advantages_whiten_cuda(const WhitenInputs& in, const double* partials, int count,
                                         const AdvantageStatistics& statistics, float* out,
                                         void* stream) {
  const auto all = reinterpret_cast<const Moments*>(partials);
  const int64_t groups = (in.N + kThreads * kGroup - 1) / (kThreads * kGroup);
  const int64_t blocks = std::max<int64_t>(1, std::min<int64_t>(groups, 1024));
  const bool statistics_too = statistics.scalars != nullptr;
  return launch(token_advantages_whiten_kernel, blocks, stream, in,
                statistics_too ? all + kTrained * int64_t(count) : all,
                statistics_too ? all : nullptr, count, statistics, out);
}

}  // namespace tppo
