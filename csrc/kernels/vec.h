// Vectors of one path, in the compiler's own notation: GCC and Clang lower it to whatever the path's flags allow
// (AVX-512, AVX2, SSE2, NEON), so that a kernel is written once.
//
// Everything here lives in the path's namespace and nothing comes from std: an inline function that two paths share
// would be linked once, with the instructions of either.
#pragma once

#include <cstring>

#include "kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace narrowcast {
namespace NARROWCAST_PATH {

#if defined(__AVX512BW__)
constexpr size_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr size_t kVectorBytes = 32;
#else
constexpr size_t kVectorBytes = 16;
#endif

constexpr size_t kLanes = kVectorBytes / 4;

#define NARROWCAST_INLINE static inline __attribute__((always_inline))
#define NARROWCAST_FLAT static __attribute__((flatten, noinline))  // with everything it calls inlined

typedef float F32 __attribute__((vector_size(kVectorBytes)));
typedef int32_t I32 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t U32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t U16 __attribute__((vector_size(kVectorBytes / 2)));   // as many as F32 has lanes
typedef uint8_t U8 __attribute__((vector_size(kVectorBytes / 4)));     // as many as F32 has lanes
typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes)));       // four times as many
typedef int8_t SignedBytes __attribute__((vector_size(kVectorBytes)));

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

constexpr uint32_t kInfinity = 0x7F800000, kNan = 0x7FC00000, kMagnitude = 0x7FFFFFFF;

template <class To, class From>
NARROWCAST_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
NARROWCAST_INLINE V load_vector(const void* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
NARROWCAST_INLINE void store_vector(void* to, V v) {
  memcpy(to, &v, sizeof v);
}

// The first `count` elements, zeros behind them.
template <class V>
NARROWCAST_INLINE V load_part(const void* from, size_t count) {
  V v = {};
  memcpy(&v, from, count * sizeof v[0]);
  return v;
}

template <class V>
NARROWCAST_INLINE void store_part(void* to, V v, size_t count) {
  memcpy(to, &v, count * sizeof v[0]);
}

NARROWCAST_INLINE F32 splat(float value) { return value - F32{}; }  // which is no operation; + would be, for -0
NARROWCAST_INLINE I32 splat_i32(int32_t value) { return I32{} + value; }
NARROWCAST_INLINE F32 select(I32 mask, F32 yes, F32 no) { return mask ? yes : no; }
NARROWCAST_INLINE I32 min(I32 a, I32 b) { return a < b ? a : b; }
NARROWCAST_INLINE I32 max(I32 a, I32 b) { return a > b ? a : b; }

NARROWCAST_INLINE F32 nan_vector() { return bits_as<F32>(I32{} + int32_t(kNan)); }
NARROWCAST_INLINE F32 magnitude(F32 x) { return bits_as<F32>(bits_as<I32>(x) & int32_t(kMagnitude)); }
NARROWCAST_INLINE I32 not_finite(F32 x) { return (bits_as<I32>(x) & int32_t(kMagnitude)) >= int32_t(kInfinity); }
NARROWCAST_INLINE F32 nan_unless_finite(F32 x) { return select(not_finite(x), nan_vector(), x); }

// The next BF16 not below `x`, which is not negative; not above `x`.
NARROWCAST_INLINE F32 bf16_up(F32 x) {
  return bits_as<F32>((bits_as<U32>(x) + 0xFFFF) & 0xFFFF0000);
}
NARROWCAST_INLINE F32 bf16_down(F32 x) {
  const U32 bits = bits_as<U32>(x), negative = U32{} - (bits >> 31);
  return bits_as<F32>((bits + (negative & 0xFFFF)) & 0xFFFF0000);
}

NARROWCAST_INLINE int64_t sum(I32 v) {
  int64_t total = 0;
  for (size_t lane = 0; lane < kLanes; ++lane) total += v[lane];
  return total;
}

// 0, 1, 2, ...
NARROWCAST_INLINE I32 lane_numbers() {
  I32 numbers;
  for (size_t lane = 0; lane < kLanes; ++lane) numbers[lane] = int32_t(lane);
  return numbers;
}

// Every lane beside the one `distance` away, in pairs.
template <class V>
NARROWCAST_INLINE V swapped(V v, int32_t distance) {
#if defined(__clang__)
  V other;
  for (size_t lane = 0; lane < kLanes; ++lane) other[lane] = v[lane ^ size_t(distance)];
  return other;
#else
  return __builtin_shuffle(v, lane_numbers() ^ distance);
#endif
}

// Whole numbers from rounding half to even, of magnitudes below 2**22; anything of others.
NARROWCAST_INLINE I32 round_to_i32(F32 x) { return bits_as<I32>(bits_as<U32>(x + 0x1.8p23f) - 0x4B400000); }

// Ask for what stands two pages on, as the hardware's own prefetching ends with a page. Any address will do.
template <size_t nbytes>
NARROWCAST_INLINE void prefetch(const void* from) {
  for (size_t line = 0; line < nbytes; line += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) + 8192 + line));
  }
}

// --- What compilers would do lane by lane: a path for another machine gives its instructions here -------------------

NARROWCAST_INLINE F32 min(F32 a, F32 b) {  // b, if either is NaN
#if defined(__AVX512BW__)
  return bits_as<F32>(_mm512_min_ps(bits_as<__m512>(a), bits_as<__m512>(b)));
#elif defined(__AVX2__)
  return bits_as<F32>(_mm256_min_ps(bits_as<__m256>(a), bits_as<__m256>(b)));
#elif defined(__SSE2__)
  return bits_as<F32>(_mm_min_ps(bits_as<__m128>(a), bits_as<__m128>(b)));
#else
  return a < b ? a : b;
#endif
}

NARROWCAST_INLINE F32 max(F32 a, F32 b) {  // b, if either is NaN
#if defined(__AVX512BW__)
  return bits_as<F32>(_mm512_max_ps(bits_as<__m512>(a), bits_as<__m512>(b)));
#elif defined(__AVX2__)
  return bits_as<F32>(_mm256_max_ps(bits_as<__m256>(a), bits_as<__m256>(b)));
#elif defined(__SSE2__)
  return bits_as<F32>(_mm_max_ps(bits_as<__m128>(a), bits_as<__m128>(b)));
#else
  return a > b ? a : b;
#endif
}

NARROWCAST_INLINE bool any(I32 v) {
#if defined(__AVX512BW__)
  return _mm512_test_epi32_mask(bits_as<__m512i>(v), bits_as<__m512i>(v)) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256(bits_as<__m256i>(v), bits_as<__m256i>(v));
#else
  int32_t found = 0;
  for (size_t lane = 0; lane < kLanes; ++lane) found |= v[lane];
  return found != 0;
#endif
}

// Of all lanes; none is NaN.
NARROWCAST_INLINE float smallest(F32 v) {
#pragma GCC unroll 4
  for (int32_t distance = kLanes / 2; distance; distance /= 2) v = min(v, swapped(v, distance));
  return v[0];
}
NARROWCAST_INLINE float largest(F32 v) {
#pragma GCC unroll 4
  for (int32_t distance = kLanes / 2; distance; distance /= 2) v = max(v, swapped(v, distance));
  return v[0];
}

struct Quad {
  F32 part[4];
};

// Rounded half to even, limited to -128 to 127, in order. At most 127 comes in; what lies far below, too.
NARROWCAST_INLINE SignedBytes round_to_bytes(const Quad& x) {
#if defined(__AVX512BW__)
  __m512i part[4];
  for (int i = 0; i < 4; ++i) part[i] = _mm512_cvtps_epi32(bits_as<__m512>(x.part[i]));
  const __m512i bytes =
      _mm512_packs_epi16(_mm512_packs_epi32(part[0], part[1]), _mm512_packs_epi32(part[2], part[3]));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return bits_as<SignedBytes>(_mm512_permutexvar_epi32(order, bytes));
#elif defined(__AVX2__)
  __m256i part[4];
  for (int i = 0; i < 4; ++i) part[i] = _mm256_cvtps_epi32(bits_as<__m256>(x.part[i]));
  const __m256i bytes =
      _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]), _mm256_packs_epi32(part[2], part[3]));
  return bits_as<SignedBytes>(_mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
#elif defined(__SSE2__)
  __m128i part[4];
  for (int i = 0; i < 4; ++i) part[i] = _mm_cvtps_epi32(bits_as<__m128>(x.part[i]));
  return bits_as<SignedBytes>(_mm_packs_epi16(_mm_packs_epi32(part[0], part[1]), _mm_packs_epi32(part[2], part[3])));
#else
  SignedBytes bytes;
  for (size_t i = 0; i < kVectorBytes; ++i) {
    const float value = x.part[i / kLanes][i % kLanes];
    bytes[i] = int8_t(__builtin_rintf(value < -128.0f ? -128.0f : value));
  }
  return bytes;
#endif
}

NARROWCAST_INLINE I32 widen_signed(U8 v) {
#if defined(__AVX512BW__)
  return bits_as<I32>(_mm512_cvtepi8_epi32(bits_as<__m128i>(v)));
#elif defined(__AVX2__)
  return bits_as<I32>(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bits_as<int64_t>(v))));
#elif defined(__SSE2__)
  __m128i quad = _mm_cvtsi32_si128(bits_as<int32_t>(v));
  quad = _mm_unpacklo_epi8(quad, quad);
  return bits_as<I32>(_mm_srai_epi32(_mm_unpacklo_epi16(quad, quad), 24));
#else
  typedef int8_t S8 __attribute__((vector_size(kLanes)));
  return __builtin_convertvector(bits_as<S8>(v), I32);
#endif
}

NARROWCAST_INLINE I32 widen(U8 v) {
#if defined(__AVX512BW__)
  return bits_as<I32>(_mm512_cvtepu8_epi32(bits_as<__m128i>(v)));
#elif defined(__AVX2__)
  return bits_as<I32>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bits_as<int64_t>(v))));
#elif defined(__SSE2__)
  return widen_signed(v) & 0xFF;
#else
  return __builtin_convertvector(v, I32);
#endif
}

NARROWCAST_INLINE U32 widen(U16 v) {
#if defined(__AVX512BW__)
  return bits_as<U32>(_mm512_cvtepu16_epi32(bits_as<__m256i>(v)));
#elif defined(__AVX2__)
  return bits_as<U32>(_mm256_cvtepu16_epi32(bits_as<__m128i>(v)));
#elif defined(__SSE2__)
  return bits_as<U32>(_mm_unpacklo_epi16(_mm_cvtsi64_si128(bits_as<int64_t>(v)), _mm_setzero_si128()));
#else
  return __builtin_convertvector(v, U32);
#endif
}

// The low bits of each lane.
NARROWCAST_INLINE U16 low_16_bits(U32 v) {
#if defined(__AVX512BW__)
  return bits_as<U16>(_mm512_cvtepi32_epi16(bits_as<__m512i>(v)));
#elif defined(__AVX2__)
  const __m256i words = _mm256_and_si256(bits_as<__m256i>(v), _mm256_set1_epi32(0xFFFF));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  return bits_as<U16>(_mm256_castsi256_si128(packed));
#elif defined(__SSE2__)
  const __m128i words = _mm_srai_epi32(_mm_slli_epi32(bits_as<__m128i>(v), 16), 16);  // packing saturates, signed
  return bits_as<U16>(_mm_cvtsi128_si64(_mm_packs_epi32(words, words)));
#else
  return __builtin_convertvector(v, U16);
#endif
}

// Lanes are 0 to 255.
NARROWCAST_INLINE U8 low_8_bits(I32 v) {
#if defined(__AVX512BW__)
  return bits_as<U8>(_mm512_cvtepi32_epi8(bits_as<__m512i>(v)));
#elif defined(__AVX2__)
  const __m256i words = _mm256_packus_epi32(bits_as<__m256i>(v), bits_as<__m256i>(v));
  const __m128i ordered = _mm256_castsi256_si128(_mm256_permute4x64_epi64(words, 0x08));
  return bits_as<U8>(_mm_cvtsi128_si64(_mm_packus_epi16(ordered, ordered)));
#elif defined(__SSE2__)
  const __m128i words = _mm_packs_epi32(bits_as<__m128i>(v), bits_as<__m128i>(v));
  return bits_as<U8>(_mm_cvtsi128_si32(_mm_packus_epi16(words, words)));
#else
  return __builtin_convertvector(v, U8);
#endif
}

// What the low 4 bits of each lane stand for in `feature`: the code less 8, NaN for 0.
NARROWCAST_INLINE F32 steps_of_4_bits(I32 codes) {
#if defined(__AVX512BW__)
  const float nan = bits_as<float>(kNan);
  const __m512 steps = _mm512_setr_ps(nan, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return bits_as<F32>(_mm512_permutexvar_ps(bits_as<__m512i>(codes), steps));  // reads 4 bits
#else
  const I32 code = codes & 15;
  return select(code == 0, nan_vector(), __builtin_convertvector(code - 8, F32));
#endif
}

// from[place] of as many places as there are lanes. Lane by lane: instructions for it are no faster.
NARROWCAST_INLINE F32 gather(const float* from, const uint16_t* places) {
  F32 values;
  for (size_t lane = 0; lane < kLanes; ++lane) values[lane] = from[places[lane]];
  return values;
}

// Codes of so many bits `look_up` finds without going to memory.
#if defined(__AVX2__)
constexpr int kRegisterBits = 6;
#else
constexpr int kRegisterBits = 0;
#endif

// table[code], of the lowest `width` bits of each code; 16 entries of the table may be read though it is shorter.
template <int width>
NARROWCAST_INLINE F32 look_up(const float* table, I32 codes) {
#if defined(__AVX512BW__)
  const __m512i code = bits_as<__m512i>(codes);
  if constexpr (width <= 4) return bits_as<F32>(_mm512_permutexvar_ps(code, _mm512_loadu_ps(table)));
  if constexpr (width == 5) {
    return bits_as<F32>(_mm512_permutex2var_ps(_mm512_loadu_ps(table), code, _mm512_loadu_ps(table + 16)));
  }
#elif defined(__AVX2__)
  if constexpr (width <= 3) {
    return bits_as<F32>(_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), bits_as<__m256i>(codes)));
  }
#endif
  if constexpr (0 < width && width <= kRegisterBits) {
    const F32 low = look_up<width - 1>(table, codes), high = look_up<width - 1>(table + (1 << width >> 1), codes);
    return select((codes << (32 - width)) < 0, high, low);  // blending looks at the highest bit
  } else {
    F32 values;
    for (size_t lane = 0; lane < kLanes; ++lane) values[lane] = table[codes[lane] & ((1 << width) - 1)];
    return values;
  }
}

}  // namespace NARROWCAST_PATH
}  // namespace narrowcast
