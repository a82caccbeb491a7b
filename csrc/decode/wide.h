// Sixteen lanes of FP32 on every path, so that sums over them have one order: how wide vectors are shows nowhere.
#pragma once

#include "../kernels/values.h"

namespace narrowcast {
namespace NARROWCAST_PATH {

constexpr size_t kWide = 16, kParts = kWide / kLanes;

struct Wide {
  F32 part[kParts];
};

NARROWCAST_INLINE Wide wide_splat(float value) {
  Wide w;
  for (size_t p = 0; p < kParts; ++p) w.part[p] = splat(value);
  return w;
}

NARROWCAST_INLINE Wide load_wide(const float* from) {
  Wide w;
  for (size_t p = 0; p < kParts; ++p) w.part[p] = load_vector<F32>(from + p * kLanes);
  return w;
}

NARROWCAST_INLINE void store_wide(float* to, const Wide& w) {
  for (size_t p = 0; p < kParts; ++p) store_vector(to + p * kLanes, w.part[p]);
}

template <class Function>
NARROWCAST_INLINE Wide each(const Wide& a, Function function) {
  Wide w;
  for (size_t p = 0; p < kParts; ++p) w.part[p] = function(a.part[p]);
  return w;
}

template <class Function>
NARROWCAST_INLINE Wide each(const Wide& a, const Wide& b, Function function) {
  Wide w;
  for (size_t p = 0; p < kParts; ++p) w.part[p] = function(a.part[p], b.part[p]);
  return w;
}

NARROWCAST_INLINE void add_product(Wide& sum, const Wide& a, const Wide& b) {
  for (size_t p = 0; p < kParts; ++p) sum.part[p] += a.part[p] * b.part[p];
}

NARROWCAST_INLINE void add(Wide& sum, const Wide& a) {
  for (size_t p = 0; p < kParts; ++p) sum.part[p] += a.part[p];
}

typedef float F4 __attribute__((vector_size(16)));

// Lanes l, l + 8, l + 4, l + 12 added up: (0 + 8) + (4 + 12).
NARROWCAST_INLINE F4 quarter(const Wide& w) {
  F4 part[4];
  static_assert(sizeof part == sizeof w, "sixteen lanes");
  memcpy(part, &w, sizeof w);
  return (part[0] + part[2]) + (part[1] + part[3]);
}

NARROWCAST_INLINE float total(const Wide& w) {
  const F4 q = quarter(w);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

NARROWCAST_INLINE float largest(const Wide& w) {
  F32 most = w.part[0];
  for (size_t p = 1; p < kParts; ++p) most = max(most, w.part[p]);
  return largest(most);
}

// --- 32 values of a tensor: of BF16 those at even places and those at odd ones, of others the halves ----------------

struct Pair {
  Wide first, second;
};

template <class T>
NARROWCAST_INLINE Pair load_pair(const T* from) {
  Pair pair;
  for (size_t p = 0; p < kParts; ++p) {
    pair.first.part[p] = load(from + p * kLanes);
    pair.second.part[p] = load(from + kWide + p * kLanes);
  }
  return pair;
}

NARROWCAST_INLINE Pair load_pair(const Bf16* from) {
  Pair pair;
  for (size_t p = 0; p < kParts; ++p) {
    const U32 both = load_vector<U32>(from + 2 * p * kLanes);
    pair.first.part[p] = bits_as<F32>(both << 16);
    pair.second.part[p] = bits_as<F32>(both & 0xFFFF0000);
  }
  return pair;
}

// The first `count` values, zeros behind them.
template <class T>
NARROWCAST_INLINE Pair load_pair(const T* from, size_t count) {
  if (count >= 32) return load_pair(from);
  T values[32] = {};
  memcpy(values, from, count * sizeof(T));
  return load_pair(values);
}

NARROWCAST_INLINE Pair prepared_pair(const float* from) { return {load_wide(from), load_wide(from + kWide)}; }

NARROWCAST_INLINE void store_prepared(float* to, const Pair& pair) {
  store_wide(to, pair.first);
  store_wide(to + kWide, pair.second);
}

template <class T>
NARROWCAST_INLINE void store_pair(T* to, const Pair& pair) {
  for (size_t p = 0; p < kParts; ++p) {
    store(to + p * kLanes, pair.first.part[p]);
    store(to + kWide + p * kLanes, pair.second.part[p]);
  }
}

// Rounded as `to_bf16` does, in the low half of each lane.
NARROWCAST_INLINE U32 bf16_bits(F32 x) {
  const U32 bits = bits_as<U32>(x), nan = bits_as<U32>(x != x);
  return (nan & 0x7FC0) | (~nan & ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16));
}

NARROWCAST_INLINE void store_pair(Bf16* to, const Pair& pair) {
  for (size_t p = 0; p < kParts; ++p) {
    store_vector(to + 2 * p * kLanes, bf16_bits(pair.first.part[p]) | bf16_bits(pair.second.part[p]) << 16);
  }
}

template <class T>
NARROWCAST_INLINE void store_pair(T* to, const Pair& pair, size_t count) {
  if (count >= 32) return store_pair(to, pair);
  T values[32];
  store_pair(values, pair);
  memcpy(to, values, count * sizeof(T));
}

// --- Functions ------------------------------------------------------------------------------------------------------

// e to the x, at most 0 or NaN: 0 below -87, where FP32 has no normal numbers any more. Off by 1.1e-7 of it at most.
// As Cephes has it: x = n ln 2 + r, and a polynomial of r.
NARROWCAST_INLINE F32 exp_of_negative(F32 x) {
  const F32 inside = max(splat(-88.0f), x);  // which keeps NaN
  const F32 n = (inside * 1.44269504088896341f + 0x1.8p23f) - 0x1.8p23f;
  const F32 r = (inside - n * 0.693359375f) - n * -2.12194440e-4f;
  F32 y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = (y * (r * r) + r) + 1.0f;
  const I32 exponent = round_to_i32(inside * 1.44269504088896341f) + 127;
  const F32 power = bits_as<F32>(max(exponent, I32{}) << 23);
  return select(x < splat(-87.0f), splat(0.0f), y * power);
}

// Between -1 and 1; off by 2e-7 at most.
NARROWCAST_INLINE F32 tanh_of(F32 x) {
  const F32 small = exp_of_negative(magnitude(x) * -2.0f);
  const F32 y = (1.0f - small) / (1.0f + small);
  return select(x < splat(0.0f), -y, y);
}

}  // namespace NARROWCAST_PATH
}  // namespace narrowcast
