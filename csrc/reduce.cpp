#include "reduce.h"

#include "kernels.h"

namespace tppo {
namespace {

struct Sums {
  double total = 0, tokens = 0, live = 0;  // live: sequences with a valid token
};

int64_t tokens_of(const uint8_t* mask, const Span& whole) {
  return mask ? count_valid(mask, whole.count) : whole.count;
}

double share_of(bool by_length, int64_t tokens) {
  return by_length ? 1.0 / double(std::max<int64_t>(tokens, 1)) : 1.0;
}

void add(const ReduceBatch& in, int64_t b, Sums& sums) {
  alignas(64) Bits valid[kBlock];
  alignas(64) float x[kBlock];
  const Span whole = span(in.layout, b);
  const uint8_t* mask = mask_of(in.layout, b, whole.begin);
  const int64_t tokens = tokens_of(mask, whole), at = first_of(in.x, in.layout, b, whole.begin);
  double total = 0;
  for (int64_t start = 0; start < whole.count; start += kBlock) {
    const int64_t count = std::min(kBlock, whole.count - start);
    load_mask(mask ? mask + start : nullptr, count, valid);
    load_column(in.x, at + start, count, valid, x);
    total += block_sum(x);
  }
  sums.total += share_of(in.share.by_length, tokens) * total;
  sums.tokens += double(tokens);
  sums.live += tokens > 0;
}

template <typename T, typename Convert>
TPPO_INLINE void write(const ReduceShares& in, const Span& whole, const uint8_t* mask, float share,
                       const Convert& convert) {
  T* out = static_cast<T*>(in.out) + whole.begin;
  const T value = convert(share), zero = convert(0.f);
  if (!mask) std::fill(out, out + whole.count, value);
  if (mask)
    for (int64_t i = 0; i < whole.count; ++i) out[i] = mask[i] ? value : zero;
}

TPPO_CLONES void write_shares(const ReduceShares& in, const Span& whole, const uint8_t* mask,
                              float share) {
  if (in.dtype == kFp32) write<float>(in, whole, mask, share, [](float x) { return x; });
  if (in.dtype == kBf16) write<uint16_t>(in, whole, mask, share, to_bf16);
  if (in.dtype == kFp16) write<uint16_t>(in, whole, mask, share, to_fp16);
}

}  // namespace

void reduce_fwd(const ReduceBatch& in, int threads) {
  const int64_t B = in.layout.B, groups = std::min(B, kGroups);
  std::vector<Sums> parts(groups);
  parallel_for(groups, group_grain(groups, in.layout.N), threads, [&](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; ++g)
      for (int64_t b = B * g / groups; b < B * (g + 1) / groups; ++b) add(in, b, parts[g]);
  });
  Sums all;
  for (const Sums& part : parts) {
    all.total += part.total;
    all.tokens += part.tokens;
    all.live += part.live;
  }
  const double scale = scale_of(in.share, all.tokens, all.live);
  *in.total = float(scale * all.total);
  *in.scale = float(scale);
}

void reduce_bwd(const ReduceShares& in, float factor, int threads) {
  const int64_t B = in.layout.B;
  parallel_for(B, group_grain(B, in.layout.N), threads, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const Span whole = span(in.layout, b);
      const uint8_t* mask = mask_of(in.layout, b, whole.begin);
      const double share = in.by_length ? share_of(true, tokens_of(mask, whole)) : 1.0;
      write_shares(in, whole, mask, float(share * factor));
    }
  });
}

}  // namespace tppo
