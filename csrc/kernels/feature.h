// `feature`: outliers in BF16, all other features as integers with static scales; tokens far beyond these as `group`.
#pragma once

#include "cast.h"
#include "group.h"

namespace narrowcast {
namespace NARROWCAST_PATH {

constexpr uint16_t kGuardMark = 0xFFC1;

NARROWCAST_INLINE int64_t sum_of_bytes(Bytes v) {
  uint64_t total = 0;
  for (size_t i = 0; i < kVectorBytes / 8; ++i) {
    uint64_t part = load_vector<uint64_t>(reinterpret_cast<const char*>(&v) + 8 * i);
    part = (part & 0x00FF00FF00FF00FF) + (part >> 8 & 0x00FF00FF00FF00FF);
    total += part * 0x0001000100010001 >> 48;
  }
  return int64_t(total);
}

// Codes round(x * reciprocal), clamped to +-largest, plus 2**(num_bits - 1). Returns how many were clamped: of 8 bits
// only those below; and all values that are not finite.
template <bool eight_bits, class T>
NARROWCAST_INLINE int64_t quantize(const T* x, const float* reciprocal, size_t num_values, int num_bits,
                                   uint8_t* codes) {
  const int8_t largest = int8_t((1 << (num_bits - 1)) - 1);
  const SignedBytes low = SignedBytes{} - largest, high = SignedBytes{} + largest;
  const uint8_t offset = uint8_t(largest + 1);
  int64_t num_clamped = 0;
  auto one = [&](size_t first, const Quad& steps) {
    Quad limited;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) limited.part[i] = min(steps.part[i], splat(127.0f));
    const SignedBytes rounded = round_to_bytes(limited);
    SignedBytes clamped = rounded < low ? low : rounded;
    clamped = clamped > high ? high : clamped;
    store_vector(codes + first, bits_as<Bytes>(clamped) + offset);
    return bits_as<Bytes>(clamped != rounded);
  };
  size_t first = 0;
  while (first + kVectorBytes <= num_values) {
    const size_t whole = (num_values - first) / kVectorBytes, most = whole < 255 ? whole : 255;
    const size_t end = first + most * kVectorBytes;
    Bytes clamped = {};
    I32 beyond = {};
    for (; first < end; first += kVectorBytes) {
      prefetch<kVectorBytes * sizeof(T)>(x + first);
      Quad steps;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        steps.part[i] = load(x + first + i * kLanes) * load(reciprocal + first + i * kLanes);
        if (eight_bits) beyond -= !(steps.part[i] < 127.5f);
      }
      clamped -= one(first, steps);
    }
    num_clamped += sum_of_bytes(clamped) + sum(beyond);
  }
  if (first < num_values) {
    Quad steps = {};
    int64_t beyond = 0;
    for (size_t i = 0; i < 4 && first + i * kLanes < num_values; ++i) {
      const size_t start = first + i * kLanes, left = num_values - start, count = left < kLanes ? left : kLanes;
      steps.part[i] = load(x + start, count) * load(reciprocal + start, count);
      if (eight_bits) beyond -= sum(!(steps.part[i] < 127.5f));
    }
    num_clamped += sum_of_bytes(Bytes{} - one(first, steps)) + beyond;
  }
  return num_clamped;
}

// What was clamped in a row where that happened: values that are not finite get the code 0, the others are counted.
// Returns whether the row lies so far out of range that the guard codes it; then no value counts as saturated.
template <class T>
NARROWCAST_FLAT bool mark_clamped(const T* x, const Format& format, const float* reciprocal, uint8_t* codes,
                                  Counts& counts) {
  const float largest = float((1 << (format.num_bits - 1)) - 1);
  // The middle between the largest code and the next one is a tie and goes up, as the largest code is odd.
  const float limit = largest + 0.5f;
  I32 saturated = {}, non_finite = {}, far = {}, farther = {};
  for_each_vector(format.num_features, [&](size_t first, size_t count) {
    const F32 value = load(x + first, count), steps = magnitude(value * load(reciprocal + first, count));
    const I32 bad = not_finite(value);
    saturated -= (steps >= limit) & ~bad;
    far -= steps > 1.5f * largest;
    farther |= steps > 4.0f * largest;
    if (!any(bad)) return;
    non_finite -= bad;
    for (size_t lane = 0; lane < count; ++lane) {
      if (bad[lane]) codes[first + lane] = 0;
    }
  });
  const int64_t num_coded = int64_t(format.num_features - format.num_outliers), num_non_finite = sum(non_finite);
  counts.non_finite += num_non_finite;
  if (format.guard_bits && !num_non_finite && (any(farther) || 16 * sum(far) > num_coded)) {
    ++counts.guarded;
    return true;
  }
  counts.saturated += sum(saturated);
  return false;
}

// How the guard codes: `group`, behind the mark.
NARROWCAST_INLINE Format guard_format(const Format& format) {
  Format guard = {};
  guard.kind = Kind::group;
  guard.num_bits = format.guard_bits;
  guard.group_size = format.guard_group_size;
  guard.symmetric = true;
  return guard;
}

template <class T>
NARROWCAST_INLINE void guard_encode_row(const T* values, const Format& format, const Scratch& scratch,
                                        uint8_t* payload) {
  const Format guard = guard_format(format);
  const size_t num_features = format.num_features, num_outliers = format.num_outliers;
  const Rows x = {const_cast<T*>(values), Dtype::bf16, 0, 1, num_features};  // one row has no use for a stride
  Counts as_group;
  payload[0] = kGuardMark & 0xFF;
  payload[1] = kGuardMark >> 8;
  group_encode_rows(values, guard, x, {payload + 2, 0}, as_group, scratch, 0, 1);
  const size_t used = 2 + GroupLayout(guard, num_features).codes + packed_nbytes(num_features, guard.num_bits);
  memset(payload + used, 0, 2 * num_outliers + packed_nbytes(num_features - num_outliers, format.num_bits) - used);
}

template <class T>
NARROWCAST_FLAT void feature_encode_rows(const T*, const Format& format, const Rows& x, size_t source,
                                         const Payload& out, Counts& counts, const Scratch& scratch, size_t begin,
                                         size_t end) {
  const size_t num_coded = format.num_features - format.num_outliers;
  const float* reciprocal = format.reciprocal + source * format.num_features;
  uint8_t* codes = scratch.codes;
  T* gathered = reinterpret_cast<T*>(scratch.spare);
  for (size_t row = begin; row < end; ++row) {
    const T* values = static_cast<const T*>(x.row(row));
    uint8_t* payload = out.row(row);
    const int64_t num_clamped =
        format.num_bits == 8 ? quantize<true>(values, reciprocal, format.num_features, 8, codes)
                             : quantize<false>(values, reciprocal, format.num_features, format.num_bits, codes);
    if (num_clamped && mark_clamped(values, format, reciprocal, codes, counts)) {
      guard_encode_row(values, format, scratch, payload);
      continue;
    }
    for (size_t i = 0; i < format.num_holes; ++i) codes[format.holes[i]] = codes[format.fillers[i]];
    memset(codes + num_coded, 0, 8);
    for (size_t i = 0; i < format.num_outliers; ++i) gathered[i] = values[format.outliers[i]];
    for_each_vector(format.num_outliers, [&](size_t first, size_t count) {
      store_finite(reinterpret_cast<Bf16*>(payload) + first, load(gathered + first, count), count);
    });
    pack(codes, num_coded, format.num_bits, payload + 2 * format.num_outliers);
  }
}

NARROWCAST_INLINE bool has_zero(const uint8_t* codes, size_t num_codes) {
  Bytes zeros = {};
  size_t first = 0;
  for (; first + kVectorBytes <= num_codes; first += kVectorBytes) {
    zeros |= bits_as<Bytes>(load_vector<Bytes>(codes + first) == 0);
  }
  for (; first < num_codes; ++first) zeros[0] |= codes[first] == 0;
  return any(bits_as<I32>(zeros));
}

// Values of one rank, by slot: codes times scales. With `marked`, code 0 is NaN.
template <bool marked>
NARROWCAST_INLINE F32 dequantize(const uint8_t* codes, const float* scale, int32_t offset, size_t first,
                                 size_t count) {
  const I32 code = widen(load_vector<U8>(codes + first));
  F32 steps = __builtin_convertvector(code - offset, F32);
  if (marked) steps = select(code == 0, splat(bits_as<float>(kNan)), steps);
  return steps * load(scale + first, count);
}

// With `tame`, the sum is a number that needs no care, or the canonical NaN.
template <bool tame, class T>
NARROWCAST_INLINE void store_sum(T* to, F32 sum, size_t count) {
  if (tame) store_normal(to, sum, count);
  else store(to, sum, count);
}

// With `tame`, the sums are numbers that need no care.
template <bool tame, class T>
NARROWCAST_INLINE void sum_coded(const Format& format, const Payloads& payloads, const Scratch& scratch, T* out) {
  const int32_t offset = 1 << (format.num_bits - 1);
  const size_t num_features = format.num_features;
  const size_t num_coded = num_features - format.num_outliers;
  const float* scale = format.scale + payloads.first_source * num_features;
  auto body = [&](auto num_ranks, size_t first, size_t count) {
    F32 total = dequantize<!tame>(scratch.codes, scale, offset, first, count);
    for (size_t rank = 1; rank < num_ranks(); ++rank) {
      const uint8_t* codes = scratch.codes + rank * scratch.codes_stride;
      total = total + dequantize<!tame>(codes, scale + rank * num_features, offset, first, count);
    }
    store_sum<tame>(out + first, total, count);
  };
  if (payloads.num_ranks == 2) {
    for_each_vector(num_coded, [&](size_t first, size_t count) { body([] { return 2; }, first, count); });
  } else if (payloads.num_ranks == 1) {
    for_each_vector(num_coded, [&](size_t first, size_t count) { body([] { return 1; }, first, count); });
  } else {
    for_each_vector(num_coded,
                    [&](size_t first, size_t count) { body([&] { return payloads.num_ranks; }, first, count); });
  }
}

// 4 bits without a detour through memory: the first half of the slots shares its bytes with the second.
template <bool tame, class T, class NumRanks>
NARROWCAST_INLINE void sum_4_bits(const Format& format, const Payloads& payloads, size_t row, NumRanks num_ranks,
                                  T* out) {
  const size_t num_coded = format.num_features - format.num_outliers, half = (num_coded + 1) / 2;
  const float* scales = format.scale + payloads.first_source * format.num_features;
  auto body = [&](size_t first, size_t count, size_t upper_count) {
    F32 low = {}, high = {};
    for (size_t rank = 0; rank < num_ranks(); ++rank) {
      const float* scale = scales + rank * format.num_features;
      const I32 pairs = widen(load_bytes(payloads.row(rank, row) + 2 * format.num_outliers + first, count));
      const F32 low_value = steps_of_4_bits(pairs) * load(scale + first, count);
      const F32 high_value = steps_of_4_bits(pairs >> 4) * load(scale + half + first, upper_count);
      low = rank ? low + low_value : low_value;
      high = rank ? high + high_value : high_value;
    }
    store_sum<tame>(out + first, low, count);
    store_sum<tame>(out + half + first, high, upper_count);
  };
  size_t first = 0;
  for (; first + kLanes <= num_coded - half; first += kLanes) body(first, kLanes, kLanes);
  if (first < half) body(first, half - first, num_coded - half - first);
}

template <bool tame, class T>
NARROWCAST_INLINE void sum_row_of_4_bits(const Format& format, const Payloads& payloads, size_t row, T* out) {
  if (payloads.num_ranks == 2) sum_4_bits<tame>(format, payloads, row, [] { return 2; }, out);
  else if (payloads.num_ranks == 1) sum_4_bits<tame>(format, payloads, row, [] { return 1; }, out);
  else sum_4_bits<tame>(format, payloads, row, [&] { return payloads.num_ranks; }, out);
}

template <class T>
NARROWCAST_INLINE void sum_row_of_codes(const Format& format, const Payloads& payloads, size_t row,
                                        const Scratch& scratch, T* out) {
  const size_t num_coded = format.num_features - format.num_outliers;
  bool marked = false;
  for (size_t rank = 0; rank < payloads.num_ranks; ++rank) {
    uint8_t* codes = scratch.codes + rank * scratch.codes_stride;
    unpack(payloads.row(rank, row) + 2 * format.num_outliers, num_coded, format.num_bits, codes);
    marked |= has_zero(codes, num_coded);
  }
  if (format.tame && !marked) sum_coded<true>(format, payloads, scratch, out);
  else sum_coded<false>(format, payloads, scratch, out);
}

template <class T>
NARROWCAST_FLAT void feature_sum_plain_row(const Format& format, const Payloads& payloads, size_t row,
                                           const Scratch& scratch, T* out) {
  const size_t num_outliers = format.num_outliers;
  if (format.num_bits != 4) sum_row_of_codes(format, payloads, row, scratch, out);
  else if (format.tame) sum_row_of_4_bits<true>(format, payloads, row, out);
  else sum_row_of_4_bits<false>(format, payloads, row, out);
  for (size_t i = 0; i < format.num_holes; ++i) out[format.fillers[i]] = out[format.holes[i]];
  T* totals = reinterpret_cast<T*>(scratch.spare);
  cast_decode_sum_row(static_cast<const Bf16*>(nullptr), payloads, row, num_outliers, totals);
  for (size_t i = 0; i < num_outliers; ++i) out[format.outliers[i]] = totals[i];
}

NARROWCAST_INLINE bool is_marked(const uint8_t* payload) { return (payload[0] | payload[1] << 8) == kGuardMark; }

// A row that bears the guard's mark for some of the ranks: one after the other, the slow way. `out` may be
// `scratch.values`: it is written last.
template <class T>
NARROWCAST_FLAT void feature_sum_guarded_row(const Format& format, const Payloads& payloads, size_t row,
                                             const Scratch& scratch, T* out) {
  const Format guard = guard_format(format);
  const size_t num_features = format.num_features;
  float *total = scratch.total, *values = scratch.values;
  for (size_t rank = 0; rank < payloads.num_ranks; ++rank) {
    uint8_t* payload = const_cast<uint8_t*>(payloads.row(rank, row));
    const bool marked = is_marked(payload);
    const Payloads own = {{marked ? payload + 2 : payload, 0}, 0, 1, payloads.first_source + rank};
    if (!marked) feature_sum_plain_row(format, own, 0, scratch, values);
    else if (format.guard_bits) group_decode_sum_row(guard, own, 0, scratch, values, num_features);
    else for_each_vector(num_features, [&](size_t i, size_t) { store_vector(values + i, nan_vector()); });
    for_each_vector(num_features, [&](size_t i, size_t) {
      const F32 value = load(values + i);
      store_vector(total + i, rank ? load(total + i) + value : value);
    });
  }
  for_each_vector(num_features, [&](size_t i, size_t count) { store(out + i, load(total + i), count); });
}

template <class T>
NARROWCAST_INLINE void feature_decode_sum_row(const Format& format, const Payloads& payloads, size_t row,
                                              const Scratch& scratch, T* out) {
  bool any_marked = false;
  for (size_t rank = 0; format.num_outliers && rank < payloads.num_ranks; ++rank) {
    any_marked |= is_marked(payloads.row(rank, row));
  }
  if (any_marked) feature_sum_guarded_row(format, payloads, row, scratch, out);
  else feature_sum_plain_row(format, payloads, row, scratch, out);
}

}  // namespace NARROWCAST_PATH
}  // namespace narrowcast
