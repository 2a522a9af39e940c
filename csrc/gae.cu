// gae on a GPU: one read and one write of everything, 17 bytes a token, one launch (two where few
// long sequences are split over blocks: the first reads the inputs for the maps of the parts).
#include "gae.cuh"

namespace tppo {
using namespace sequence;
namespace {

template <bool kFloats>
struct GaeTokens {
  const GaeInputs& in;
  float *advantages, *returns;

  struct Raw {
    Group reward, value;
    uint32_t inside, valid;
  };

  __device__ Raw load(const Span& span, int64_t t) const {
    const uint32_t there = inside(span, t);
    return {sequence::load<kFloats>(in.rewards, span, t, there),
            sequence::load<kFloats>(in.values, span, t, there), there,
            load_mask(in.mask, span, t, there)};
  }

  __device__ Steps steps(const Raw& raw) const {
    Steps steps;
    steps.valid = flags(raw.valid);
    unpack<kFloats>(raw.reward, in.rewards.dtype, steps.reward);
    unpack<kFloats>(raw.value, in.values.dtype, steps.value);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      steps.reward[j] = has(steps.valid, j) ? steps.reward[j] : 0.f;
      steps.value[j] = has(steps.valid, j) ? steps.value[j] : 0.f;
    }
    return steps;
  }

  __device__ void emit(const Span& span, int64_t t, const Raw& raw, const Steps&,
                       const GaeResult* results) const {
    float advantage[kGroup], back[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      advantage[j] = results[j].advantage;
      back[j] = results[j].returns;
    }
    store(advantages, span, t, raw.inside, advantage);
    store(returns, span, t, raw.inside, back);
  }
};

template <bool kEmit, bool kFloats>
__global__ void __launch_bounds__(kThreads, 3)
    gae_blocks_kernel(GaeInputs in, int parts, GaeMap* maps, float* advantages, float* returns) {
  GaeTokens<kFloats> tokens{in, advantages, returns};
  walk_by_blocks<kEmit, 2>(tokens, in, parts, maps);
}

template <bool kFloats>
__global__ void __launch_bounds__(kThreads, 2)
    gae_warps_kernel(GaeInputs in, float* advantages, float* returns) {
  GaeTokens<kFloats> tokens{in, advantages, returns};
  walk_by_warps(tokens, in);
}

template <bool kFloats>
const char* fwd_typed(const GaeInputs& in, bool wide, int parts, GaeMap* maps, float* advantages,
                      float* returns, void* stream) {
  if (!wide)
    return launch(gae_warps_kernel<kFloats>, tasks_to_blocks(in.sequences.B, kWarps), stream, in,
                  advantages, returns);
  const int64_t blocks = tasks_to_blocks(in.sequences.B * parts, 1);
  if (parts > 1)
    if (const char* error = launch(gae_blocks_kernel<false, kFloats>, blocks, stream, in, parts,
                                   maps, advantages, returns))
      return error;
  return launch(gae_blocks_kernel<true, kFloats>, blocks, stream, in, parts, maps, advantages,
                returns);
}

}  // namespace

const char* gae_fwd_cuda(const GaeInputs& in, bool wide, int parts, float* maps, float* advantages,
                         float* returns, void* stream) {
  const bool floats = in.rewards.dtype == kFp32 && in.values.dtype == kFp32;
  return (floats ? fwd_typed<true> : fwd_typed<false>)(
      in, wide, parts, reinterpret_cast<GaeMap*>(maps), advantages, returns, stream);
}

}  // namespace tppo
