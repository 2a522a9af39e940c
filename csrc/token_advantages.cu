// token_advantages on a GPU in two launches. The first shapes rewards, walks (gae.cuh) and writes
// raw advantages, returns and rewards: 29 bytes a token; each block leaves the statistics of its
// tokens. In the second every block merges those in the same order and whitens a share of the
// advantages where they lie, 8 bytes a token and the masks; its first blocks write the statistics.
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
    uint32_t valid, trained;
  };

  __device__ Raw load(const Span& span, int64_t t) const {
    Raw raw = {sequence::load(in.walk.rewards, span, t), sequence::load(in.walk.values, span, t)};
    if (in.logprobs.data) {
      raw.logprob = sequence::load(in.logprobs, span, t);
      raw.ref = sequence::load(in.ref_logprobs, span, t);
    }
    raw.valid = load_mask(in.walk.mask, span, t);
    if (kEmit) raw.trained = load_mask(in.train_mask, span, t);
    return raw;
  }

  __device__ Steps steps(const Raw& raw) {
    Steps steps;
    steps.valid = raw.valid;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      steps.reward[j] = steps.value[j] = 0.f;
      if (!has(raw.valid, j)) continue;
      steps.reward[j] = value_of(raw.reward, in.walk.rewards.dtype, j);
      steps.value[j] = value_of(raw.value, in.walk.values.dtype, j);
      if (!in.logprobs.data) continue;
      const float divergence =
          kl_value(in.estimator, value_of(raw.logprob, in.logprobs.dtype, j),
                   value_of(raw.ref, in.ref_logprobs.dtype, j));
      steps.reward[j] -= times(kl_coef, divergence);
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
      if (!has(raw.valid, j)) continue;
      ++valid;
      tallies[kRewards].add(steps.reward[j]);
      tallies[kAdvantages].add(advantage[j]);
      tallies[kReturns].add(back[j]);
      if (!has(raw.trained, j)) continue;
      ++trained;
      tallies[kTrained].add(advantage[j]);
      largest = fmaxf(largest, fabsf(advantage[j]));
    }
    store(out.advantages, span, t, advantage);
    store(out.returns, span, t, back);
    store(out.rewards, span, t, steps.reward);
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
    const double valid = block_sum(tokens.valid), trained = block_sum(tokens.trained);
    const double largest = block_max(tokens.largest);
#pragma unroll
    for (int q = 0; q < kQuantities; ++q) {
      const Tally all{block_sum(tokens.tallies[q].sum), block_sum(tokens.tallies[q].squares)};
      if (threadIdx.x == q)  // [5, blocks]
        partials[q * int64_t(gridDim.x) + blockIdx.x] =
            moments_of(q == kTrained ? trained : valid, all, q == kTrained ? largest : 0);
    }
  }
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
    const double gap = partials[i].mean - mean;
    m2 += partials[i].m2 + partials[i].n * gap * gap;
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
    const Moments mine = merge_partials(all + blockIdx.x * int64_t(count), count);
    if (threadIdx.x == 0) write_statistics(blockIdx.x, mine, in.unbiased, statistics);
  }
  if (in.N == 0) return;
  const Whitening by = whitening(merge_partials(trained, count), 1e-8, in.unbiased, true);
  const Span span{0, in.N, 0, true};
  const Tokens x{in.x, kFp32, 0};
  for (int64_t t = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kGroup; t < in.N;
       t += int64_t(gridDim.x) * kThreads * kGroup) {
    const Group group = sequence::load(x, span, t);
    const uint32_t valid =
        load_mask({in.mask, 0}, span, t) & load_mask({in.train_mask, 0}, span, t);
    float result[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      result[j] = has(valid, j) ? whitened(value_of(group, kFp32, j), by) : 0.f;
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
  const int64_t blocks = std::max<int64_t>(kQuantities, std::min<int64_t>(groups, 1024));
  const bool statistics_too = statistics.scalars != nullptr;
  return launch(token_advantages_whiten_kernel, blocks, stream, in,
                statistics_too ? all + kTrained * int64_t(count) : all,
                statistics_too ? all : nullptr, count, statistics, out);
}

}  // namespace tppo
