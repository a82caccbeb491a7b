// `minifloat`: values of 4, 6 or 8 bits with a scale for each block of features, or for each token.
#pragma once

#include "group.h"

namespace narrowcast {
namespace NARROWCAST_PATH {

constexpr float kSmallestScale = 0x1p-126f, kSmallestTokenScale = 0x1p-120f, kSmallestBlockScale = 0x1p-6f;

struct MinifloatLayout {
  size_t num_blocks, size;
  size_t scales, codes;  // bytes from the start; a token's scale, if any, is before those of blocks

  MinifloatLayout(const Format& format, size_t num_features)
      : size(format.group_size ? format.group_size : num_features) {
    num_blocks = (num_features + size - 1) / size;
    scales = format.scale_format == ScaleFormat::e4m3 ? 2 : 0;
    codes = scales + num_blocks * (format.scale_format == ScaleFormat::bf16 ? 2 : 1);
  }
};

// Codes of finite values, half to even, without the sign and not yet limited (FloatFormat.round).
NARROWCAST_INLINE I32 round_to(const Element& element, F32 x) {
  const F32 size = magnitude(x);
  const int32_t smallest_field = 127 + element.smallest_exponent;
  const I32 field = max(bits_as<I32>(size) >> 23, splat_i32(smallest_field));
  const F32 units = size * bits_as<F32>((254 + element.mantissa_bits - field) << 23);
  return round_to_i32(units) + ((field - smallest_field) << element.mantissa_bits);
}

NARROWCAST_INLINE F32 value_of(const Element& element, I32 code) {
  const I32 size = code & (element.sign() - 1);
  const I32 normal = (size << (23 - element.mantissa_bits)) + ((126 + element.smallest_exponent) << 23);
  const float unit = bits_as<float>((127 + element.smallest_exponent - element.mantissa_bits) << 23);
  const F32 subnormal = __builtin_convertvector(size, F32) * unit;
  const F32 unsigned_value = select(size < (1 << element.mantissa_bits), subnormal, bits_as<F32>(normal));
  const F32 number = select(size > element.largest_code, nan_vector(), unsigned_value);
  return bits_as<F32>(bits_as<I32>(number) | (code & element.sign()) << (32 - element.num_bits));
}

// The reciprocals of the scales that blocks get, in the place of their largest magnitudes; scales are written.
// Blocks where `bad` is not zero get NaN for a scale.
NARROWCAST_INLINE void bf16_scales(const Element& element, size_t num_blocks, float* blocks, const float* bad,
                                   uint8_t* out) {
  for_each_vector(num_blocks, [&](size_t first, size_t count) {
    const F32 scale = bf16_up(max(load(blocks + first) / element.largest(), splat(kSmallestScale)));
    const I32 marked = load(bad + first) != 0.0f;
    store_exact(reinterpret_cast<Bf16*>(out) + first, select(marked, nan_vector(), scale), count);
    store_vector(blocks + first, 1.0f / scale);
  });
}

NARROWCAST_INLINE void e8m0_scales(const Element& element, size_t num_blocks, float* blocks, const float* bad,
                                   uint8_t* out) {
  for_each_vector(num_blocks, [&](size_t first, size_t count) {
    const I32 field = bits_as<I32>(load(blocks + first)) >> 23;
    const I32 exponent = max(field - element.largest_exponent(), splat_i32(0));
    const I32 marked = load(bad + first) != 0.0f;
    store_bytes(out + first, low_8_bits(marked ? splat_i32(0xFF) : exponent), count);
    store_vector(blocks + first, bits_as<F32>((254 - exponent) << 23));
  });
}

NARROWCAST_INLINE void e4m3_scales(const Element& element, size_t num_blocks, float* blocks, const float* bad,
                                   uint8_t* out) {
  F32 largest_block = {};
  for_each_vector(num_blocks, [&](size_t first, size_t count) {
    largest_block = max(largest_block, load_repeated(blocks + first, count));
  });
  const float whole = element.largest() * kE4m3.largest();
  const F32 token = bf16_up(max(splat(largest(largest_block)) / whole, splat(kSmallestTokenScale)));
  store_exact(reinterpret_cast<Bf16*>(out), token, 1);
  for_each_vector(num_blocks, [&](size_t first, size_t count) {
    const F32 wanted = load(blocks + first) / element.largest() / token;
    const I32 code = round_to(kE4m3, min(max(wanted, splat(kSmallestBlockScale)), splat(kE4m3.largest())));
    const I32 marked = load(bad + first) != 0.0f;
    store_bytes(out + 2 + first, low_8_bits(marked ? splat_i32(kE4m3.nan_code()) : code), count);
    store_vector(blocks + first, 1.0f / token / value_of(kE4m3, code));
  });
}

// The largest finite magnitude; whether all values are finite.
template <class T>
NARROWCAST_INLINE bool find_largest(const T* x, size_t count, float& found) {
  F32 most = {}, strange = {};
  for_each_vector(count, [&](size_t first, size_t left) {
    const F32 size = magnitude(load(x + first, left));
    most = max(select(not_finite(size), F32{}, size), most);
    strange += size - size;
  });
  found = largest(most);
  return !any(strange != strange);
}

template <class T>
NARROWCAST_INLINE void code_blocks(const T* values, size_t num_features, const MinifloatLayout& layout,
                                   const Element& element, const float* reciprocals, const float* bad, uint8_t* codes,
                                   Counts& counts) {
  I32 clamped = {};
  for_each_group(num_features, layout.size, [&](size_t block, size_t start, size_t size) {
    const float reciprocal = reciprocals[block];
    for_each_vector(size, [&](size_t first, size_t count) {
      first += start;
      const F32 value = load(values + first, count);
      const I32 strange = not_finite(value);
      const F32 scaled = select(strange, F32{}, value) * reciprocal;
      const I32 code = round_to(element, scaled);
      clamped -= code > element.largest_code;
      const I32 sign = bits_as<I32>(bits_as<U32>(scaled) >> (32 - element.num_bits)) & element.sign();
      const I32 limited = min(code, splat_i32(element.largest_code)) | sign;
      store_vector(codes + first, low_8_bits(strange ? splat_i32(element.nan_code()) : limited));
    });
    if (bad[block] != 0.0f) memset(codes + start, 0, size);
  });
  counts.saturated += sum(clamped);
}

template <class T>
NARROWCAST_FLAT void minifloat_encode_rows(const T*, const Format& format, const Rows& x, const Payload& out,
                                           Counts& counts, const Scratch& scratch, size_t begin, size_t end) {
  const MinifloatLayout layout(format, x.num_values);
  const Element& element = format.element;
  float *blocks = scratch.group_row(0), *bad = scratch.group_row(1);
  uint8_t* codes = scratch.codes;
  for (size_t row = begin; row < end; ++row) {
    const T* values = static_cast<const T*>(x.row(row));
    uint8_t* payload = out.row(row);
    for_each_group(x.num_values, layout.size, [&](size_t block, size_t first, size_t count) {
      const bool finite = find_largest(values + first, count, blocks[block]);
      bad[block] = finite || element.has_nan() ? 0.0f : 1.0f;
      if (!finite) counts.non_finite += count_not_finite(values + first, count);
    });
    switch (format.scale_format) {
      case ScaleFormat::bf16: bf16_scales(element, layout.num_blocks, blocks, bad, payload); break;
      case ScaleFormat::e8m0: e8m0_scales(element, layout.num_blocks, blocks, bad, payload); break;
      case ScaleFormat::e4m3: e4m3_scales(element, layout.num_blocks, blocks, bad, payload); break;
    }
    code_blocks(values, x.num_values, layout, element, blocks, bad, codes, counts);
    memset(codes + x.num_values, 0, 8);
    pack(codes, x.num_values, element.num_bits, payload + layout.codes);
  }
}

NARROWCAST_INLINE void read_scales(const Format& format, const MinifloatLayout& layout, const uint8_t* payload,
                                   float* scales) {
  const F32 token = splat(load(bf16_at(payload, 0), 1)[0]);
  for_each_vector(layout.num_blocks, [&](size_t first, size_t count) {
    if (format.scale_format == ScaleFormat::bf16) {
      store_vector(scales + first, load(bf16_at(payload, 0) + first, count));
      return;
    }
    const I32 code = widen(load_bytes(payload + layout.scales + first, count));
    if (format.scale_format == ScaleFormat::e4m3) {
      store_vector(scales + first, token * value_of(kE4m3, code));
      return;
    }
    const I32 bits = code == 0 ? splat_i32(1 << 22) : code << 23;  // 2**-127 is subnormal
    store_vector(scales + first, select(code == 0xFF, nan_vector(), bits_as<F32>(bits)));
  });
}

template <bool add>
NARROWCAST_INLINE void sum_blocks(const Element& element, const MinifloatLayout& layout, size_t num_features,
                                  const float* scales, const uint8_t* codes, float* total) {
  for_each_group(num_features, layout.size, [&](size_t block, size_t start, size_t size) {
    const float scale = scales[block];
    for_each_vector(size, [&](size_t first, size_t) {
      first += start;
      const F32 value = value_of(element, widen(load_vector<U8>(codes + first))) * scale;
      store_vector(total + first, add ? load(total + first) + value : value);
    });
  });
}

template <class T>
NARROWCAST_FLAT void minifloat_decode_sum_row(const Format& format, const Payloads& payloads, size_t row,
                                              const Scratch& scratch, T* out, size_t num_features) {
  const MinifloatLayout layout(format, num_features);
  float *scales = scratch.group_row(0), *total = scratch.spare;
  for (size_t rank = 0; rank < payloads.num_ranks; ++rank) {
    const uint8_t* payload = payloads.row(rank, row);
    unpack(payload + layout.codes, num_features, format.element.num_bits, scratch.codes);
    read_scales(format, layout, payload, scales);
    if (rank) sum_blocks<true>(format.element, layout, num_features, scales, scratch.codes, total);
    else sum_blocks<false>(format.element, layout, num_features, scales, scratch.codes, total);
  }
  for_each_vector(num_features, [&](size_t first, size_t count) { store(out + first, load(total + first), count); });
}

}  // namespace NARROWCAST_PATH
}  // namespace narrowcast
