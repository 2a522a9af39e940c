// fp32 arithmetic of token_logprobs in forms that vectorise: no branch, no call, no table.
#pragma once
#include <cstdint>
#include <cstring>

#include "common.h"

#if defined(__GNUC__) && !defined(__CUDACC__)
#define TPPO_INLINE inline __attribute__((always_inline))
#else
#define TPPO_INLINE TPPO_HD inline
#endif

namespace tppo {

TPPO_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

TPPO_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// exp_in_range takes arguments from here on, and is exactly 0 here: n = -127, a scale with no bit
// set. Read at run time: were it a constant, the compiler would branch on the clamp, and a loop
// that branches is not vectorised.
inline float exp_floor() {
  static const volatile float floor = -88.f;
  return floor;
}

TPPO_INLINE float at_least(float x, float low) { return x < low ? low : x; }  // NaN stays NaN

// e^d to 1e-7 for exp_floor() <= d <= 88, 0 below -87.7; NaN stays NaN.
// d = n ln2 + r, |r| <= ln2 / 2; e^r = 1 + r + r^2 q(r) with a minimax q; 2^n from the low bits of
// n + 1.5 * 2^23.
TPPO_INLINE float exp_in_range(float d) {
  constexpr float kRound = 12582912.f, kLog2e = 1.44269504f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const float shifted = d * kLog2e + kRound;
  const float n = shifted - kRound;
  const float r = (d - n * kLn2High) - n * kLn2Low;
  float q = 1.38143206e-3f;
  q = q * r + 8.36885162e-3f;
  q = q * r + 4.16684002e-2f;
  q = q * r + 1.66665196e-1f;
  q = q * r + 4.99999940e-1f;
  const float scale = float_of((bits_of(shifted) << 23) + 0x3f800000u);
  return (q * r * r + r + 1.f) * scale;
}

struct Tanh {
  float value, slope;
};

// tanh to 1e-7, relative also at 0: an odd minimax polynomial below 0.6, 1 - 2e/(1 + e) above.
// The choice is made on the bits, because a comparison could become a branch. Its slope to 3e-7 as
// 4e/(1 + e)^2: where tanh is nearly 1, nothing is left of 1 - tanh^2.
TPPO_INLINE Tanh tanh_fast(float x, float exp_low) {
  const uint32_t sign = bits_of(x) & 0x80000000u, magnitude = bits_of(x) ^ sign;
  const float square = x * x;
  float q = -5.89511963e-3f;
  q = q * square + 2.07959414e-2f;
  q = q * square - 5.37838228e-2f;
  q = q * square + 1.33319244e-1f;
  q = q * square - 3.33332986e-1f;
  const float small = x + x * square * q;
  const float e = exp_in_range(at_least(-2.f * float_of(magnitude), exp_low));
  const float share = 1.f / (1.f + e), large = 1.f - 2.f * (e * share);
  const uint32_t is_small = 0u - ((magnitude - 0x3f19999au) >> 31);  // all ones below 0.6
  return {float_of((bits_of(small) & is_small) | ((bits_of(large) | sign) & ~is_small)),
          4.f * (e * share) * share};
}

TPPO_INLINE float from_bf16(uint16_t x) { return float_of(uint32_t(x) << 16); }

TPPO_INLINE uint16_t to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t(x != x ? 0x7fc0u : rounded);
}

// The exponent is rebiased by a product, which makes fp16 denormals normal fp32 numbers.
TPPO_INLINE float from_fp16(uint16_t x) {
#if defined(__CUDA_ARCH__)  // one instruction, where the bits by hand take seven
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
#else
  const float magnitude = float_of(uint32_t(x & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 65536.f ? 0x7f800000u : 0u;
  return float_of(bits_of(magnitude) | special | (uint32_t(x & 0x8000u) << 16));
#endif
}

// To nearest, ties to even; from 65520 on infinite. Adding 0.5 rounds a result below 2^-14.
TPPO_INLINE uint16_t to_fp16(float x) {
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
  const uint32_t u = bits_of(x) & 0x7fffffffu;
  const uint32_t normal = (u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13;
  const uint32_t denormal = bits_of(float_of(u) + 0.5f) - 0x3f000000u;
  const uint32_t is_denormal = 0u - ((u - 0x38800000u) >> 31);  // all ones below 2^-14
  const uint32_t finite = (denormal & is_denormal) | (normal & ~is_denormal);
  const uint32_t infinite = 0x7c00u | ((0x7f800000u - u) >> 31 << 9);  // or NaN
  const uint32_t is_finite = 0u - ((u - 0x477ff000u) >> 31);
  return uint16_t(sign | (finite & is_finite) | (infinite & ~is_finite));
}

}  // namespace tppo
