#include "kl.h"

#include "kernels.h"

namespace tppo {
namespace {

struct Block {
  int64_t count;  // tokens
  alignas(64) Bits valid[kBlock];
  alignas(64) float logprob[kBlock], ref[kBlock], grad[kBlock], value[kBlock], slope[kBlock];
};

template <int kEstimator>
TPPO_INLINE void estimate(float clamp, Block& x) {
  for (int64_t i = 0; i < kBlock; ++i) {
    const Kl at = kl_of<kEstimator>(x.logprob[i], x.ref[i], clamp);
    x.value[i] = at.value;
    x.slope[i] = keep(x.valid[i], at.slope);
  }
}

TPPO_CLONES void estimates(int estimator, float clamp, Block& x) {
  if (estimator == kK1) estimate<kK1>(clamp, x);
  if (estimator == kK2) estimate<kK2>(clamp, x);
  if (estimator == kK3) estimate<kK3>(clamp, x);
  if (estimator == kAbs) estimate<kAbs>(clamp, x);
  if (estimator == kK1Plus) estimate<kK1Plus>(clamp, x);
  if (estimator == kK3Plus) estimate<kK3Plus>(clamp, x);
}

TPPO_CLONES void multiply(Block& x) {
  for (int64_t i = 0; i < kBlock; ++i) x.slope[i] = times(x.slope[i], x.grad[i]);
}

// `write(block, first)` for every block of tokens with its estimates: value and slope are 0 where
// masked, because both log-probs are read as 0 there.
template <typename Write>
void for_blocks(const KlTokens& in, int threads, const Write& write) {
  const int64_t blocks = (in.N + kBlock - 1) / kBlock;
  parallel_for(blocks, kGrain / kBlock, threads, [&](int64_t first, int64_t last) {
    Block x;
    for (int64_t at = first * kBlock; at < std::min(in.N, last * kBlock); at += kBlock) {
      x.count = std::min(kBlock, in.N - at);
      load_mask(in.mask ? in.mask + at : nullptr, x.count, x.valid);
      load_column(in.logprobs, at, x.count, x.valid, x.logprob);
      load_column(in.ref_logprobs, at, x.count, x.valid, x.ref);
      estimates(in.estimator, in.clamp, x);
      write(x, at);
    }
  });
}

}  // namespace

void kl_fwd(const KlTokens& in, float* out, int threads) {
  for_blocks(in, threads,
             [=](Block& x, int64_t at) { std::copy(x.value, x.value + x.count, out + at); });
}

void kl_bwd(const KlTokens& in, const float* grad, float* out, int threads) {
  const Column grads{grad, kFp32, 0, 1};
  for_blocks(in, threads, [=](Block& x, int64_t at) {
    load_column(grads, at, x.count, x.valid, x.grad);
    multiply(x);
    std::copy(x.slope, x.slope + x.count, out + at);
  });
}

}  // namespace tppo
