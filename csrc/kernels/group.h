// `group`: integers with parameters for each group of features, found anew in every token.
#pragma once

#include "pack.h"
#include "values.h"

namespace narrowcast {
namespace NARROWCAST_PATH {

constexpr size_t kLargestGroup = 128;

// Where a row's parameters are; codes follow.
struct GroupLayout {
  size_t num_groups, size;
  size_t zeros, spikes, places, codes;  // bytes from the start

  GroupLayout(const Format& format, size_t num_features)
      : num_groups((num_features + format.group_size - 1) / format.group_size),
        size(format.group_size),
        zeros(2 * num_groups),
        spikes(format.symmetric ? zeros : zeros + 2 * num_groups),
        places(format.spikes ? spikes + 4 * num_groups : spikes),
        codes(format.spikes ? places + 2 * num_groups : places) {}
};

NARROWCAST_INLINE Bf16* bf16_at(uint8_t* payload, size_t offset) { return reinterpret_cast<Bf16*>(payload + offset); }
NARROWCAST_INLINE const Bf16* bf16_at(const uint8_t* payload, size_t offset) {
  return reinterpret_cast<const Bf16*>(payload + offset);
}

// Calls `body(group, first, count)` for each group of a row.
template <class Body>
NARROWCAST_INLINE void for_each_group(size_t num_features, size_t group_size, Body body) {
  size_t group = 0, first = 0;
  for (; first + group_size <= num_features; ++group, first += group_size) body(group, first, group_size);
  if (first < num_features) body(group, first, num_features - first);
}

// Numbers for each group, in the scratch.
struct GroupNumbers {
  float *low, *high;        // of the values that are coded; low is NaN if a value of the group is not finite
  float *reciprocal, *zero;  // what codes are found with; the reciprocal is NaN if the group cannot be coded
  float* spikes[2];

  explicit GroupNumbers(const Scratch& scratch)
      : low(scratch.group_row(0)),
        high(scratch.group_row(1)),
        reciprocal(scratch.group_row(2)),
        zero(scratch.group_row(3)),
        spikes{scratch.group_row(4), scratch.group_row(5)} {}
};

struct Range {
  F32 low = splat(__builtin_inff()), high = splat(-__builtin_inff());
  F32 strange = {};  // NaN where a value was not finite
};

// NaN changes neither end.
NARROWCAST_INLINE void widen(Range& range, F32 value) {
  range.low = min(value, range.low);
  range.high = max(value, range.high);
  range.strange += value - value;
}

template <class T>
NARROWCAST_INLINE Range range_of(const T* x, size_t count) {
  Range range;
  for_each_vector(count, [&](size_t first, size_t left) { widen(range, load_repeated(x + first, left)); });
  return range;
}

// Returns whether all values are finite.
template <class T>
NARROWCAST_INLINE bool find_range(const T* x, size_t count, float& low, float& high) {
  const Range range = range_of(x, count);
  const bool finite = !any(range.strange != range.strange);
  low = finite ? smallest(range.low) : bits_as<float>(kNan);
  high = largest(range.high);
  return finite;
}

NARROWCAST_INLINE size_t place_of(const float* values, float wanted) {
  size_t place = 0;
  while (values[place] != wanted) ++place;
  return place;
}

NARROWCAST_INLINE size_t place_of_nan(const float* values, size_t count) {
  size_t place = 0;
  while (place < count && values[place] == values[place]) ++place;
  return place;
}

// The smallest and the largest value with their places, of equals the first; NaN is both. Then the range of the rest.
template <class T>
NARROWCAST_INLINE bool find_spikes(const T* x, size_t count, float& low, float& high, float& smallest_value,
                                   float& largest_value, uint8_t& smallest_place, uint8_t& largest_place) {
  float values[kLargestGroup + kLanes];
  for_each_vector(count, [&](size_t first, size_t left) { store_vector(values + first, load(x + first, left)); });
  const Range range = range_of(values, count);
  const bool finite = !any(range.strange != range.strange);
  const size_t nan = finite ? count : place_of_nan(values, count);
  const size_t places[2] = {nan < count ? nan : place_of(values, smallest(range.low)),
                            nan < count ? nan : place_of(values, largest(range.high))};
  smallest_place = uint8_t(places[0]);
  largest_place = uint8_t(places[1]);
  smallest_value = values[places[0]];
  largest_value = values[places[1]];
  for (size_t place : places) values[place] = bits_as<float>(kNan);
  for (size_t place = count; place % kLanes; ++place) values[place] = bits_as<float>(kNan);
  Range rest;
  for (size_t first = 0; first < count; first += kLanes) widen(rest, load(values + first));
  low = smallest(rest.low);
  high = largest(rest.high);
  if (low > high) low = high = 0.0f;  // nothing is left
  return finite;
}

// Parameters of all groups of a row, from their ranges; they are written, and what codes are found with is kept.
NARROWCAST_INLINE void fit_groups(const Format& format, const GroupLayout& layout, const GroupNumbers& numbers,
                                  uint8_t* payload) {
  const float num_steps = float(format.symmetric ? 1 << (format.num_bits - 1) : (1 << format.num_bits) - 1);
  for_each_vector(layout.num_groups, [&](size_t first, size_t count) {
    const F32 low = load(numbers.low + first), high = load(numbers.high + first);
    const F32 far = select(high > -low, high, low);
    const F32 zero = format.symmetric ? F32{} : bf16_down(low + 0.0f);  // no -0.0
    const F32 span = format.symmetric ? magnitude(far) : high - zero;
    const F32 step = bf16_up(max(span / num_steps, splat(0x1p-126f)));
    I32 bad = not_finite(span) | not_finite(zero + step * num_steps);
    if (format.spikes) {
      F32 spikes[2];
      for (int side = 0; side < 2; ++side) {
        spikes[side] = from_bf16(to_bf16(load(numbers.spikes[side] + first)));
        bad |= not_finite(spikes[side]);
      }
      for (int side = 0; side < 2; ++side) {
        Bf16* to = bf16_at(payload, layout.spikes) + side * layout.num_groups;
        store_exact(to + first, select(bad, nan_vector(), spikes[side]), count);
      }
    }
    const F32 written_step = select(bad, nan_vector(), format.symmetric ? select(far > 0.0f, -step, step) : step);
    store_exact(bf16_at(payload, 0) + first, written_step, count);
    if (!format.symmetric) store_exact(bf16_at(payload, layout.zeros) + first, select(bad, nan_vector(), zero), count);
    store_vector(numbers.reciprocal + first, 1.0f / written_step);
    store_vector(numbers.zero + first, zero);
  });
}

template <bool symmetric, class T>
NARROWCAST_INLINE void code_groups(const T* values, size_t num_features, const Format& format,
                                   const GroupNumbers& numbers, uint8_t* codes, Counts& counts) {
  const int32_t offset = symmetric ? 1 << (format.num_bits - 1) : 0;
  I32 clamped = {};
  for_each_group(num_features, format.group_size, [&](size_t group, size_t start, size_t size) {
    const float reciprocal = numbers.reciprocal[group], zero = numbers.zero[group];
    if (reciprocal != reciprocal) {
      memset(codes + start, offset, size);
      return;
    }
    for_each_vector(size, [&](size_t first, size_t count) {
      first += start;
      const F32 value = load(values + first, count);
      I32 steps = round_to_i32((symmetric ? value : value - zero) * reciprocal);
      if (symmetric) {  // otherwise parameters are rounded outwards, so that nothing clips
        const I32 limited = min(max(steps, splat_i32(-offset)), splat_i32(offset - 1));
        clamped -= limited != steps;
        steps = limited + offset;
      }
      store_vector(codes + first, low_8_bits(steps));
    });
  });
  counts.saturated += sum(clamped);
}

template <class T>
NARROWCAST_INLINE int64_t count_not_finite(const T* x, size_t count) {
  I32 found = {};
  for_each_vector(count, [&](size_t first, size_t left) { found -= not_finite(load(x + first, left)); });
  return sum(found);
}

template <class T>
NARROWCAST_FLAT void group_encode_rows(const T*, const Format& format, const Rows& x, const Payload& out,
                                       Counts& counts, const Scratch& scratch, size_t begin, size_t end) {
  const GroupLayout layout(format, x.num_values);
  const GroupNumbers numbers(scratch);
  uint8_t* codes = scratch.codes;
  for (size_t row = begin; row < end; ++row) {
    const T* values = static_cast<const T*>(x.row(row));
    uint8_t* payload = out.row(row);
    uint8_t* places = payload + layout.places;
    for_each_group(x.num_values, layout.size, [&](size_t group, size_t first, size_t count) {
      float &low = numbers.low[group], &high = numbers.high[group];
      const bool finite =
          format.spikes ? find_spikes(values + first, count, low, high, numbers.spikes[0][group],
                                      numbers.spikes[1][group], places[group], places[layout.num_groups + group])
                        : find_range(values + first, count, low, high);
      if (!finite) counts.non_finite += count_not_finite(values + first, count);
    });
    fit_groups(format, layout, numbers, payload);
    if (format.symmetric) code_groups<true>(values, x.num_values, format, numbers, codes, counts);
    else code_groups<false>(values, x.num_values, format, numbers, codes, counts);
    if (format.spikes) {
      for (size_t group = 0; group < layout.num_groups; ++group) {
        codes[group * layout.size + places[group]] = 0;
        codes[group * layout.size + places[layout.num_groups + group]] = 0;
      }
    }
    memset(codes + x.num_values, 0, 8);
    pack(codes, x.num_values, format.num_bits, payload + layout.codes);
  }
}

// The values of one rank, added to those of the ranks before it, if any.
template <bool add, bool symmetric>
NARROWCAST_INLINE void sum_groups(const Format& format, const GroupLayout& layout, const uint8_t* payload,
                                  size_t num_features, const GroupNumbers& numbers, const uint8_t* codes,
                                  float* total) {
  const int32_t offset = symmetric ? 1 << (format.num_bits - 1) : 0;
  const uint8_t* places = payload + layout.places;
  for_each_group(num_features, layout.size, [&](size_t group, size_t start, size_t size) {
    const float step = numbers.reciprocal[group], zero = numbers.zero[group];
    size_t kept[2] = {};
    float before[2] = {};
    for (int side = 0; format.spikes && side < 2; ++side) {
      kept[side] = start + (places[side * layout.num_groups + group] & (layout.size - 1));
      if (add) before[side] = total[kept[side]];
    }
    for_each_vector(size, [&](size_t first, size_t) {
      first += start;
      F32 value = __builtin_convertvector(widen(load_vector<U8>(codes + first)) - offset, F32) * step;
      if (!symmetric) value = value + zero;
      store_vector(total + first, add ? load(total + first) + value : value);
    });
    for (int side = 0; format.spikes && side < 2; ++side) {
      if (kept[side] >= num_features) continue;
      const float spike = numbers.spikes[side][group];
      total[kept[side]] = add ? before[side] + spike : spike;
    }
  });
}

// Parameters in FP32; steps stand where encoding has their reciprocals.
NARROWCAST_INLINE void read_groups(const Format& format, const GroupLayout& layout, const uint8_t* payload,
                                   const GroupNumbers& numbers) {
  for_each_vector(layout.num_groups, [&](size_t first, size_t count) {
    store_vector(numbers.reciprocal + first, load(bf16_at(payload, 0) + first, count));
    if (!format.symmetric) store_vector(numbers.zero + first, load(bf16_at(payload, layout.zeros) + first, count));
    for (int side = 0; format.spikes && side < 2; ++side) {
      const Bf16* spikes = bf16_at(payload, layout.spikes) + side * layout.num_groups;
      store_vector(numbers.spikes[side] + first, load(spikes + first, count));
    }
  });
}

template <class T>
NARROWCAST_FLAT void group_decode_sum_row(const Format& format, const Payloads& payloads, size_t row,
                                          const Scratch& scratch, T* out, size_t num_features) {
  const GroupLayout layout(format, num_features);
  const GroupNumbers numbers(scratch);
  float* total = scratch.spare;
  for (size_t rank = 0; rank < payloads.num_ranks; ++rank) {
    const uint8_t* payload = payloads.row(rank, row);
    unpack(payload + layout.codes, num_features, format.num_bits, scratch.codes);
    read_groups(format, layout, payload, numbers);
    const auto sum = rank ? format.symmetric ? sum_groups<true, true> : sum_groups<true, false>
                          : format.symmetric ? sum_groups<false, true> : sum_groups<false, false>;
    sum(format, layout, payload, num_features, numbers, scratch.codes, total);
  }
  for_each_vector(num_features, [&](size_t first, size_t count) { store(out + first, load(total + first), count); });
}

}  // namespace NARROWCAST_PATH
}  // namespace narrowcast
