#include "token_logprobs.h"

#include <cmath>
#include <limits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace tppo {
namespace {

constexpr int64_t kBlock = 2048;  // columns in flight: 8 KiB of fp32, a quarter of the L1 cache
constexpr int kLanes = 64;        // independent sums, so that a loop over lanes vectorises
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// z = u * factor, u = sign(logit_scale) x, or tanh(logit_scale x / softcap). factor > 0, so that
// the largest u has the largest z, and e^(z - top) takes (u - max u) * factor: exact where it
// matters, at any magnitude.
struct Scaling {
  double pre, factor;  // u = x pre, or tanh(x pre)
  double slope;        // dz/dx, where capped without its part 1 - u^2
  bool capped;

  Scaling(double temperature, double softcap, double scale) : capped(softcap > 0) {
    pre = capped ? scale / softcap : (scale > 0) - (scale < 0);
    factor = capped ? softcap / temperature : scale ? std::fabs(scale) / temperature : 1.0;
    factor = std::max(factor, 1e-37);  // in fp32 above 0: padding of -inf stays -inf
    slope = scale / temperature;
  }
};

struct Bf16 {
  uint16_t bits;
  TPPO_INLINE operator float() const { return from_bf16(bits); }
  TPPO_INLINE static Bf16 of(float x) { return {to_bf16(x)}; }
};

struct Fp16 {
  uint16_t bits;
  TPPO_INLINE operator float() const { return from_fp16(bits); }
  TPPO_INLINE static Fp16 of(float x) { return {to_fp16(x)}; }
};

struct Fp32 {
  float value;
  TPPO_INLINE operator float() const { return value; }
  TPPO_INLINE static Fp32 of(float x) { return {x}; }
};

// u of `count` columns into fp32 u[], filled up with -inf to whole lanes; returns that length.
// Under a softcap also the slope of tanh, where `slope` is given.
template <typename T>
TPPO_INLINE int64_t load_block(const T* x, int64_t count, const Scaling& scaling, float* u,
                               float* slope = nullptr) {
  const float pre = float(scaling.pre), exp_low = exp_floor();
  for (int64_t j = 0; j < count; ++j) u[j] = float(x[j]) * pre;
  if (scaling.capped)
    for (int64_t j = 0; j < count; ++j) {
      const Tanh of = tanh_fast(u[j], exp_low);
      u[j] = of.value;
      if (slope) slope[j] = of.slope;
    }
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t j = count; j < padded; ++j) u[j] = -kInfinity;
  return padded;
}

TPPO_INLINE float block_max(const float* u, int64_t count) {
  float lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = -kInfinity;
  for (int64_t j = 0; j < count; j += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] = u[j + l] > lanes[l] ? u[j + l] : lanes[l];
  float top = -kInfinity;
  for (int l = 0; l < kLanes; ++l) top = std::max(top, lanes[l]);
  return top;
}

// sum += e^d and weighted += d e^d over a block, d = (u - top) factor; a column of -inf adds 0 to
// both, NaN makes both NaN. What has d = 0 is counted in `tops` instead: beside its 1, an fp32 sum
// would lose what the others add, which is all of 1 - p where the top column is probable.
TPPO_INLINE void block_sums(const float* u, int64_t count, float factor, float top, double* tops,
                            double* sum, double* weighted) {
  const float exp_low = exp_floor();
  float n[kLanes] = {}, s[kLanes] = {}, w[kLanes] = {};
  for (int64_t j = 0; j < count; j += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const float d = at_least((u[j + l] - top) * factor, exp_low);
      const float e = exp_in_range(d);
      const float is_top = d == 0.f ? 1.f : 0.f;
      n[l] += is_top;
      s[l] += e - is_top;
      w[l] += e * d;
    }
  for (int l = 0; l < kLanes; ++l) {
    *tops += n[l];
    *sum += s[l];
    *weighted += w[l];
  }
}

struct RowSums {
  float target, top;     // u of the target, max u
  double tops;           // columns with d = 0, d = (u - top) factor
  double sum, weighted;  // of e^d of the other columns, and of d e^d
};

// One read of the row: per block its maximum, a rescaling of the sums where it is a new one, and
// its part of the sums while the block is in the L1 cache.
template <typename T>
TPPO_INLINE RowSums row_sums(const T* x, int64_t V, int64_t target, const Scaling& scaling) {
  alignas(64) float u[kBlock];
  const float factor = float(scaling.factor);
  RowSums row{0.f, -kInfinity, 0.0, 0.0, 0.0};
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int64_t count = load_block(x + begin, std::min(kBlock, V - begin), scaling, u);
    if (target >= begin && target < begin + count) row.target = u[target - begin];
    const float top = block_max(u, count);
    if (top > row.top) {
      if (row.top > -kInfinity) {
        const double shift = (double(row.top) - top) * scaling.factor, shrink = std::exp(shift);
        const double all = row.sum + row.tops;
        row.weighted = shrink > 0 ? shrink * (row.weighted + all * shift) : row.weighted * 0;
        row.sum = shrink * all;
        row.tops = 0;
      }
      row.top = top;
    }
    // While all is -inf the shift is 0: the columns add 0, and NaN among them still shows.
    block_sums(u, count, factor, row.top > -kInfinity ? row.top : 0.f, &row.tops, &row.sum,
               &row.weighted);
  }
  return row;
}

TPPO_CLONES RowSums row_sums_of(const TokenRows& in, const char* row, int64_t target,
                                const Scaling& scaling) {
  const int64_t V = in.columns;
  if (in.dtype == kBf16) return row_sums(reinterpret_cast<const Bf16*>(row), V, target, scaling);
  if (in.dtype == kFp16) return row_sums(reinterpret_cast<const Fp16*>(row), V, target, scaling);
  return row_sums(reinterpret_cast<const Fp32*>(row), V, target, scaling);
}

struct RowGrad {
  float grad_logprob, grad_entropy, entropy, top, log_sum;
  int64_t target;
};

// dx = slope (1 - tanh^2 if capped) (g_lp (1[target] - p) - g_ent p (log p + entropy)).
template <typename T>
TPPO_INLINE void row_grad(const T* x, int64_t V, const Scaling& scaling, const RowGrad& g,
                          T* dx) {
  alignas(64) float u[kBlock], of_tanh[kBlock], out[kBlock];
  const float factor = float(scaling.factor), slope = float(scaling.slope);
  const float exp_low = exp_floor();
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int64_t live = std::min(kBlock, V - begin);
    load_block(x + begin, live, scaling, u, of_tanh);
    // z is rounded here, as `top` was: fused into the subtraction, it would keep a difference.
    for (int64_t j = 0; j < live; ++j) out[j] = u[j] * factor;
    const int64_t target = g.target - begin;
    const bool here = target >= 0 && target < live;
    const float at_target = here ? (out[target] - g.top) - g.log_sum : 0.f;
    for (int64_t j = 0; j < live; ++j) {
      const float log_p = at_least((out[j] - g.top) - g.log_sum, exp_low);
      out[j] = -exp_in_range(log_p) *
               (g.grad_logprob + g.grad_entropy * (log_p + g.entropy));
    }
    if (here) {  // from expm1, because 1 - p is a difference
      const float log_p = at_least(at_target, exp_low);
      out[target] = -std::expm1(log_p) * g.grad_logprob -
                    exp_in_range(log_p) * (g.grad_entropy * (log_p + g.entropy));
    }
    if (scaling.capped)
      for (int64_t j = 0; j < live; ++j) out[j] *= of_tanh[j];
    for (int64_t j = 0; j < live; ++j) dx[begin + j] = T::of(out[j] * slope);
  }
}

TPPO_CLONES void row_grad_of(const TokenRows& in, const char* x, const Scaling& scaling,
                             const RowGrad& g, char* dx) {
  if (in.dtype == kBf16)
    row_grad(reinterpret_cast<const Bf16*>(x), in.columns, scaling, g, reinterpret_cast<Bf16*>(dx));
  else if (in.dtype == kFp16)
    row_grad(reinterpret_cast<const Fp16*>(x), in.columns, scaling, g, reinterpret_cast<Fp16*>(dx));
  else
    row_grad(reinterpret_cast<const Fp32*>(x), in.columns, scaling, g, reinterpret_cast<Fp32*>(dx));
}

int64_t element_size(const TokenRows& in) { return in.dtype == kFp32 ? 4 : 2; }

const char* row_at(const TokenRows& in, int64_t i) {
  const int64_t offset = i / in.inner * in.outer_stride + i % in.inner * in.inner_stride;
  return static_cast<const char*>(in.logits) + offset * element_size(in);
}

Scaling scaling_at(const TokenRows& in, int64_t i) {
  return {in.row_temperature ? in.row_temperature[i] : in.temperature, in.softcap, in.logit_scale};
}

// -1 where none is asked for: it is no column.
int64_t target_of(const TokenRows& in, int64_t i) { return in.targets ? in.targets[i] : -1; }

bool good_target(const TokenRows& in, int64_t i) {
  return !in.targets || (in.targets[i] >= 0 && in.targets[i] < in.columns);
}

// Rows whose mask is `wanted`: threads share the rows that cost something evenly.
std::vector<int64_t> rows_where(const TokenRows& in, bool wanted) {
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < in.N; ++i)
    if ((!in.mask || in.mask[i]) == wanted) rows.push_back(i);
  return rows;
}

template <typename Body>
void for_rows(const std::vector<int64_t>& rows, const TokenRows& in, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, 131072 / std::max<int64_t>(in.columns, 1));
  parallel_for(int64_t(rows.size()), grain, in.threads, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) body(rows[k]);
  });
}

}  // namespace

void token_logprobs_fwd(const TokenRows& in, float* logprobs, float* entropy, float* top,
                        float* log_sum) {
  const auto put = [=](int64_t i, float logprob, float h, float largest, float log_of_sum) {
    if (logprobs) logprobs[i] = logprob;
    entropy[i] = h;
    top[i] = largest;
    log_sum[i] = log_of_sum;
  };
  for (int64_t i : rows_where(in, false)) put(i, 0.f, 0.f, 0.f, 0.f);
  for_rows(rows_where(in, true), in, [&](int64_t i) {
    if (!good_target(in, i)) {
      const float nan = std::nanf("");
      put(i, nan, nan, nan, nan);
      return;
    }
    const Scaling scaling = scaling_at(in, i);
    const RowSums row = row_sums_of(in, row_at(in, i), target_of(in, i), scaling);
    const double log_of_sum = std::log1p(row.sum + (row.tops - 1));
    const double d = (double(row.target) - row.top) * scaling.factor;
    put(i, float(d - log_of_sum), float(log_of_sum - row.weighted / (row.sum + row.tops)),
        row.top * float(scaling.factor), float(log_of_sum));
  });
}

// Fresh memory is mapped page by page as it is written, which can cost more than the arithmetic:
// asks for huge pages. A hint: no result depends on it.
void expect_writes([[maybe_unused]] char* begin, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kHuge = 1 << 21;
  const int64_t skip = (kHuge - int64_t(reinterpret_cast<uintptr_t>(begin) % kHuge)) % kHuge;
  if (bytes >= skip + kHuge) madvise(begin + skip, bytes - skip, MADV_HUGEPAGE);
#endif
}

void token_logprobs_bwd(const TokenRows& in, const float* grad_logprobs, const float* grad_entropy,
                        const float* entropy, const float* top, const float* log_sum,
                        int64_t vocabulary, void* grad) {
  const int64_t size = element_size(in), bytes = vocabulary * size;
  char* out = static_cast<char*>(grad);
  expect_writes(out, in.N * bytes);
  for_rows(rows_where(in, false), in, [&](int64_t i) { std::memset(out + i * bytes, 0, bytes); });
  for_rows(rows_where(in, true), in, [&](int64_t i) {
    RowGrad g{grad_logprobs ? grad_logprobs[i] : 0.f, grad_entropy ? grad_entropy[i] : 0.f,
              entropy[i], good_target(in, i) ? top[i] : std::nanf(""), log_sum[i],
              target_of(in, i)};
    row_grad_of(in, row_at(in, i), scaling_at(in, i), g, out + i * bytes);
    std::memset(out + i * bytes + in.columns * size, 0, bytes - in.columns * size);
  });
}

}  // namespace tppo
