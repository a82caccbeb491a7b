// Values of a tensor, in BF16, FP16 or FP32, as vectors of FP32.
#pragma once

#include "vec.h"

namespace narrowcast {
namespace NARROWCAST_PATH {

// --- Values of 16 bits ---------------------------------------------------------------------------------------------

NARROWCAST_INLINE F32 from_bf16(U16 h) { return bits_as<F32>(widen(h) << 16); }

NARROWCAST_INLINE F32 from_fp16(U16 h) {
#if defined(__AVX512F__)
  return bits_as<F32>(_mm512_cvtph_ps(bits_as<__m256i>(h)));
#elif defined(__F16C__)
  return bits_as<F32>(_mm256_cvtph_ps(bits_as<__m128i>(h)));
#else
  const U32 wide = widen(h);
  // The exponent's bias is 112 too small: a product with 2**112 sets that right, for subnormal numbers too.
  const U32 magnitude = bits_as<U32>(bits_as<F32>((wide & 0x7FFF) << 13) * 0x1p112f);
  const U32 special = bits_as<U32>(bits_as<I32>(wide & 0x7C00) == 0x7C00) & kInfinity;
  return bits_as<F32>(magnitude | special | (wide & 0x8000) << 16);
#endif
}

// Rounded half to even; NaN becomes the canonical one.
NARROWCAST_INLINE U16 to_bf16(F32 x) {
  const U32 bits = bits_as<U32>(x);
  const U32 rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  const U32 nan = bits_as<U32>(x != x);
  return low_16_bits((nan & 0x7FC0) | (~nan & rounded));
}

// The same of numbers that are not NaN and not subnormal, for which there may be an instruction.
NARROWCAST_INLINE U16 normal_to_bf16(F32 x) {
#if defined(__AVX512BF16__)
  return bits_as<U16>(_mm512_cvtneps_pbh(bits_as<__m512>(x)));
#else
  const U32 bits = bits_as<U32>(x);
  return low_16_bits((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
#endif
}

NARROWCAST_INLINE U16 to_fp16(F32 x) {
  const U32 nan = bits_as<U32>(x != x);
#if defined(__AVX512F__)
  const U16 rounded = bits_as<U16>(_mm512_cvtps_ph(bits_as<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  const U16 rounded = bits_as<U16>(_mm256_cvtps_ph(bits_as<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  const U32 bits = bits_as<U32>(x), magnitude = bits & kMagnitude;
  const U32 normal = (magnitude + 0xFFF + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  // Adding 0.5 rounds a number below 2**-14 to units of 2**-24, the subnormal ones of FP16.
  const U32 small = bits_as<U32>(bits_as<F32>(magnitude) + 0.5f) - 0x3F000000;
  const U32 is_small = bits_as<U32>(bits_as<I32>(magnitude) < 0x38800000);
  const U32 is_large = bits_as<U32>(bits_as<I32>(magnitude) >= 0x477FF000);  // 65520 rounds to infinity
  const U32 finite = (is_small & small) | (~is_small & normal);
  const U32 any_magnitude = (is_large & 0x7C00) | (~is_large & finite);
  const U16 rounded = low_16_bits(any_magnitude | (bits >> 16 & 0x8000));
#endif
  const U16 narrow_nan = low_16_bits(nan);
  return (narrow_nan & 0x7E00) | (~narrow_nan & rounded);
}

// --- Values in a tensor's dtype ------------------------------------------------------------------------------------

NARROWCAST_INLINE F32 load(const float* from, size_t count = kLanes) {
  return count == kLanes ? load_vector<F32>(from) : load_part<F32>(from, count);
}
NARROWCAST_INLINE F32 load(const Bf16* from, size_t count = kLanes) {
  return from_bf16(count == kLanes ? load_vector<U16>(from) : load_part<U16>(from, count));
}
NARROWCAST_INLINE F32 load(const Fp16* from, size_t count = kLanes) {
  return from_fp16(count == kLanes ? load_vector<U16>(from) : load_part<U16>(from, count));
}

// Where fewer than a vector are left, the first of them stands behind them.
template <class T>
NARROWCAST_INLINE F32 load_repeated(const T* from, size_t count) {
  const F32 v = load(from, count);
  return count == kLanes ? v : select(lane_numbers() < int32_t(count), v, splat(v[0]));
}

NARROWCAST_INLINE F32 canonical(F32 x) { return select(x != x, nan_vector(), x); }

NARROWCAST_INLINE void store(float* to, F32 x, size_t count = kLanes) {
  if (count == kLanes) store_vector(to, canonical(x));
  else store_part(to, canonical(x), count);
}
NARROWCAST_INLINE void store(Bf16* to, F32 x, size_t count = kLanes) {
  if (count == kLanes) store_vector(to, to_bf16(x));
  else store_part(to, to_bf16(x), count);
}
NARROWCAST_INLINE void store(Fp16* to, F32 x, size_t count = kLanes) {
  if (count == kLanes) store_vector(to, to_fp16(x));
  else store_part(to, to_fp16(x), count);
}

// The same for numbers that are not NaN and not subnormal.
template <class T>
NARROWCAST_INLINE void store_normal(T* to, F32 x, size_t count = kLanes) { store(to, x, count); }
NARROWCAST_INLINE void store_normal(float* to, F32 x, size_t count = kLanes) {
  if (count == kLanes) store_vector(to, x);
  else store_part(to, x, count);
}
NARROWCAST_INLINE void store_normal(Bf16* to, F32 x, size_t count = kLanes) {
  if (count == kLanes) store_vector(to, normal_to_bf16(x));
  else store_part(to, normal_to_bf16(x), count);
}

// Numbers that BF16 holds: as they are.
NARROWCAST_INLINE void store_exact(Bf16* to, F32 x, size_t count = kLanes) {
  const U16 halves = low_16_bits(bits_as<U32>(x) >> 16);
  if (count == kLanes) store_vector(to, halves);
  else store_part(to, halves, count);
}

NARROWCAST_INLINE U8 load_bytes(const uint8_t* from, size_t count = kLanes) {
  return count == kLanes ? load_vector<U8>(from) : load_part<U8>(from, count);
}
NARROWCAST_INLINE void store_bytes(uint8_t* to, U8 v, size_t count = kLanes) {
  if (count == kLanes) store_vector(to, v);
  else store_part(to, v, count);
}

// Calls `body(first, count)` for each vector of `total` values; `count` is a constant but for the last one.
template <class Body>
NARROWCAST_INLINE void for_each_vector(size_t total, Body body) {
  size_t first = 0;
  for (; first + kLanes <= total; first += kLanes) body(first, kLanes);
  if (first < total) body(first, total - first);
}

}  // namespace NARROWCAST_PATH
}  // namespace narrowcast
