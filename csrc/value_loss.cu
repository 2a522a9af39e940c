#include "loss.cuh"
#include "value_loss.h"

namespace tppo {
namespace {

struct Token {
  bool valid;
  float value, target, old;
};

// One pass over a token's columns: 17 B a token with old values, mask and gradient in fp32; one
// more over the whole sequence's mask where its length is asked for.
template <bool kFloats>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    value_loss_fwd_kernel(ValueBatch in, int parts, double* sums_of_blocks) {
  __shared__ double shared[kWarps], totals[kValueSums];
  const Layout& at = in.layout;
  const float clip = float(value_of(in.clip));
  const bool counts_live = in.share.count_of == Share::kSequences;
  double sums[kValueSums] = {};
  for (int64_t task = blockIdx.x; task < at.B * parts; task += gridDim.x) {
    const int64_t b = task / parts;
    const int part = int(task % parts);
    const Span whole = span(at, b);
    const Range range = range_of(whole.count, part, parts);
    if (range.first == range.last) continue;
    const uint8_t* mask = mask_of(at, b, whole.begin);
    const int64_t first_value = first_of(in.values, at, b, whole.begin);
    const int64_t first_target = first_of(in.returns, at, b, whole.begin);
    const int64_t first_old = first_of(in.old_values, at, b, whole.begin);
    double length = 1.0;
    if (in.share.by_length || counts_live) length = count_tokens(mask, whole.count, shared);
    if (counts_live && part == 0 && threadIdx.x == 0 && length > 0.0) sums[kSumLive] += 1.0;
    const float c = in.share.by_length ? float(1.0 / (length < 1.0 ? 1.0 : length)) : 1.f;
    for (int64_t start = range.first + threadIdx.x; start < range.last;
         start += kThreads * kItems) {
      Token x[kItems];
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        const int64_t t = start + j * kThreads;
        x[j] = {t < range.last, 0.f, 0.f, 0.f};
        if (!x[j].valid) continue;
        x[j].value = read<kFloats>(in.values, first_value, t);
        x[j].target = read<kFloats>(in.returns, first_target, t);
        if (in.old_values.data) x[j].old = read<kFloats>(in.old_values, first_old, t);
        if (mask) x[j].valid = mask[t] != 0;
      }
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        const int64_t t = start + j * kThreads;
        if (t >= range.last) break;
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
  }
  if (grid_totals<kValueSums, -1>(sums, sums_of_blocks, totals)) finish(in, totals);
}

}  // namespace

const char* value_loss_fwd_cuda(const ValueBatch& in, double* sums, void* stream) {
  bool floats = true;
  for (const Column* x : {&in.values, &in.returns, &in.old_values})
    floats = floats && (!x->data || x->dtype == kFp32);
  return floats ? launch_over<value_loss_fwd_kernel<true>>(in, true, sums, stream)
                : launch_over<value_loss_fwd_kernel<false>>(in, true, sums, stream);
}

}  // namespace tppo
