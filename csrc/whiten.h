// Statistics of valid tokens and what whitening makes of them, shared by C++ and CUDA.
#pragma once
#include <cmath>

#include "common.h"

namespace tppo {

constexpr double kTiny = 1e-6;  // spread below this share of max|x| is rounding, not signal

struct Moments {
  double n = 0, mean = 0, m2 = 0, largest = 0;  // largest: max|x|
};

TPPO_HD inline double at_least_one(double n) { return n < 1 ? 1 : n; }

// Chan, Golub, LeVeque 1979.
TPPO_HD inline Moments merge(const Moments& a, const Moments& b) {
  if (a.n == 0 || b.n == 0) return a.n == 0 ? b : a;
  const double n = a.n + b.n, difference = b.mean - a.mean;
  return {n, a.mean + difference * b.n / n, a.m2 + b.m2 + difference * difference * a.n * b.n / n,
          a.largest < b.largest ? b.largest : a.largest};
}

TPPO_HD inline double variance(const Moments& of, bool unbiased) {
  return of.m2 / at_least_one(of.n - unbiased);
}

struct Whitening {
  float mean, scale, rest;  // the mean travels in two floats
};

// (x - mean) * rsqrt(var + eps), and the mean again where it stays.
TPPO_HD inline Whitening whitening(const Moments& of, double eps, bool unbiased, bool shift_mean) {
  const double var = variance(of, unbiased), tiny = kTiny * of.largest;
  const double scale = of.n < 2 || var <= tiny * tiny ? 0.0 : 1.0 / sqrt(var + eps);
  const float high = float(of.mean);
  return {high, float(scale),
          float((shift_mean ? 0.0 : of.mean) - (of.mean - double(high)) * scale)};
}

TPPO_HD inline float whitened(float x, const Whitening& by) {
  return (x - by.mean) * by.scale + by.rest;
}

}  // namespace tppo
