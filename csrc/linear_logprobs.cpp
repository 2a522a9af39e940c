// The row steps of linear_logprobs that token_logprobs lacks: exponentials kept for backward, and
// the gradient from them. Products are the caller's.
#include <cmath>

#include "kernels.h"
#include "token_logprobs.h"

namespace tppo {
namespace {

constexpr int64_t kBlock = 2048;
constexpr float kFp16Scale = 32768.f;  // a kept fp16 exponential is normal down to e^-20

// dz/dx; there is no softcap where exponentials are kept.
float factor_at(const TokenRows& in, int64_t i) {
  const double t = in.row_temperature ? in.row_temperature[i] : in.temperature;
  return float(in.logit_scale / t);
}

// ln x to 1e-7 for normal x > 0; finite garbage at 0, where the caller's factor is 0. x = 2^n m,
// m in [sqrt(1/2), sqrt(2)); ln m = r - r^2/2 + r^3 q(r), r = m - 1 (Cephes' logf).
TPPO_INLINE float log_fast(float x) {
  const int32_t shifted = int32_t(bits_of(x)) - 0x3f3504f3;
  const int32_t n = shifted >> 23;
  const float r = float_of(bits_of(x) - (uint32_t(n) << 23)) - 1.f;
  float q = 7.0376836292e-2f;
  q = q * r - 1.1514610310e-1f;
  q = q * r + 1.1676998740e-1f;
  q = q * r - 1.2420140846e-1f;
  q = q * r + 1.4249322787e-1f;
  q = q * r - 1.6668057665e-1f;
  q = q * r + 2.0000714765e-1f;
  q = q * r - 2.4999993993e-1f;
  q = q * r + 3.3333331174e-1f;
  const float square = r * r, k = float(n);
  return (r + (r * square * q + (k * -2.12194440e-4f - 0.5f * square))) + k * 0.693359375f;
}

// e = exp(z - top). z is rounded before the subtraction, as `top` was: hence two loops.
TPPO_CLONES void exponentials_of(const float* x, int64_t V, float factor, float top, bool half,
                                 void* out) {
  alignas(64) float z[kBlock];
  const float low = exp_floor();
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int64_t count = std::min(kBlock, V - begin);
    for (int64_t j = 0; j < count; ++j) z[j] = x[begin + j] * factor;
    for (int64_t j = 0; j < count; ++j) z[j] = exp_in_range(at_least(z[j] - top, low));
    if (half) {
      uint16_t* e = static_cast<uint16_t*>(out) + begin;
      for (int64_t j = 0; j < count; ++j) e[j] = to_fp16(z[j] * kFp16Scale);
    } else {
      float* e = static_cast<float*>(out) + begin;
      for (int64_t j = 0; j < count; ++j) e[j] = z[j];
    }
  }
}

struct KeptRow {
  float g_logprob, g_entropy, logprob, entropy, log_sum;
  int64_t target;  // -1: of another shard
};

// dx = factor (g_lp (1[target] - p) - g_ent p (log p + entropy)); p from e.
TPPO_CLONES void gradient_of(const void* kept, bool half, int64_t V, float factor,
                             const KeptRow& g, float* dx) {
  alignas(64) float e[kBlock], d[kBlock];
  const float norm = (half ? 1.f / kFp16Scale : 1.f);
  const float share = std::exp(-g.log_sum);
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int64_t count = std::min(kBlock, V - begin);
    if (half)
      for (int64_t j = 0; j < count; ++j)
        e[j] = from_fp16(static_cast<const uint16_t*>(kept)[begin + j]) * norm;
    else
      for (int64_t j = 0; j < count; ++j) e[j] = static_cast<const float*>(kept)[begin + j];
    float* out = dx + begin;
    if (g.g_entropy != 0.f) {
      for (int64_t j = 0; j < count; ++j) d[j] = log_fast(e[j]);
      const float offset = g.g_logprob + g.g_entropy * (g.entropy - g.log_sum);
      for (int64_t j = 0; j < count; ++j)
        out[j] = -(e[j] * share) * (offset + g.g_entropy * d[j]);
    } else {
      for (int64_t j = 0; j < count; ++j) out[j] = -(e[j] * share) * g.g_logprob;
    }
    for (int64_t j = 0; j < count; ++j) out[j] *= factor;
  }
  if (g.target < 0) return;
  const float p = std::exp(g.logprob);  // exact here: 1 - p is a difference
  const float of_entropy = p > 0 ? g.g_entropy * p * (g.logprob + g.entropy) : 0.f;
  dx[g.target] = (-std::expm1(g.logprob) * g.g_logprob - of_entropy) * factor;
}

template <typename Body>
void each_row(const TokenRows& in, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, 131072 / std::max<int64_t>(in.columns, 1));
  parallel_for(in.N, grain, in.threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i);
  });
}

}  // namespace

void linear_exponentials(const TokenRows& in, const float* top, bool half, void* out) {
  each_row(in, [&](int64_t i) {
    const float* x = static_cast<const float*>(in.logits) + i * in.inner_stride;
    char* e = static_cast<char*>(out) + i * in.columns * (half ? 2 : 4);
    exponentials_of(x, in.columns, factor_at(in, i), top[i], half, e);
  });
}

void linear_gradient(const TokenRows& in, const float* g_logprobs, const float* g_entropy,
                     const float* logprobs, const float* entropy, const float* log_sum,
                     float* dx) {
  const bool half = in.dtype == kFp16;
  each_row(in, [&](int64_t i) {
    const char* e = static_cast<const char*>(in.logits) + i * in.inner_stride * (half ? 2 : 4);
    const KeptRow row{g_logprobs ? g_logprobs[i] : 0.f, g_entropy ? g_entropy[i] : 0.f,
                      logprobs[i], entropy[i], log_sum[i], in.targets[i]};
    gradient_of(e, half, in.columns, factor_at(in, i), row, dx + i * in.columns);
  });
}

}  // namespace tppo
