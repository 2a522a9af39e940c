// What ppo_loss and value_loss share: how a batch lies in memory, how it is divided into sequences,
// and the denominators of a reduction. Letters: B sequences, T tokens of one, N tokens of all.
#pragma once
#include "token_logprobs.h"

namespace tppo {

// Token t of sequence b at element b * stride + t * step. step: 1, or 0 for one value a sequence.
// Packed tokens count from the sequence's first, and have stride 0.
struct Column {
  const void* data;  // or null: not given
  int dtype;         // enum Dtype
  int64_t stride;
  int step;
};

// A number, or one on the device in a type of `Dtype` or of these: the host need not read it, nor
// a launch convert it.
enum ScalarType { kFp64 = 3, kInt64, kInt32 };

struct Scalar {
  double value;
  const void* device;
  int dtype;
};

TPPO_HD inline double value_of(const Scalar& x) {
  if (!x.device) return x.value;
  switch (x.dtype) {
    case kFp64: return *static_cast<const double*>(x.device);
    case kInt64: return double(*static_cast<const int64_t*>(x.device));
    case kInt32: return double(*static_cast<const int32_t*>(x.device));
    case 1: return double(from_bf16(*static_cast<const uint16_t*>(x.device)));
    case 2: return double(from_fp16(*static_cast<const uint16_t*>(x.device)));
    default: return double(*static_cast<const float*>(x.device));
  }
}

// Padded rows of T, or packed where offsets [B + 1] are given. A batch in which sequences do not
// matter comes as rows of any one T, the last of them short: N ends it.
struct Layout {
  int64_t B, T, N;
  const int32_t* offsets;
  const uint8_t* mask;  // or null: all valid
  int64_t mask_stride;
};

struct Span {
  int64_t begin, count;  // of a sequence's tokens in a dense result [N]
};

TPPO_HD inline Span span(const Layout& in, int64_t b) {
  if (in.offsets) return {in.offsets[b], in.offsets[b + 1] - in.offsets[b]};
  const int64_t begin = b * in.T, rest = in.N - begin;
  return {begin, rest < in.T ? rest : in.T};
}

TPPO_HD inline int64_t first_of(const Column& x, const Layout& in, int64_t b, int64_t begin) {
  return b * x.stride + (in.offsets && x.step ? begin : 0);
}

TPPO_HD inline const uint8_t* mask_of(const Layout& in, int64_t b, int64_t begin) {
  return in.mask ? in.mask + (in.offsets ? begin : b * in.mask_stride) : nullptr;
}

TPPO_HD inline float element(const Column& x, int64_t i) {
  if (x.dtype == 0) return static_cast<const float*>(x.data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(x.data)[i];
  return x.dtype == 1 ? from_bf16(bits) : from_fp16(bits);
}

// Red(x) = scale * sum_b c_b sum_t x_bt with c_b = 1, or 1 / tokens of b where `by_length`.
// scale = 1 / (count * length), both at least 1, is known only after all tokens were seen: so
// gradients are written without it, and backward multiplies by it.
struct Share {
  enum Count { kOne, kTokens, kSequences, kGiven };
  int count_of;
  Scalar count, length;
  bool by_length;
};

TPPO_HD inline double scale_of(const Share& share, double tokens, double sequences) {
  double count = share.count_of == Share::kGiven    ? value_of(share.count)
                 : share.count_of == Share::kTokens ? tokens
                 : share.count_of == Share::kSequences ? sequences : 1.0;
  double length = value_of(share.length);
  count = count < 1.0 ? 1.0 : count;  // NaN stays NaN
  length = length < 1.0 ? 1.0 : length;
  return 1.0 / (count * length);
}

// A condition as all ones or no bit. A choice made on bits is never compiled to a branch, and a
// loop with a branch is not vectorised.
using Bits = uint32_t;

TPPO_INLINE Bits bits_if(bool condition) { return 0u - Bits(condition); }

TPPO_INLINE float pick(Bits condition, float yes, float no) {
#if defined(__CUDA_ARCH__)
  return condition ? yes : no;
#else
  return float_of((bits_of(yes) & condition) | (bits_of(no) & ~condition));
#endif
}

TPPO_INLINE float keep(Bits condition, float x) { return pick(condition, x, 0.f); }

// weight * x, and 0 where the weight is 0: by selection, so that 0 * inf is 0.
TPPO_INLINE float times(float weight, float x) { return keep(bits_if(weight != 0.f), weight * x); }

TPPO_INLINE float clamp_to(float x, float low, float high) {  // NaN stays NaN
  return pick(bits_if(x > high), high, pick(bits_if(x < low), low, x));
}

// The C++ kernels walk over blocks of a sequence: fp32, 0 where masked and from `count` on, so that
// loops over them have neither branches nor ends.
constexpr int64_t kBlock = 256;       // tokens: all columns of a block stay in the L1 cache
constexpr int64_t kGroups = 256;      // parts of a batch, summed in order whatever thread had them
constexpr int64_t kGrain = 64 << 10;  // tokens that are worth a thread: about 0.2 ms

void load_mask(const uint8_t* mask, int64_t count, Bits* valid);
void load_column(const Column& x, int64_t first, int64_t count, const Bits* valid, float* out);
double block_sum(const float* x);      // of kBlock
double block_squares(const float* x);  // the sum of their squares
int64_t count_valid(const uint8_t* mask, int64_t count);

inline int64_t group_grain(int64_t groups, int64_t N) {
  return std::max<int64_t>(1, kGrain * groups / std::max<int64_t>(N, 1));
}

}  // namespace tppo
