#include "value_loss.h"

#include "kernels.h"

namespace tppo {
namespace {

struct Block {
  int64_t begin, count;  // where its tokens lie in a result, and how many there are
  alignas(64) Bits valid[kBlock];
  alignas(64) float value[kBlock], target[kBlock], old[kBlock], loss[kBlock], slope[kBlock],
      clipped[kBlock], error[kBlock];
};

void load(const ValueBatch& in, int64_t b, const Span& whole, int64_t start, Block& x) {
  const uint8_t* mask = mask_of(in.layout, b, whole.begin);
  x.begin = whole.begin + start;
  x.count = std::min(kBlock, whole.count - start);
  load_mask(mask ? mask + start : nullptr, x.count, x.valid);
  const auto column = [&](const Column& from, float* out) {
    load_column(from, first_of(from, in.layout, b, whole.begin) + start, x.count, x.valid, out);
  };
  column(in.values, x.value);
  column(in.returns, x.target);
  column(in.old_values, x.old);
}

TPPO_CLONES void errors(float clip, Block& x) {
  for (int64_t i = 0; i < kBlock; ++i) {
    const Squared at = squared_error(x.value[i], x.target[i], x.old[i], clip);
    x.loss[i] = at.loss;
    x.slope[i] = at.slope;
    x.clipped[i] = keep(at.clipped, 1.f);
    x.error[i] = x.target[i] - x.value[i];
  }
}

TPPO_CLONES void write_gradient(float c, const Block& x, float* dvalues) {
  for (int64_t i = 0; i < x.count; ++i) dvalues[x.begin + i] = keep(x.valid[i], c * x.slope[i]);
}

// The sums of one sequence are added to sums [kValueSums]; its gradient is written.
void sequence(const ValueBatch& in, float clip, int64_t b, Block& x, double* sums) {
  const Span whole = span(in.layout, b);
  const uint8_t* mask = mask_of(in.layout, b, whole.begin);
  const int64_t tokens = mask ? count_valid(mask, whole.count) : whole.count;
  const double c = in.share.by_length ? 1.0 / double(std::max<int64_t>(tokens, 1)) : 1.0;
  for (int64_t start = 0; start < whole.count; start += kBlock) {
    load(in, b, whole, start, x);
    errors(clip, x);
    sums[kSumLoss] += c * block_sum(x.loss);
    sums[kSumClipped] += block_sum(x.clipped);
    sums[kSumReturn] += block_sum(x.target);
    sums[kSumReturn2] += block_squares(x.target);
    sums[kSumError] += block_sum(x.error);
    sums[kSumError2] += block_squares(x.error);
    if (in.dvalues) write_gradient(float(c), x, in.dvalues);
  }
  sums[kSumTokens] += double(tokens);
  sums[kSumLive] += tokens > 0;
}

}  // namespace

void value_loss_fwd(const ValueBatch& in, int threads) {
  const float clip = float(value_of(in.clip));
  const int64_t B = in.layout.B, groups = std::min(B, kGroups);
  std::vector<double> parts(groups * kValueSums);
  parallel_for(groups, group_grain(groups, in.layout.N), threads, [&](int64_t first, int64_t last) {
    Block x;
    for (int64_t g = first; g < last; ++g)
      for (int64_t b = B * g / groups; b < B * (g + 1) / groups; ++b)
        sequence(in, clip, b, x, &parts[g * kValueSums]);
  });
  double sums[kValueSums] = {};
  for (int64_t i = 0; i < groups * kValueSums; ++i) sums[i % kValueSums] += parts[i];
  finish(in, sums);
}

}  // namespace tppo
