#include "whiten.h"

#include <cmath>

#include "kernels.h"
#include "token_logprobs.h"  // TPPO_INLINE

namespace tppo {
namespace {

constexpr int64_t kBlock = 2048;  // tokens whose passes stay in the first-level cache
constexpr int kLanes = 64;        // independent sums, so that a loop over lanes vectorises
// Whitening a token takes less than a nanosecond, a thread tens of microseconds to start, and far
// more where it waits for a core on which torch's own threads still spin: what one thread does in
// half a millisecond is left to it.
constexpr int64_t kGrain = 1 << 20;

// The valid values of a block, 0 elsewhere, and 1 or 0 for each; filled up to whole lanes.
struct Block {
  alignas(64) float values[kBlock], weights[kBlock];
};

template <bool kMasked>
TPPO_INLINE float load_block(const float* x, const uint8_t* mask, int64_t n, int64_t padded,
                             Block* block) {
  float* v = block->values;
  float* w = block->weights;
  for (int64_t i = 0; i < n; ++i) {
    v[i] = !kMasked || mask[i] ? x[i] : 0.f;
    w[i] = !kMasked || mask[i] ? 1.f : 0.f;
  }
  for (int64_t i = n; i < padded; ++i) v[i] = w[i] = 0.f;
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < padded; i += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const float size = std::fabs(v[i + l]);
      lanes[l] = size > lanes[l] ? size : lanes[l];
    }
  return *std::max_element(lanes, lanes + kLanes);
}

TPPO_INLINE double total(const float* lanes) {
  double sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

// Two passes in fp32, whose rounding of the mean the second one corrects: with m the rounded mean
// and d = x - m, the mean is m + sum d / n, and M2 = sum d^2 - (sum d)^2 / n. Values are brought to
// [-1, 1] by a power of two, so that no square overflows or vanishes.
template <bool kMasked>
TPPO_INLINE Moments moments_of(const float* x, const uint8_t* mask, int64_t n) {
  Block block;
  const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
  const float largest = load_block<kMasked>(x, mask, n, padded, &block);
  int exponent = 0;
  if (largest > 0 && largest <= 3.402823466e38f) std::frexp(largest, &exponent);
  const float unit = std::ldexp(1.f, -std::max(exponent, -126));
  float s[kLanes] = {}, c[kLanes] = {};
  for (int64_t i = 0; i < padded; i += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      s[l] += block.values[i + l] * unit;
      c[l] += block.weights[i + l];
    }
  const double count = total(c);
  if (count == 0) return {};
  const float m = float(total(s) / count);
  float t[kLanes] = {}, q[kLanes] = {};
  for (int64_t i = 0; i < padded; i += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const float d = (block.values[i + l] * unit - m) * block.weights[i + l];
      t[l] += d;
      q[l] += d * d;
    }
  const double drift = total(t), m2 = total(q) - drift * drift / count, scale = 1.0 / unit;
  return {count, (double(m) + drift / count) * scale, std::max(m2, 0.0) * scale * scale, largest};
}

TPPO_CLONES Moments block_moments(const float* x, const uint8_t* mask, int64_t n) {
  return mask ? moments_of<true>(x, mask, n) : moments_of<false>(x, nullptr, n);
}

TPPO_CLONES void apply(const float* x, const uint8_t* mask, int64_t n, const Whitening& by,
                       float* out) {
  const Whitening how = by;  // a copy, which `out` cannot overwrite
  for (int64_t i = 0; i < n; ++i) {
    const float y = whitened(x[i], how);
    out[i] = !mask || mask[i] ? y : 0.f;
  }
}

}  // namespace

// moments [4]: n, mean, M2, max|x|. Blocks are merged in order, whatever thread had them.
void whiten_stats(const float* x, const uint8_t* mask, int64_t n, double* moments, int threads) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  std::vector<Moments> parts(blocks);
  parallel_for(blocks, kGrain / kBlock, threads, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      parts[b] = block_moments(x + b * kBlock, mask ? mask + b * kBlock : nullptr,
                               std::min(kBlock, n - b * kBlock));
  });
  Moments all;
  for (const Moments& part : parts) all = merge(all, part);
  moments[0] = all.n, moments[1] = all.mean, moments[2] = all.m2, moments[3] = all.largest;
}

void whiten_fwd(const float* x, const uint8_t* mask, int64_t n, const double* moments, double eps,
                bool unbiased, bool shift_mean, float* out, int threads) {
  const Whitening by =
      whitening({moments[0], moments[1], moments[2], moments[3]}, eps, unbiased, shift_mean);
  expect_writes(reinterpret_cast<char*>(out), n * int64_t(sizeof(float)));
  parallel_for(n, kGrain, threads, [=](int64_t first, int64_t last) {
    apply(x + first, mask ? mask + first : nullptr, last - first, by, out + first);
  });
}

}  // namespace tppo
