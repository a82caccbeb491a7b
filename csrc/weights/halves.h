// Products with activations in BF16, of matrices in 4 bits with zero points and of those that are BF16 themselves.
//
// A step takes two columns: the odd one first, then the even one, multiplied (which is exact) and added, as the
// instruction for it does (VDPBF16PS). It takes numbers below 2**-126 for zero, so others do. Of sums below 2**-100 bits
// may differ by path. In products with codes no sum comes there, as activations below 2**-118 are zeros. Where a product
// overflows (with codes: of activations above 2**124), one path may find an infinity and another one NaN or a number.
#pragma once

#include "kernels/values.h"
#include "weights.h"

namespace narrowcast {
namespace NARROWCAST_PATH {

// Two columns of weights in a lane.
struct Pairs {
#if defined(__AVX512BF16__)
  I32 both;
#else
  F32 even, odd;
#endif
};

NARROWCAST_INLINE Pairs pairs_of_bf16(I32 both) {
#if defined(__AVX512BF16__)
  return {both};
#else
  return {bits_as<F32>(both << 16), bits_as<F32>(both & int32_t(0xFFFF0000))};
#endif
}

// The same of any numbers: those below 2**-126 are zeros.
NARROWCAST_INLINE Pairs normal_pairs(I32 both) {
  Pairs pairs = pairs_of_bf16(both);
#if !defined(__AVX512BF16__)
  pairs.even = select((bits_as<I32>(pairs.even) & int32_t(kInfinity)) == 0, splat(0.0f), pairs.even);
  pairs.odd = select((bits_as<I32>(pairs.odd) & int32_t(kInfinity)) == 0, splat(0.0f), pairs.odd);
#endif
  return pairs;
}

// Of 8 columns in 4 bits those two that stand in the `index`-th bits of either half of a lane, less 8.
NARROWCAST_INLINE Pairs pairs_of_codes(I32 eight, int index) {
#if defined(__AVX512BF16__)
  alignas(64) static constexpr uint16_t kNumbers[32] = {  // -8 to 7, twice: a fifth bit is looked at, too
      0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0,
      0x40C0, 0x40E0, 0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000, 0x4040,
      0x4080, 0x40A0, 0x40C0, 0x40E0};
  const __m512i places = _mm512_srli_epi16(bits_as<__m512i>(eight), 4 * index);
  return {bits_as<I32>(_mm512_permutexvar_epi16(places, _mm512_load_si512(kNumbers)))};
#else
  const I32 even = (eight >> (4 * index) & 15) - 8, odd = (eight >> (4 * index + 16) & 15) - 8;
  return {__builtin_convertvector(even, F32), __builtin_convertvector(odd, F32)};
#endif
}

NARROWCAST_INLINE F32 add_products(F32 sum, Pairs w, Pairs x) {
#if defined(__AVX512BF16__)
  return bits_as<F32>(
      _mm512_dpbf16_ps(bits_as<__m512>(sum), bits_as<__m512bh>(w.both), bits_as<__m512bh>(x.both)));
#else
  sum = sum + w.odd * x.odd;
  return sum + w.even * x.even;
#endif
}

NARROWCAST_INLINE Pairs splat_pair(const uint16_t* x) {
  int32_t two;
  memcpy(&two, x, 4);
  return pairs_of_bf16(splat_i32(two));
}

constexpr size_t kZeroPointParts = kBlockRows / kLanes;

template <bool bf16_scales>
NARROWCAST_INLINE F32 load_scales(const uint8_t* from) {
  if constexpr (bf16_scales) return load(reinterpret_cast<const Bf16*>(from));
  return load(reinterpret_cast<const Fp16*>(from));
}

// Four sums of a group go on together, each of every fourth pair of columns.
template <bool bf16_scales, int width>
NARROWCAST_FLAT void multiply_zero_point(const PackedMatrix& matrix, const uint8_t* row, size_t first_group,
                                         size_t num_groups, const Tile& tile, float* y) {
  const BlockShape shape = block_shape(WeightKind::int4_zero_point, matrix.group_size);
  const uint8_t* block = row + first_group * shape.nbytes;
  F32 total[width][kZeroPointParts] = {};
  const uint16_t* x = tile.values;
  const float* sums = tile.scales;
  for (size_t group = 0; group < num_groups; ++group, block += shape.nbytes, sums += width) {
    F32 dots[width][kZeroPointParts][4] = {};
    const uint8_t* eight = block + 64;
    for (size_t column = 0; column < matrix.group_size; column += 8, eight += 64, x += 8 * width) {
#pragma GCC unroll 4
      for (size_t part = 0; part < kZeroPointParts; ++part) {
        const I32 codes = load_vector<I32>(eight + part * kVectorBytes);
#pragma GCC unroll 4
        for (int index = 0; index < 4; ++index) {
          const Pairs w = pairs_of_codes(codes, index);
#pragma GCC unroll 4
          for (int t = 0; t < width; ++t) {
            dots[t][part][index] = add_products(dots[t][part][index], w, splat_pair(x + 8 * t + 2 * index));
          }
        }
      }
    }
#pragma GCC unroll 4
    for (size_t part = 0; part < kZeroPointParts; ++part) {
      const F32 scale = load_scales<bf16_scales>(block + 2 * part * kLanes);
      const F32 zero = load_scales<bf16_scales>(block + 32 + 2 * part * kLanes);
#pragma GCC unroll 4
      for (int t = 0; t < width; ++t) {
        const F32(&dot)[4] = dots[t][part];
        const F32 sum = (dot[0] + dot[1]) + (dot[2] + dot[3]);
        total[t][part] = total[t][part] + scale * (sum - zero * splat(sums[t]));
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < width; ++t) {
#pragma GCC unroll 4
    for (size_t part = 0; part < kZeroPointParts; ++part) {
      store_vector(y + t * kBlockRows + part * kLanes, total[t][part]);
    }
  }
}

template <bool bf16_scales>
NARROWCAST_FLAT void dequantize_zero_point(const PackedMatrix& matrix, const uint8_t* row, size_t first_group,
                                           size_t num_groups, size_t num_rows, uint16_t* out, size_t num_columns) {
  const BlockShape shape = block_shape(WeightKind::int4_zero_point, matrix.group_size);
  for (size_t group = 0; group < num_groups; ++group) {
    const uint8_t* block = row + (first_group + group) * shape.nbytes;
    for (size_t part = 0; part < kZeroPointParts; ++part) {
      const F32 scale = load_scales<bf16_scales>(block + 2 * part * kLanes);
      const F32 zero = load_scales<bf16_scales>(block + 32 + 2 * part * kLanes);
      for (size_t column = 0; column < matrix.group_size; column += 8) {
        const I32 codes = load_vector<I32>(block + 64 + 8 * column + part * kVectorBytes);
        uint16_t values[8][kLanes];
        for (int k = 0; k < 8; ++k) {
          const I32 code = (codes >> (4 * (k / 2) + 16 * (k % 2)) & 15) - 8;
          store(reinterpret_cast<Bf16*>(values[k]), (__builtin_convertvector(code, F32) - zero) * scale);
        }
        for (size_t lane = 0; lane < kLanes && part * kLanes + lane < num_rows; ++lane) {
          uint16_t* to = out + (part * kLanes + lane) * num_columns + group * matrix.group_size + column;
          for (int k = 0; k < 8; ++k) to[k] = values[k][lane];
        }
      }
    }
  }
}

// Columns of a tile's tokens, in eights, and sums by group: of the columns that leave the same rest when divided by 16,
// then of these, halves by halves.
template <class T>
NARROWCAST_FLAT void prepare_halves(const Rows& x, const Tile& tile, size_t group_size) {
  const size_t num_groups = x.num_values / group_size, width = tile.width;
  for (size_t t = 0; t < width; ++t) {
    const bool is_there = t < tile.num_tokens;
    const T* row = is_there ? static_cast<const T*>(x.row(tile.first_token + t)) : nullptr;
    for (size_t group = 0; group < num_groups; ++group) {
      F32 sums[kZeroPointParts] = {};
      for (size_t column = group * group_size; column < (group + 1) * group_size; column += kLanes) {
        F32 v = is_there ? load(row + column) : splat(0.0f);
        U16 halves = to_bf16(v);
        v = from_bf16(halves);
        v = select(magnitude(v) < splat(0x1p-118f), splat(0.0f), v);
        halves = low_16_bits(bits_as<U32>(v) >> 16);
        sums[column / kLanes % kZeroPointParts] += v;
        if constexpr (kLanes >= 8) {
          for (size_t eight = 0; eight < kLanes; eight += 8) {
            memcpy(tile.values + ((column + eight) / 8 * width + t) * 8, reinterpret_cast<char*>(&halves) + 2 * eight, 16);
          }
        } else {
          memcpy(tile.values + (column / 8 * width + t) * 8 + column % 8, &halves, 2 * kLanes);
        }
      }
      float by_rest[kBlockRows];
      for (size_t part = 0; part < kZeroPointParts; ++part) store_vector(by_rest + part * kLanes, sums[part]);
      for (size_t half = kBlockRows / 2; half; half /= 2) {
        for (size_t i = 0; i < half; ++i) by_rest[i] = by_rest[i] + by_rest[i + half];
      }
      tile.scales[group * width + t] = by_rest[0];
    }
  }
}

// Rows of BF16 weights, one after the other, so that memory is read in one stream. Sums of 64 pairs of columns go on
// together and are added halves by halves; columns behind the last 128 stand beside zeros.
template <int width, class Out>
NARROWCAST_FLAT void multiply_dense_rows(const DenseMatrix& matrix, const uint16_t* x, const Out* bias, const Rows& y,
                                         size_t first_token, size_t begin, size_t end) {
  constexpr size_t vectors = 64 / kLanes;
  const size_t num_columns = matrix.num_columns;
  for (size_t row = begin; row < end; ++row) {
    const uint16_t* w = matrix.values + row * matrix.stride;
    F32 sums[width][vectors] = {};
    size_t column = 0;
    for (; column + 128 <= num_columns; column += 128) {
#pragma GCC unroll 16
      for (size_t v = 0; v < vectors; ++v) {
        const Pairs weights = normal_pairs(load_vector<I32>(w + column + 2 * kLanes * v));
#pragma GCC unroll 4
        for (int t = 0; t < width; ++t) {
          const Pairs activations = normal_pairs(load_vector<I32>(x + t * num_columns + column + 2 * kLanes * v));
          sums[t][v] = add_products(sums[t][v], weights, activations);
        }
      }
    }
    if (column < num_columns) {
      for (size_t v = 0; v < vectors && column + 2 * kLanes * v < num_columns; ++v) {
        const size_t first = column + 2 * kLanes * v;
        const size_t count = num_columns - first < 2 * kLanes ? num_columns - first : 2 * kLanes;
        I32 both = {};
        memcpy(&both, w + first, 2 * count);
        const Pairs weights = normal_pairs(both);
        for (int t = 0; t < width; ++t) {
          I32 x_both = {};
          memcpy(&x_both, x + t * num_columns + first, 2 * count);
          sums[t][v] = add_products(sums[t][v], weights, normal_pairs(x_both));
        }
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < width; ++t) {
#pragma GCC unroll 4
      for (size_t half = vectors / 2; half; half /= 2) {
#pragma GCC unroll 8
        for (size_t v = 0; v < half; ++v) sums[t][v] = sums[t][v] + sums[t][v + half];
      }
      F32 sum = sums[t][0];
#pragma GCC unroll 4
      for (int32_t distance = kLanes / 2; distance; distance /= 2) sum = sum + swapped(sum, distance);
      F32 result = splat(sum[0]);
      if (bias) result = result + load(bias + row, 1);
      store(static_cast<Out*>(y.row(first_token + t)) + row, result, 1);
    }
  }
}

}  // namespace NARROWCAST_PATH
}  // namespace narrowcast
