// RMS norms as Transformers computes them, rounding where it rounds.
#pragma once

#include "attend.h"

namespace narrowcast {
namespace NARROWCAST_PATH {

constexpr size_t kSumLevels = 4, kAtOnce = 4, kSumStep = 16;

// The sum of squares in the order in which PyTorch adds on machines with AVX-512: four vectors of sixteen side by side,
// every sixteen of those one number of the next level, then lane after lane.
template <class T>
NARROWCAST_INLINE float sum_of_squares(const T* x, size_t num_values) {
  Wide level[kSumLevels][kAtOnce];
  for (auto& sums : level) {
    for (Wide& sum : sums) sum = wide_splat(0.0f);
  }
  auto square = [&](Wide& sum, size_t vector) {
    for (size_t p = 0; p < kParts; ++p) {
      const F32 value = load(x + vector * kWide + p * kLanes);
      sum.part[p] += value * value;
    }
  };
  const size_t vectors = num_values / kWide, steps = vectors / kAtOnce;
  size_t step = 0;
  while (step + kSumStep <= steps) {
    for (size_t i = 0; i < kSumStep; ++i, ++step) {
      for (size_t k = 0; k < kAtOnce; ++k) square(level[0][k], step * kAtOnce + k);
    }
    for (size_t j = 1; j < kSumLevels; ++j) {
      for (size_t k = 0; k < kAtOnce; ++k) {
        add(level[j][k], level[j - 1][k]);
        level[j - 1][k] = wide_splat(0.0f);
      }
      if (step & (kSumStep - 1) << (4 * j)) break;
    }
  }
  for (; step < steps; ++step) {
    for (size_t k = 0; k < kAtOnce; ++k) square(level[0][k], step * kAtOnce + k);
  }
  for (size_t k = 0; k < kAtOnce; ++k) {
    for (size_t j = 1; j < kSumLevels; ++j) add(level[0][k], level[j][k]);
  }
  for (size_t vector = steps * kAtOnce; vector < vectors; ++vector) square(level[0][0], vector);
  for (size_t k = 1; k < kAtOnce; ++k) add(level[0][0], level[0][k]);
  float sum = 0.0f, lanes[kWide];
  for (size_t i = vectors * kWide; i < num_values; ++i) {
    const float value = load(x + i, 1)[0];
    sum += value * value;
  }
  store_wide(lanes, level[0][0]);
  for (size_t lane = 0; lane < kWide; ++lane) sum += lanes[lane];
  return sum;
}

template <class T>
static void norm_rows(const T*, const RmsNorm& n, size_t begin, size_t end) {
  const T* weight = static_cast<const T*>(n.weight);
  for (size_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(n.x) + static_cast<ptrdiff_t>(row) * n.stride;
    T* out = static_cast<T*>(n.out) + static_cast<ptrdiff_t>(row) * n.out_stride;
    const float variance = sum_of_squares(x, n.num_values) / static_cast<float>(n.num_values);
    const float scale = 1.0f / __builtin_sqrtf(variance + n.epsilon);
    for_each_vector(n.num_values, [&](size_t i, size_t count) {
      const F32 y = load(x + i, count) * scale, w = load(weight + i, count);
      store(out + i, n.from_one ? y * (1.0f + w) : w * rounded(y, x), count);
    });
  }
}

}  // namespace NARROWCAST_PATH
}  // namespace narrowcast
