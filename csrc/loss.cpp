#include "loss.h"

#include "kernels.h"

namespace tppo {
namespace {

constexpr int kLanes = 16;  // independent sums: fp addition is not reordered by the compiler

struct Fp32 {
  float value;
  TPPO_INLINE operator float() const { return value; }
};

struct Bf16 {
  uint16_t bits;
  TPPO_INLINE operator float() const { return from_bf16(bits); }
};

struct Fp16 {
  uint16_t bits;
  TPPO_INLINE operator float() const { return from_fp16(bits); }
};

template <typename T>
TPPO_INLINE void select(const void* data, int64_t first, int64_t count, const Bits* valid,
                        float* out) {
  const T* x = static_cast<const T*>(data) + first;
  for (int64_t i = 0; i < count; ++i) {
    const float value = x[i];
    out[i] = keep(valid[i], value);
  }
}

}  // namespace

// valid [kBlock]: 0 from `count` on. A null mask is all valid.
TPPO_CLONES void load_mask(const uint8_t* mask, int64_t count, Bits* valid) {
  if (mask)
    for (int64_t i = 0; i < count; ++i) valid[i] = bits_if(mask[i] != 0);
  else
    for (int64_t i = 0; i < count; ++i) valid[i] = ~0u;
  for (int64_t i = count; i < kBlock; ++i) valid[i] = 0;
}

// out [kBlock]: elements `first` and on of a column, 0 where not valid. An absent column is 0.
TPPO_CLONES void load_column(const Column& x, int64_t first, int64_t count, const Bits* valid,
                             float* out) {
  if (!x.data || x.step == 0) {
    const float value = x.data && count ? element(x, first) : 0.f;
    for (int64_t i = 0; i < kBlock; ++i) out[i] = keep(valid[i], value);
    return;
  }
  if (x.dtype == kFp32) select<Fp32>(x.data, first, count, valid, out);
  if (x.dtype == kBf16) select<Bf16>(x.data, first, count, valid, out);
  if (x.dtype == kFp16) select<Fp16>(x.data, first, count, valid, out);
  for (int64_t i = count; i < kBlock; ++i) out[i] = 0.f;
}

TPPO_CLONES double block_sum(const float* x) {
  double lanes[kLanes] = {};
  for (int64_t i = 0; i < kBlock; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] += x[i + j];
  double total = 0;
  for (double lane : lanes) total += lane;
  return total;
}

TPPO_CLONES double block_squares(const float* x) {
  double lanes[kLanes] = {};
  for (int64_t i = 0; i < kBlock; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] += double(x[i + j]) * x[i + j];
  double total = 0;
  for (double lane : lanes) total += lane;
  return total;
}

TPPO_CLONES int64_t count_valid(const uint8_t* mask, int64_t count) {
  int64_t valid = 0;
  for (int64_t i = 0; i < count; ++i) valid += mask[i] != 0;
  return valid;
}

TPPO_CLONES static void multiply(const Slopes& x, float factor, int64_t first, int64_t last) {
  if (x.dtype == kFp32)
    for (int64_t i = first; i < last; ++i)
      static_cast<float*>(x.out)[i] = times(x.slopes[i], factor);
  if (x.dtype == kBf16)
    for (int64_t i = first; i < last; ++i)
      static_cast<uint16_t*>(x.out)[i] = to_bf16(times(x.slopes[i], factor));
  if (x.dtype == kFp16)
    for (int64_t i = first; i < last; ++i)
      static_cast<uint16_t*>(x.out)[i] = to_fp16(times(x.slopes[i], factor));
}

void loss_bwd(const Slopes& x, float factor, int threads) {
  parallel_for(x.count, kGrain, threads,
               [=](int64_t first, int64_t last) { multiply(x, factor, first, last); });
}

}  // namespace tppo
