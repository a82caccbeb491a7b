// Products of matrices in 8, 4 and 2 bits with activations in 8: sums of whole numbers, exact, and then a scale.
#pragma once

#include "kernels/values.h"
#include "weights.h"

namespace narrowcast {
namespace NARROWCAST_PATH {

constexpr size_t kParts = kBlockRows / kLanes;  // vectors for 16 rows

#if defined(__AVX512BW__)
NARROWCAST_INLINE __m512i dot_pairs(Bytes codes, I32 q) {
  return _mm512_maddubs_epi16(bits_as<__m512i>(codes), bits_as<__m512i>(q));
}
NARROWCAST_INLINE I32 sum_of_pairs(__m512i pairs) {
  return bits_as<I32>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
NARROWCAST_INLINE I32 add_pairs(I32 sum, __m512i pairs) {
  return bits_as<I32>(_mm512_add_epi16(bits_as<__m512i>(sum), pairs));
}
NARROWCAST_INLINE I32 with_sign_of(I32 q, Bytes weights) {
  const __mmask64 negative = _mm512_movepi8_mask(bits_as<__m512i>(weights));
  return bits_as<I32>(_mm512_mask_sub_epi8(bits_as<__m512i>(q), negative, __m512i{}, bits_as<__m512i>(q)));
}
NARROWCAST_INLINE Bytes magnitudes(Bytes weights) { return bits_as<Bytes>(_mm512_abs_epi8(bits_as<__m512i>(weights))); }
#elif defined(__AVX2__)
NARROWCAST_INLINE __m256i dot_pairs(Bytes codes, I32 q) {
  return _mm256_maddubs_epi16(bits_as<__m256i>(codes), bits_as<__m256i>(q));
}
NARROWCAST_INLINE I32 sum_of_pairs(__m256i pairs) {
  return bits_as<I32>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
NARROWCAST_INLINE I32 add_pairs(I32 sum, __m256i pairs) {
  return bits_as<I32>(_mm256_add_epi16(bits_as<__m256i>(sum), pairs));
}
NARROWCAST_INLINE I32 with_sign_of(I32 q, Bytes weights) {
  return bits_as<I32>(_mm256_sign_epi8(bits_as<__m256i>(q), bits_as<__m256i>(weights)));
}
NARROWCAST_INLINE Bytes magnitudes(Bytes weights) { return bits_as<Bytes>(_mm256_abs_epi8(bits_as<__m256i>(weights))); }
#endif

// The sum of products of 32 unsigned codes and activations: eight times four neighbours in a lane. `bits`: of the codes.
template <int bits>
struct GroupDot {
  I32 sum;
  int32_t offset;

  // `offset`: added to the sum, as codes are too large by what stands for zero.
  __attribute__((always_inline)) void start(int32_t from) {
    offset = from;
#if defined(__AVX512VNNI__)
    sum = splat_i32(from);
#else
    sum = I32{};
#endif
  }

  __attribute__((always_inline)) void add(Bytes codes, const int8_t* activations) {
    [[maybe_unused]] int32_t four;
    memcpy(&four, activations, 4);
    [[maybe_unused]] const I32 q = splat_i32(four);
#if defined(__AVX512VNNI__)
    sum = bits_as<I32>(_mm512_dpbusd_epi32(bits_as<__m512i>(sum), bits_as<__m512i>(codes), bits_as<__m512i>(q)));
#elif defined(__AVX2__)
    if constexpr (bits == 8) {  // two products of 255 and 127 overflow 16 bits, of 128 and 127 they do not
      const Bytes weights = codes ^ 0x80;
      sum += sum_of_pairs(dot_pairs(magnitudes(weights), with_sign_of(q, weights)));
    } else {  // sixteen of 15 and 127 do not
      sum = add_pairs(sum, dot_pairs(codes, q));
    }
#else
    for (int k = 0; k < 4; ++k) sum += (bits_as<I32>(codes) >> (8 * k) & 0xFF) * int32_t(activations[k]);
#endif
  }

  __attribute__((always_inline)) I32 total() const {
#if defined(__AVX512VNNI__)
    return sum;
#elif defined(__AVX512BW__)
    return bits == 8 ? sum : sum_of_pairs(bits_as<__m512i>(sum)) + offset;
#elif defined(__AVX2__)
    return bits == 8 ? sum : sum_of_pairs(bits_as<__m256i>(sum)) + offset;
#else
    return sum + offset;
#endif
  }
};

// The codes of 32 columns of kLanes rows, four neighbours in a lane.
template <WeightKind kind>
NARROWCAST_INLINE void unpack_codes(const uint8_t* packed, Bytes (&codes)[8]) {
  if constexpr (kind == WeightKind::int8) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) codes[j] = load_vector<Bytes>(packed + 64 * j);
  } else if constexpr (kind == WeightKind::ternary) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const Bytes four = load_vector<Bytes>(packed + 64 * v);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) codes[4 * v + c] = (four >> (2 * c)) & 3;
    }
  } else {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Bytes two = load_vector<Bytes>(packed + 64 * j);
      codes[j] = two & 15;
      codes[j + 4] = two >> 4;
    }
  }
}

// Where 32 columns stand in 16 rows of a matrix.
template <WeightKind kind>
struct GroupPlace {
  static constexpr BlockShape kShape = block_shape(kind, kActivationGroup);
  static constexpr size_t kGroups = kShape.num_columns / kActivationGroup;
  static constexpr size_t kHeader = kind == WeightKind::ternary ? 0 : kind == WeightKind::int4_minimum ? 128 : 64;
  static constexpr size_t kCodes = (kShape.nbytes - kHeader) / kGroups;

  const uint8_t *codes, *scales;

  __attribute__((always_inline)) GroupPlace(const uint8_t* row, size_t group) {
    const uint8_t* block = row + group / kGroups * kShape.nbytes;
    codes = block + kHeader + group % kGroups * kCodes;
    scales = block + group % kGroups * (2 * kBlockRows);
  }
};

template <WeightKind kind, int width>
NARROWCAST_FLAT void multiply_groups(const PackedMatrix& matrix, const uint8_t* row, size_t first_group,
                                     size_t num_groups, const Tile& tile, float* y) {
  constexpr bool ternary = kind == WeightKind::ternary, minimum = kind == WeightKind::int4_minimum;
  constexpr int bits = kind == WeightKind::int8 ? 8 : ternary ? 2 : 4;
  constexpr int side = width < 4 ? width : 4;  // tokens whose sums, a chain of slow instructions each, go on together
  constexpr int chains = side == 1 ? 2 : 1;    // of one token
  F32 total[width][kParts];
  I32 count[ternary ? width : 1][kParts];
#pragma GCC unroll 16
  for (int t = 0; t < width; ++t) {
#pragma GCC unroll 4
    for (size_t part = 0; part < kParts; ++part) total[t][part] = splat(0.0f);
  }
  if constexpr (ternary) {
#pragma GCC unroll 16
    for (int t = 0; t < width; ++t) {
#pragma GCC unroll 4
      for (size_t part = 0; part < kParts; ++part) count[t][part] = I32{};
    }
  }
  const int8_t* q = tile.codes;
  const float* scales = tile.scales;
  const int32_t* offsets = tile.offsets;
  for (size_t group = 0; group < num_groups; ++group, q += 32 * width, scales += width, offsets += width) {
    const GroupPlace<kind> place(row, first_group + group);
    if constexpr (width >= (ternary ? 4 : 8)) {  // with fewer, the hardware's own prefetching is best
#pragma GCC unroll 8
      for (size_t line = 0; line < place.kCodes; line += 64) __builtin_prefetch(place.codes + 4096 + line);
    }
#pragma GCC unroll 4
    for (size_t part = 0; part < kParts; ++part) {
      Bytes codes[8];
      unpack_codes<kind>(place.codes + part * kVectorBytes, codes);
#if defined(__AVX512BW__)
      if constexpr (kind == WeightKind::int8 && width > 1) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) asm("" : "+v"(codes[j]));  // GCC would load them again for each token
      }
#endif
      F32 weight_scale = {}, least = {};
      if constexpr (!ternary) weight_scale = load(reinterpret_cast<const Fp16*>(place.scales) + part * kLanes);
      if constexpr (minimum) least = load(reinterpret_cast<const Fp16*>(place.scales + 64) + part * kLanes);
#pragma GCC unroll 16
      for (int first = 0; first < width; first += side) {
        GroupDot<bits> dots[side][chains];
#pragma GCC unroll 4
        for (int u = 0; u < side; ++u) {
#pragma GCC unroll 2
          for (int c = 0; c < chains; ++c) dots[u][c].start(c || minimum ? 0 : offsets[first + u]);
        }
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
#pragma GCC unroll 4
          for (int u = 0; u < side; ++u) dots[u][j / 4 % chains].add(codes[j], q + 32 * (first + u) + 4 * j);
        }
#pragma GCC unroll 4
        for (int u = 0; u < side; ++u) {
          const int t = first + u;
          I32 sum = dots[u][0].total();
          if constexpr (chains == 2) sum += dots[u][1].total();
          if constexpr (ternary) {
            count[t][part] += sum;
          } else {
            const F32 sum_f = __builtin_convertvector(sum, F32);
            total[t][part] = total[t][part] + sum_f * (weight_scale * splat(scales[t]));
          }
          if constexpr (minimum) total[t][part] = total[t][part] + least * splat(scales[t] * float(offsets[t]));
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < width; ++t) {
#pragma GCC unroll 4
    for (size_t part = 0; part < kParts; ++part) {
      if constexpr (ternary) {
        const float scale = num_groups ? matrix.scale * tile.scales[t] : 0.0f;
        total[t][part] = __builtin_convertvector(count[t][part], F32) * splat(scale);
      }
      store_vector(y + t * kBlockRows + part * kLanes, total[t][part]);
    }
  }
}

// --- Activations in 8 bits -----------------------------------------------------------------------------------------

// Added in lanes first: whole numbers, in any order.
NARROWCAST_INLINE int32_t sum_of_lanes(I32 v) {
#pragma GCC unroll 4
  for (int32_t distance = kLanes / 2; distance; distance /= 2) v += swapped(v, distance);
  return v[0];
}

// The largest magnitude as the bits of a float: of NaN, a NaN.
NARROWCAST_INLINE int32_t largest_of_lanes(I32 v) {
#pragma GCC unroll 4
  for (int32_t distance = kLanes / 2; distance; distance /= 2) v = max(v, swapped(v, distance));
  return v[0];
}

struct ActivationScale {
  float scale, reciprocal;  // NaN and zero of values that are not finite; both zero of none above 2**-100
};

NARROWCAST_INLINE ActivationScale activation_scale(int32_t largest) {
  if (largest >= int32_t(kInfinity)) return {bits_as<float>(kNan), 0.0f};
  const float value = bits_as<float>(largest);
  if (value < 0x1p-100f) return {0.0f, 0.0f};
  return {value / 127.0f, 127.0f / value};
}

template <class T>
NARROWCAST_INLINE int32_t largest_magnitude(const T* x, size_t count) {
  I32 largest = {};
  for (size_t first = 0; first < count; first += kLanes) largest = max(largest, bits_as<I32>(magnitude(load(x + first))));
  return largest_of_lanes(largest);
}

// Codes of 32 values; their sum is returned.
template <class T>
NARROWCAST_INLINE int32_t encode_activations(const T* x, float reciprocal, int8_t* codes) {
  I32 total = {};
#pragma GCC unroll 8
  for (size_t first = 0; first < kActivationGroup; first += kLanes) {
    F32 scaled = load(x + first) * splat(reciprocal);
    scaled = select(not_finite(scaled), splat(0.0f), scaled);
    const I32 code = round_to_i32(scaled);
    total += code;
    store_bytes(reinterpret_cast<uint8_t*>(codes + first), low_8_bits(code & 0xFF));
  }
  return sum_of_lanes(total);
}

// Whole groups of 32 columns of a tile's tokens. `by_token`: one scale for all of a token's groups.
template <class T>
NARROWCAST_FLAT void prepare_integers(const Rows& x, const Tile& tile, int32_t too_large, bool by_token) {
  const size_t num_groups = x.num_values / kActivationGroup, width = tile.width;
  for (size_t t = 0; t < width; ++t) {
    if (t >= tile.num_tokens) {
      for (size_t group = 0; group < num_groups; ++group) {
        const size_t at = group * width + t;
        memset(tile.codes + 32 * at, 0, 32);
        tile.scales[at] = 0.0f;
        tile.offsets[at] = 0;
      }
      continue;
    }
    const T* row = static_cast<const T*>(x.row(tile.first_token + t));
    ActivationScale scale = {};
    if (by_token) scale = activation_scale(largest_magnitude(row, x.num_values));
    for (size_t group = 0; group < num_groups; ++group) {
      const T* from = row + 32 * group;
      const size_t at = group * width + t;
      if (!by_token) scale = activation_scale(largest_magnitude(from, kActivationGroup));
      tile.scales[at] = scale.scale;
      tile.offsets[at] = too_large * encode_activations(from, scale.reciprocal, tile.codes + 32 * at);
    }
  }
}

}  // namespace NARROWCAST_PATH
}  // namespace narrowcast
