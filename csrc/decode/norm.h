// RMS norms as Transformers computes them, rounding where it rounds.
#pragma once

#include "attend.h"

namespace narrowcast {
namespace NARROWCAST_PATH {

constexpr size_t kSumLevels = 4, kSumStep = 16;
constexpr size_t kEight = 8, kAtOnce = 4 * kEight;

// The sum of squares in the order in which PyTorch adds on x86: four vectors of eight side by side, every sixteen steps
// one number of the next level; then vector after vector, and lane after lane.
template <class T>
NARROWCAST_INLINE float sum_of_squares(const T* x, size_t num_values) {
  Wide level[kSumLevels][2];
  for (auto& sums : level) sums[0] = sums[1] = wide_splat(0.0f);
  auto add_step = [&](size_t step) {
    for (size_t half = 0; half < 2; ++half) {
      for (size_t p = 0; p < kParts; ++p) {
        const F32 value = load(x + step * kAtOnce + half * kWide + p * kLanes);
        level[0][half].part[p] += value * value;
      }
    }
  };
  auto raise = [&](size_t j) {
    for (size_t half = 0; half < 2; ++half) {
      add(level[j][half], level[j - 1][half]);
      level[j - 1][half] = wide_splat(0.0f);
    }
  };
  const size_t steps = num_values / kAtOnce;
  size_t step = 0;
  while (step + kSumStep <= steps) {
    for (size_t i = 0; i < kSumStep; ++i) add_step(step++);
    for (size_t j = 1; j < kSumLevels; ++j) {
      raise(j);
      if (step & (kSumStep - 1) << (4 * j)) break;
    }
  }
  while (step < steps) add_step(step++);
  for (size_t j = 1; j < kSumLevels; ++j) {
    for (size_t half = 0; half < 2; ++half) add(level[0][half], level[j][half]);
  }
  float lanes[kAtOnce], sum = 0.0f;
  store_wide(lanes, level[0][0]);
  store_wide(lanes + kWide, level[0][1]);
  auto square = [&](size_t i) {
    const float value = load(x + i, 1)[0];
    return value * value;
  };
  const size_t whole = num_values / kEight * kEight;
  for (size_t i = steps * kAtOnce; i < whole; ++i) lanes[i % kEight] += square(i);
  for (size_t i = whole; i < num_values; ++i) sum += square(i);
  for (size_t lane = 0; lane < kEight; ++lane) {
    sum += ((lanes[lane] + lanes[lane + kEight]) + lanes[lane + 2 * kEight]) + lanes[lane + 3 * kEight];
  }
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
