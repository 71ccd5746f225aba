// What happens to one row of the residual stream or one head: norm and rotation.
#pragma once

#include <cmath>

#include "simd.h"

namespace nanochat {

constexpr float EPS = 1.1920929e-7f;  // as nanochat/model.py

// What brings the root mean square of x to 1. Four sums side by side, the same for every row.
inline float norm_factor(const float* x, int count) {
  f32x16 sums[4] = {};
  int i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES) {
    UNROLL for (int v = 0; v < 4; v++) {
      f32x16 at = load<f32x16>(x + i + v * LANES);
      sums[v] = fma(at, at, sums[v]);
    }
  }
  for (; i < count; i += LANES) {
    f32x16 at = load_some(x + i, count - i < LANES ? count - i : LANES);
    sums[0] = fma(at, at, sums[0]);
  }
  float square = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  return 1.0f / std::sqrt(square / float(count) + EPS);
}

inline void scale_row(float* x, int count, float factor) {
  for (int i = 0; i < count; i++) x[i] *= factor;
}

// Turns the pairs (i, i + size / 2) clockwise, then norms to a root mean square of `target`.
inline void rotate_and_norm(float* __restrict x, int size, const float* __restrict cosine, const float* __restrict sine,
                            float target) {
  int half = size / 2;
  for (int i = 0; i < half; i++) {
    float a = x[i], b = x[i + half];
    x[i] = a * cosine[i] + b * sine[i];
    x[i + half] = b * cosine[i] - a * sine[i];
  }
  scale_row(x, size, norm_factor(x, size) * target);
}

}  // namespace nanochat
