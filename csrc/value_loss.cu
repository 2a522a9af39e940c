#include "loss.cuh"
#include "value_loss.h"

namespace tppo {
namespace {

struct Token {
  bool valid;
  float value, target, old;
};

// One pass over a token's columns: 17 B a token with old values, mask and gradient in fp32; one
// more over the mask where a sequence's length is asked for.
template <bool kFloats>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    value_loss_fwd_kernel(ValueBatch in, double* parts) {
  __shared__ double shared[kWarps], totals[kValueSums];
  const Layout& at = in.layout;
  const float clip = float(value_of(in.clip));
  double sums[kValueSums] = {};
  for (int64_t b = blockIdx.x; b < at.B; b += gridDim.x) {
    const Span whole = span(at, b);
    const uint8_t* mask = mask_of(at, b, whole.begin);
    const int64_t first_value = first_of(in.values, at, b, whole.begin);
    const int64_t first_target = first_of(in.returns, at, b, whole.begin);
    const int64_t first_old = first_of(in.old_values, at, b, whole.begin);
    float c = 1.f;
    if (in.share.by_length) {
      double tokens = 0;
      for (int64_t t = threadIdx.x; t < whole.count; t += kThreads)
        if (!mask || mask[t]) tokens += 1.0;
      tokens = block_total(tokens, shared);
      c = float(1.0 / (tokens < 1.0 ? 1.0 : tokens));
    }
    const double tokens_before = sums[kSumTokens];
    for (int64_t start = threadIdx.x; start < whole.count; start += kThreads * kItems) {
      Token x[kItems];
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        const int64_t t = start + j * kThreads;
        x[j] = {t < whole.count, 0.f, 0.f, 0.f};
        if (!x[j].valid) continue;
        x[j].value = read<kFloats>(in.values, first_value, t);
        x[j].target = read<kFloats>(in.returns, first_target, t);
        if (in.old_values.data) x[j].old = read<kFloats>(in.old_values, first_old, t);
        if (mask) x[j].valid = mask[t] != 0;
      }
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        const int64_t t = start + j * kThreads;
        if (t >= whole.count) break;
        float slope = 0.f;
        if (x[j].valid) {
          const Squared squared = squared_error(x[j].value, x[j].target, x[j].old, clip);
          const double target = x[j].target, error = x[j].target - x[j].value;
          sums[kSumLoss] += double(c) * double(squared.loss);
          sums[kSumTokens] += 1.0;
          if (squared.clipped) sums[kSumClipped] += 1.0;
          sums[kSumReturn] += target;
          sums[kSumReturn2] += target * target;
          sums[kSumError] += error;
          sums[kSumError2] += error * error;
          slope = c * squared.slope;
        }
        if (in.dvalues) in.dvalues[whole.begin + t] = slope;
      }
    }
    if (in.share.count_of == Share::kSequences) {
      const bool any = __syncthreads_or(sums[kSumTokens] > tokens_before);
      if (threadIdx.x == 0 && any) sums[kSumLive] += 1.0;
    }
  }
  if (grid_totals<kValueSums, -1>(sums, parts, totals)) finish(in, totals);
}

}  // namespace

const char* value_loss_fwd_cuda(const ValueBatch& in, double* parts, void* stream) {
  bool floats = true;
  for (const Column* x : {&in.values, &in.returns, &in.old_values})
    floats = floats && (!x->data || x->dtype == kFp32);
  return launch_over(floats ? value_loss_fwd_kernel<true> : value_loss_fwd_kernel<false>, in,
                     in.layout.B, parts, stream);
}

}  // namespace tppo
