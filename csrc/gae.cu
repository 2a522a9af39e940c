// gae on a GPU: one read and one write of everything, 17 bytes a token, one launch (two where few
// long sequences are split over blocks: the first reads the inputs for the maps of the parts).
#include "gae.cuh"

namespace tppo {
using namespace sequence;
namespace {

struct GaeTokens {
  const GaeInputs& in;
  float *advantages, *returns;

  struct Raw {
    Group reward, value;
    uint32_t valid;
  };

  __device__ Raw load(const Span& span, int64_t t) const {
    return {sequence::load(in.rewards, span, t), sequence::load(in.values, span, t),
            load_mask(in.mask, span, t)};
  }

  __device__ Steps steps(const Raw& raw) const {
    Steps steps;
    steps.valid = raw.valid;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const bool valid = has(raw.valid, j);
      steps.reward[j] = valid ? value_of(raw.reward, in.rewards.dtype, j) : 0.f;
      steps.value[j] = valid ? value_of(raw.value, in.values.dtype, j) : 0.f;
    }
    return steps;
  }

  __device__ void emit(const Span& span, int64_t t, const Raw&, const Steps&,
                       const GaeResult* results) const {
    float advantage[kGroup], back[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      advantage[j] = results[j].advantage;
      back[j] = results[j].returns;
    }
    store(advantages, span, t, advantage);
    store(returns, span, t, back);
  }
};

// A task is one part of one sequence, for a block (kWarps = 8) or for a warp (kWarps = 1).
template <int kWarps, bool kEmit>
__global__ void __launch_bounds__(kThreads, kWarps > 1 ? 3 : 2)
    gae_fwd_kernel(GaeInputs in, int parts, GaeMap* maps, float* advantages, float* returns) {
  constexpr int kTasks = kThreads / kWarp / kWarps;  // of a block at a time
  __shared__ GaeMap shared[2][kWarps];
  GaeTokens tokens{in, advantages, returns};
  int turn = 0;
  for (int64_t task = int64_t(blockIdx.x) * kTasks + threadIdx.x / kWarp / kWarps;
       task < in.sequences.B * parts; task += int64_t(gridDim.x) * kTasks)
    walk_task<kWarps, kEmit>(tokens, in, task, parts, maps, shared, turn);
}

}  // namespace

const char* gae_fwd_cuda(const GaeInputs& in, bool wide, int parts, float* maps, float* advantages,
                         float* returns, void* stream) {
  const auto joined = reinterpret_cast<GaeMap*>(maps);
  if (!wide)
    return launch(gae_fwd_kernel<1, true>, tasks_to_blocks(in.sequences.B, 1), stream, in, 1,
                  joined, advantages, returns);
  const int64_t blocks = tasks_to_blocks(in.sequences.B * parts, kThreads / kWarp);
  if (parts > 1)
    if (const char* error = launch(gae_fwd_kernel<8, false>, blocks, stream, in, parts, joined,
                                   advantages, returns))
      return error;
  return launch(gae_fwd_kernel<8, true>, blocks, stream, in, parts, joined, advantages, returns);
}

}  // namespace tppo
