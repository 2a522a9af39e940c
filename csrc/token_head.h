// Arithmetic of token_head that the CUDA kernels and the tests on the CPU share: 16 bytes of
// numbers as fp32 and back.
#pragma once
#include "kernels.h"
#include "token_logprobs.h"

namespace tppo {

struct alignas(16) HeadGroup {
  uint32_t word[4];  // fp32: a number each; bf16, fp16: two, the lower half first
};

template <int kDtype>
constexpr int kHeadColumns = kDtype == kFp32 ? 4 : 8;  // of a group

TPPO_HD inline float head_value(uint32_t bits, int dtype) {
  if (dtype == kFp32) return float_of(bits);
  return dtype == kBf16 ? from_bf16(uint16_t(bits)) : from_fp16(uint16_t(bits));
}

TPPO_HD inline uint32_t head_bits(float x, int dtype) {
  if (dtype == kFp32) return bits_of(x);
  return dtype == kBf16 ? to_bf16(x) : to_fp16(x);
}

template <int kDtype>
TPPO_HD inline float head_value_of(const HeadGroup& group, int j) {
  if (kDtype == kFp32) return float_of(group.word[j]);
  const uint32_t pair = group.word[j / 2];
  return head_value(j % 2 ? pair >> 16 : pair & 0xffffu, kDtype);
}

// Two 16-bit numbers in a word, rounded to nearest even.
template <int kDtype>
TPPO_HD inline uint32_t head_pair(float low, float high) {
#if defined(__CUDA_ARCH__)  // one instruction, where the bits by hand take a dozen
  uint32_t pair;
  if (kDtype == kBf16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return head_bits(low, kDtype) | head_bits(high, kDtype) << 16;
#endif
}

template <int kDtype>
TPPO_HD inline HeadGroup head_group(const float* values) {
  HeadGroup group;
  for (int i = 0; i < 4; ++i)
    group.word[i] = kDtype == kFp32 ? bits_of(values[i])
                                    : head_pair<kDtype>(values[2 * i], values[2 * i + 1]);
  return group;
}

}  // namespace tppo
