#include "whiten.h"

#include "kernels.h"

namespace tppo {
namespace {

constexpr int64_t kBlock = 4096;  // tokens whose two passes stay in the first-level cache
constexpr int kLanes = 16;        // independent sums: fp addition is not reordered by the compiler

// Moves the valid values of a block together; returns how many there are.
int64_t compact(const float* x, const uint8_t* mask, int64_t n, float* values) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    values[count] = x[i];
    count += mask[i] != 0;
  }
  return count;
}

TPPO_CLONES double sum(const float* x, int64_t n, float* largest) {
  double lanes[kLanes] = {};
  float sizes[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const int width = int(std::min<int64_t>(kLanes, n - i));
    for (int j = 0; j < width; ++j) {
      const float size = std::fabs(x[i + j]);
      lanes[j] += x[i + j];
      sizes[j] = size > sizes[j] ? size : sizes[j];
    }
  }
  double total = 0;
  for (int j = 0; j < kLanes; ++j) {
    total += lanes[j];
    *largest = std::max(*largest, sizes[j]);
  }
  return total;
}

TPPO_CLONES double sum_of_squares(const float* x, int64_t n, double mean) {
  double lanes[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const int width = int(std::min<int64_t>(kLanes, n - i));
    for (int j = 0; j < width; ++j) lanes[j] += (x[i + j] - mean) * (x[i + j] - mean);
  }
  double total = 0;
  for (double lane : lanes) total += lane;
  return total;
}

Moments block_moments(const float* x, const uint8_t* mask, int64_t n) {
  float values[kBlock];
  if (mask) {
    n = compact(x, mask, n, values);
    x = values;
  }
  if (n == 0) return {};
  float largest = 0;
  const double mean = sum(x, n, &largest) / double(n);
  return {double(n), mean, sum_of_squares(x, n, mean), largest};
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
  parallel_for(blocks, 64, threads, [&](int64_t first, int64_t last) {
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
  parallel_for(n, 64 * kBlock, threads, [=](int64_t first, int64_t last) {
    apply(x + first, mask ? mask + first : nullptr, last - first, by, out + first);
  });
}

}  // namespace tppo
