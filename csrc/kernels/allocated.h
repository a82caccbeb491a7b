// `allocated`: blocks of 32 features of 0 to 8 bits or in BF16, static scales and one for each token.
#pragma once

#include "cast.h"
#include "group.h"

namespace narrowcast {
namespace NARROWCAST_PATH {

constexpr size_t kBlock = 32;
constexpr int kAsBf16 = 16;
constexpr uint8_t kLargestScale = 253, kGuarded = 254, kNotFinite = 255;  // codes of token scales; 0 is zero
constexpr size_t kMostEscapes = 15, kEscapeNbytes = 4;
constexpr uint16_t kNoFeature = 0xFFFF;
constexpr float kReach = 8.0f, kLargestBf16 = 0x1.FEp127f;
constexpr size_t kLevels = 512, kSubset = 128, kPlaces = 2048, kFirst = 8;  // rows of LevelTables
constexpr float kBeyondEdges = 7.5f, kZero = 8.0f, kPlacesOfOne = 128.0f;  // all edges lie below the first; `up_to`
constexpr size_t kTrellisLanes = 16, kSubsets = 4, kStates = 4, kSets = kTrellisLanes / kLanes;  // codecs/trellis.py

constexpr size_t block_nbytes(int width) { return kBlock / 8 * size_t(width); }

template <int number>
struct Constant {
  static constexpr int value = number;
};

// The parameters of one source.
struct Source {
  const float *scale, *reciprocal;
  const uint16_t *order, *slots;
  const uint8_t* widths;
  size_t num_bf16 = 0, num_sent;  // blocks; those in BF16 come first
  float one_over_count = 0;       // of the values that have part in the token's scale

  Source(const Format& format, size_t source)
      : scale(format.scale + source * format.num_blocks * kBlock),
        reciprocal(format.reciprocal + source * format.num_features),
        order(format.order + source * format.num_blocks * kBlock),
        slots(format.slots + source * format.num_blocks * kBlock),
        widths(format.widths + source * format.num_blocks) {
    while (num_bf16 < format.num_blocks && widths[num_bf16] == kAsBf16) ++num_bf16;
    num_sent = num_bf16;
    while (num_sent < format.num_blocks && widths[num_sent]) ++num_sent;
    const size_t end = num_sent * kBlock, last = end < format.num_features ? end : format.num_features;
    if (num_sent > num_bf16) one_over_count = 1.0f / float(last - num_bf16 * kBlock);
  }
};

// Calls `body(width, first, end, bytes)` for each run of coded blocks of one width, its width a constant, as far as
// blocks end within `nbytes` from `bytes` on. Returns their end.
template <class Byte, class Body>
NARROWCAST_INLINE Byte* for_each_run(const Source& source, Byte* bytes, size_t nbytes, Body body) {
  size_t first = source.num_bf16;
  while (first < source.num_sent) {
    const int width = source.widths[first];
    size_t end = first, fits = nbytes / block_nbytes(width);
    for (; end < source.num_sent && source.widths[end] == width && fits; --fits) ++end;
    if (end == first) break;
    switch (width) {
      case 1: body(Constant<1>{}, first, end, bytes); break;
      case 2: body(Constant<2>{}, first, end, bytes); break;
      case 3: body(Constant<3>{}, first, end, bytes); break;
      case 4: body(Constant<4>{}, first, end, bytes); break;
      case 5: body(Constant<5>{}, first, end, bytes); break;
      case 6: body(Constant<6>{}, first, end, bytes); break;
      case 7: body(Constant<7>{}, first, end, bytes); break;
      default: body(Constant<8>{}, first, end, bytes); break;
    }
    const size_t used = (end - first) * block_nbytes(width);
    bytes += used;
    nbytes -= used;
    first = end;
  }
  return bytes;
}

// --- Packing of a block: the planes of pack.h, which are whole words of 32 codes -----------------------------------

struct Words {
  uint64_t part[4];  // a byte for each code
};

// Bits [low, low + width) of the codes, from their lowest up where there are others above.
template <int low, int width>
NARROWCAST_INLINE uint8_t* pack_plane(const Words& codes, uint8_t* out) {
  constexpr uint64_t kMask = 0x0101010101010101u * ((1u << width) - 1);
  uint64_t piece[4];
  for (int i = 0; i < 4; ++i) piece[i] = codes.part[i] >> low & kMask;
  if (width == 8) {
    memcpy(out, piece, 32);
  } else if (width == 4) {
    const uint64_t packed[2] = {piece[0] | piece[2] << 4, piece[1] | piece[3] << 4};
    memcpy(out, packed, 16);
  } else {
    const uint64_t packed = piece[0] | piece[1] << 2 | piece[2] << 4 | piece[3] << 6;
    if (width == 2) {
      memcpy(out, &packed, 8);
    } else {
      const uint32_t halves = uint32_t(packed) | uint32_t(packed >> 32) << 1;
      memcpy(out, &halves, 4);
    }
  }
  return out + 4 * width;
}

template <int low, int width>
NARROWCAST_INLINE const uint8_t* unpack_plane(const uint8_t* packed, Words& codes) {
  constexpr uint64_t kMask = 0x0101010101010101u * ((1u << width) - 1);
  uint64_t words[4];
  if (width == 8) {
    memcpy(words, packed, 32);
  } else if (width == 4) {
    memcpy(words, packed, 16);
    words[2] = words[0] >> 4;
    words[3] = words[1] >> 4;
  } else {
    if (width == 2) {
      memcpy(words, packed, 8);
    } else {
      uint32_t halves;
      memcpy(&halves, packed, 4);
      words[0] = halves | uint64_t(halves) >> 1 << 32;
    }
    for (int i = 3; i >= 0; --i) words[i] = words[0] >> 2 * i;
  }
  for (int i = 0; i < 4; ++i) codes.part[i] |= (words[i] & kMask) << low;
  return packed + 4 * width;
}

template <int width>
NARROWCAST_INLINE void pack_block(const uint8_t* from, uint8_t* out) {
  const Words codes = load_vector<Words>(from);
  if (width == 8) out = pack_plane<0, 8>(codes, out);
  if (width < 8 && width & 4) out = pack_plane<0, 4>(codes, out);
  if (width < 8 && width & 2) out = pack_plane<width & 4, 2>(codes, out);
  if (width < 8 && width & 1) pack_plane<width & 6, 1>(codes, out);
}

template <int width>
NARROWCAST_INLINE void unpack_block(const uint8_t* packed, uint8_t* to) {
  Words codes = {};
  if (width == 8) packed = unpack_plane<0, 8>(packed, codes);
  if (width < 8 && width & 4) packed = unpack_plane<0, 4>(packed, codes);
  if (width < 8 && width & 2) packed = unpack_plane<width & 4, 2>(packed, codes);
  if (width < 8 && width & 1) unpack_plane<width & 6, 1>(packed, codes);
  store_vector(to, codes);
}

// --- Encoding --------------------------------------------------------------------------------------------------------

// Values over their scales, by feature, a zero behind them. Returns the largest magnitude; NaN or infinity if a value
// is not finite, or if it is too large.
template <class T>
NARROWCAST_INLINE float scale_values(const T* x, const float* reciprocal, size_t num_features, float* scaled) {
  I32 largest = {};
  for_each_vector(num_features, [&](size_t first, size_t count) {
    prefetch<kLanes * sizeof(T)>(x + first);
    const F32 value = load(x + first, count) * load(reciprocal + first, count);
    store_vector(scaled + first, value);
    largest = max(largest, bits_as<I32>(magnitude(value)));
  });
  scaled[num_features] = 0.0f;
  int32_t most = 0;
  for (size_t lane = 0; lane < kLanes; ++lane) most = largest[lane] > most ? largest[lane] : most;
  return bits_as<float>(most);
}

NARROWCAST_INLINE int64_t count_beyond(const float* scaled, size_t num_features, float limit) {
  I32 found = {};
  for_each_vector(num_features,
                  [&](size_t first, size_t count) { found -= magnitude(load(scaled + first, count)) > limit; });
  return sum(found);
}

// Brings the values to their slots. Returns their mean square, in the order that codecs/token_scale.py states.
NARROWCAST_INLINE float place_values(const float* scaled, const Source& source, float* slots) {
  constexpr size_t kParts = kBlock / kLanes;
  if (source.num_sent == source.num_bf16) return 1.0f;
  F32 parts[kParts] = {};
  for (size_t first = source.num_bf16 * kBlock; first < source.num_sent * kBlock; first += kBlock) {
#pragma GCC unroll 8
    for (size_t i = 0; i < kParts; ++i) {
      const F32 value = gather(scaled, source.order + first + i * kLanes);
      store_vector(slots + first + i * kLanes, value);
      parts[i] = parts[i] + value * value;
    }
  }
  float sums[kBlock];
  memcpy(sums, parts, sizeof sums);
  for (size_t half = kBlock / 2; half; half /= 2) {
    for (size_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0] * source.one_over_count;
}

NARROWCAST_INLINE uint8_t scale_code(const LevelTables& tables, float mean_square) {
  if (mean_square == 0.0f) return 0;
  I32 num_edges = {};
  for (size_t i = 0; i < 256; i += kLanes) num_edges -= load(tables.scale_edges + i) <= mean_square;
  return uint8_t(1 + sum(num_edges));
}

// The nearest levels to some values in each subset, and their places there: a byte each, subset 0 in the lowest.
struct Nearest {
  F32 level[kSubsets];
  I32 places;
};

// Each subset has a level or two.
template <int width>
NARROWCAST_INLINE Nearest compare(const LevelTables& tables, size_t row, F32 value) {
  const float *edges = tables.edges + row * kLevels, *levels = tables.by_subset + row * kSubsets * kSubset;
  Nearest found = {};
#pragma GCC unroll 4
  for (size_t subset = 0; subset < kSubsets; ++subset) {
    found.level[subset] = splat(levels[subset * kSubset]);
    if (width == 1) continue;
    const I32 is_above = value >= splat(edges[subset]);
    found.level[subset] = select(is_above, splat(levels[subset * kSubset + 1]), found.level[subset]);
    found.places |= is_above & int32_t(1u << 8 * subset);
  }
  return found;
}

// By bisection, the look-ups within registers. Subset s has (count + 3 - s) / 4 of `count` edges.
template <int width>
NARROWCAST_INLINE Nearest bisect(const LevelTables& tables, size_t row, F32 value) {
  const float* edges = tables.bisected + row * kLevels;
  I32 count = {};
#pragma GCC unroll 8
  for (int depth = 0; depth <= width; ++depth) {
    F32 edge;  // the first 2**depth - 1 are of depths before
    switch (depth) {
      case 0: edge = splat(edges[0]); break;
      case 1: edge = look_up<1>(edges + 1, count); break;
      case 2: edge = look_up<2>(edges + 3, count); break;
      case 3: edge = look_up<3>(edges + 7, count); break;
      case 4: edge = look_up<4>(edges + 15, count); break;
      case 5: edge = look_up<5>(edges + 31, count); break;
      default: edge = look_up<6>(edges + 63, count); break;
    }
    count = count + count - (value >= edge);
  }
  count |= count << 8;
  count |= count << 16;
  Nearest found;
  found.places = ((count + 0x00010203) >> 2) & 0x3F3F3F3F;
#pragma GCC unroll 4
  for (size_t subset = 0; subset < kSubsets; ++subset) {
    const I32 place = bits_as<I32>(bits_as<U32>(found.places) >> int(8 * subset));
    found.level[subset] = look_up<width - 1>(tables.by_subset + (row * kSubsets + subset) * kSubset, place);
  }
  return found;
}

// Lane by lane, from the place of each value on a grid.
template <int width>
NARROWCAST_INLINE Nearest look_around(const LevelTables& tables, size_t row, F32 value) {
  constexpr float kUnit = float(1 << width), kLimit = kBeyondEdges * kUnit;
  const F32 limited = min(max(value, splat(-kLimit)), splat(kLimit));
  const I32 places = __builtin_convertvector((limited + kZero * kUnit) * (kPlacesOfOne / kUnit), I32);
  const float* edges = tables.edges + row * kLevels;
  const uint16_t* up_to = tables.up_to + row * kPlaces;
  Nearest found;
  for (size_t lane = 0; lane < kLanes; ++lane) {
    int32_t count = up_to[places[lane]];  // at most two edges more are not above the value
    count += limited[lane] >= edges[count];
    count += limited[lane] >= edges[count];
    const float* nearest = tables.nearest + (row * kLevels + size_t(count)) * kSubsets;
    uint32_t packed = 0;
    for (size_t subset = 0; subset < kSubsets; ++subset) {
      found.level[subset][lane] = nearest[subset];
      packed |= uint32_t(count + 3 - int(subset)) >> 2 << (8 * subset);
    }
    found.places[lane] = int32_t(packed);
  }
  return found;
}

template <int width>
NARROWCAST_INLINE Nearest find_nearest(const LevelTables& tables, size_t row, F32 value) {
  if constexpr (width <= 2) return compare<width>(tables, row, value);
  else if constexpr (width <= kRegisterBits) return bisect<width>(tables, row, value);
  else return look_around<width>(tables, row, value);
}

// What the best paths to each state cost, by lane.
struct Paths {
  F32 cost[kSets][kStates];

  Paths() {
    for (size_t set = 0; set < kSets; ++set) {
      for (size_t state = 0; state < kStates; ++state) cost[set][state] = splat(state ? __builtin_inff() : 0.0f);
    }
  }
};

// Goes on along values of one width, and leaves in each one's slot its place in every subset (a byte each), and in the
// highest bits of these which way the best path to each state came. `first_row`: 0, or kFirst.
template <int width>
NARROWCAST_INLINE void extend_paths(const LevelTables& tables, size_t first_row, F32 reciprocal, float* slots,
                                    size_t count, Paths& paths) {
  const size_t row = first_row + size_t(width - 1);
  reciprocal *= float(1 << width);  // of what is left at this width, the unit of errors
  for (size_t set = 0; set < kSets; ++set) {
    F32 cost[kStates];
    for (size_t state = 0; state < kStates; ++state) cost[state] = paths.cost[set][state];
    for (size_t slot = set * kLanes; slot < count; slot += kTrellisLanes) {
      const F32 value = load(slots + slot) * reciprocal;
      const Nearest found = find_nearest<width>(tables, row, value);
      I32 word = found.places;
      F32 missed[kSubsets], next[kStates];
      for (size_t subset = 0; subset < kSubsets; ++subset) {
        missed[subset] = (value - found.level[subset]) * (value - found.level[subset]);
      }
#pragma GCC unroll 4
      for (size_t state = 0; state < kStates; ++state) {
        const size_t bit = state / 2, before = state % 2;
        const F32 one = cost[2 * before] + missed[2 * bit + before];
        const F32 other = cost[2 * before + 1] + missed[2 * (1 - bit) + before];
        word |= (other < one) & int32_t(0x80u << 8 * state);
        next[state] = min(other, one);
      }
      for (size_t state = 0; state < kStates; ++state) cost[state] = next[state];
      store_vector(slots + slot, word);
    }
    for (size_t state = 0; state < kStates; ++state) paths.cost[set][state] = cost[state];
  }
}

// Codes of blocks [first, end) along the best paths, from what `extend_paths` has left.
NARROWCAST_INLINE void trace_back(const Source& source, const float* slots, size_t first, size_t end,
                                  const Paths& paths, uint8_t* codes) {
  I32 states[kSets];
  for (size_t set = 0; set < kSets; ++set) {
    F32 best = paths.cost[set][0];
    states[set] = I32{};
    for (int state = 1; state < int(kStates); ++state) {
      const F32 cost = paths.cost[set][state];
      states[set] = cost < best ? splat_i32(state) : states[set];
      best = min(cost, best);
    }
  }
  for (size_t block = end; block-- > first;) {
    const int width = source.widths[block];
#pragma GCC unroll 8
    for (size_t i = kBlock / kLanes; i-- > 0;) {
      const size_t slot = block * kBlock + i * kLanes;
      const U32 word = load_vector<U32>(slots + slot), state = bits_as<U32>(states[i % kSets]);
      const U32 bit = state >> 1, before = state & 1, way = word >> (8 * state + 7) & 1;
      const U32 index = word >> (8 * (((bit ^ way) << 1) + before)) & 0x7F;
      store_bytes(codes + slot, low_8_bits(bits_as<I32>(index | bit << (width - 1))));
      states[i % kSets] = bits_as<I32>((before << 1) + way);
    }
  }
}

// Writes the coded blocks that fit into `nbytes`, whose slots it uses up; returns their end.
NARROWCAST_FLAT uint8_t* write_coded(const Format& format, const Source& source, float* slots, uint8_t code,
                                     uint8_t* codes, uint8_t* out, size_t nbytes) {
  const F32 reciprocal = splat(format.tables.token_reciprocal[code]);
  Paths paths;
  size_t num_written = source.num_bf16;
  for_each_run(source, out, nbytes, [&](auto width, size_t first, size_t end, uint8_t*) {
    constexpr int kWidth = decltype(width)::value;
    const size_t num_first = first == source.num_bf16 ? kTrellisLanes : 0;
    float* const own = slots + first * kBlock;
    extend_paths<kWidth>(format.tables, kFirst, reciprocal, own, num_first, paths);
    extend_paths<kWidth>(format.tables, 0, reciprocal, own + num_first, (end - first) * kBlock - num_first, paths);
    num_written = end;
  });
  trace_back(source, slots, source.num_bf16, num_written, paths, codes);
  return for_each_run(source, out, nbytes, [&](auto width, size_t first, size_t end, uint8_t* to) {
    constexpr int kWidth = decltype(width)::value;
    for (size_t block = first; block < end; ++block, to += block_nbytes(kWidth)) {
      pack_block<kWidth>(codes + block * kBlock, to);
    }
  });
}

// Writes blocks, as many as fit into `nbytes`, and zeros behind them.
template <class T>
NARROWCAST_INLINE void write_blocks(const T* x, const Format& format, const Source& source, uint8_t code,
                                    const Scratch& scratch, uint8_t* out, size_t nbytes) {
  uint8_t* const end = out + nbytes;
  size_t block = 0;
  for (; block < source.num_bf16 && size_t(end - out) >= block_nbytes(kAsBf16); ++block) {
    const size_t first = block * kBlock, left = format.num_features - first, count = left < kBlock ? left : kBlock;
    T values[kBlock] = {};
    for (size_t i = 0; i < count; ++i) values[i] = x[source.order[first + i]];
    for (size_t i = 0; i < kBlock; i += kLanes) {
      store_finite_of(values, reinterpret_cast<Bf16*>(out) + i, load(values + i), kLanes);
    }
    out += block_nbytes(kAsBf16);
  }
  if (block == source.num_bf16) {
    out = write_coded(format, source, scratch.total, code, scratch.codes, out, size_t(end - out));
  }
  memset(out, 0, size_t(end - out));
}

// Takes the farthest values beyond `limit` out, of equals the first, and writes them as they are.
template <class T>
NARROWCAST_INLINE void write_escapes(const T* x, size_t num_features, size_t num_escapes, float limit, float* scaled,
                                     uint8_t* out) {
  uint16_t features[kMostEscapes];
  float farness[kMostEscapes], values[kMostEscapes + kScratchSlack / sizeof(float)] = {};
  size_t count = 0;
  for (size_t feature = 0; feature < num_features; ++feature) {
    const float far = scaled[feature] < 0.0f ? -scaled[feature] : scaled[feature];
    if (!(far > limit) || (count == num_escapes && !(far > farness[count - 1]))) continue;
    size_t place = count < num_escapes ? count++ : count - 1;
    for (; place && farness[place - 1] < far; --place) {
      farness[place] = farness[place - 1];
      features[place] = features[place - 1];
    }
    farness[place] = far;
    features[place] = uint16_t(feature);
  }
  for (size_t i = 0; i < count; ++i) {
    scaled[features[i]] = 0.0f;
    const float value = load(x + features[i], 1)[0];
    values[i] = value > kLargestBf16 ? kLargestBf16 : value < -kLargestBf16 ? -kLargestBf16 : value;
  }
  for (size_t i = count; i < num_escapes; ++i) features[i] = kNoFeature;
  memcpy(out, features, 2 * num_escapes);
  for_each_vector(num_escapes, [&](size_t first, size_t left) {
    store(reinterpret_cast<Bf16*>(out + 2 * num_escapes) + first, load(values + first), left);
  });
}

template <class T>
NARROWCAST_INLINE void allocated_encode_row(const T* x, const Format& format, const Source& source, Counts& counts,
                                            const Scratch& scratch, uint8_t* payload) {
  const size_t num_features = format.num_features, num_escapes = format.num_escapes;
  float *scaled = scratch.spare, *slots = scratch.total;
  uint8_t* const end = payload + format.row_nbytes;
  const float largest = scale_values(x, source.reciprocal, num_features, scaled);
  if (!(largest < __builtin_inff())) {
    const int64_t num_bad = count_not_finite(x, num_features);
    counts.non_finite += num_bad;
    if (num_bad) {
      payload[0] = kNotFinite;
      memset(payload + 1, 0, format.row_nbytes - 1);
      return;
    }
  }
  uint8_t code = scale_code(format.tables, place_values(scaled, source, slots));
  const float limit = kReach * format.tables.token_scale[code];
  if (largest > limit) {
    if (num_escapes) {
      write_escapes(x, num_features, num_escapes, limit, scaled, payload + 2);
      code = scale_code(format.tables, place_values(scaled, source, slots));
      *payload++ = kGuarded;
      ++counts.guarded;
    }
    counts.saturated += count_beyond(scaled, num_features, kReach * format.tables.token_scale[code]);
  }
  *payload++ = code;
  if (largest > limit) payload += kEscapeNbytes * num_escapes;
  write_blocks(x, format, source, code, scratch, payload, size_t(end - payload));
}

template <class T>
NARROWCAST_FLAT void allocated_encode_rows(const T*, const Format& format, const Rows& x, size_t source,
                                           const Payload& out, Counts& counts, const Scratch& scratch, size_t begin,
                                           size_t end) {
  const Source own(format, source);
  for (size_t row = begin; row < end; ++row) {
    allocated_encode_row(static_cast<const T*>(x.row(row)), format, own, counts, scratch, out.row(row));
  }
}

// --- Decoding --------------------------------------------------------------------------------------------------------

// levels[index] of 2**(width + 1) symmetric ones.
template <int width>
NARROWCAST_INLINE F32 level_of(const float* levels, I32 index) {
  if (width != kRegisterBits) return look_up<width + 1>(levels, index);
  const I32 place = index - (1 << width), negative = place >> 31;  // half of them are as many as registers hold
  const F32 level = look_up<width>(levels + (1 << width), place ^ negative);
  return bits_as<F32>(bits_as<I32>(level) ^ (negative & int32_t(~kMagnitude)));
}

// The values of the blocks that end within `nbytes`, by slot, and zeros in all slots behind them.
NARROWCAST_FLAT void decode_blocks(const Format& format, const Source& source, const uint8_t* bytes, size_t nbytes,
                                   float token_scale, uint8_t* codes, float* slots) {
  float *const all = slots + format.num_blocks * kBlock, *to = slots;
  size_t block = 0;
  for (; block < source.num_bf16 && nbytes >= block_nbytes(kAsBf16); ++block, nbytes -= block_nbytes(kAsBf16)) {
    for (size_t i = 0; i < kBlock; i += kLanes) {
      store_vector(to + i, load(reinterpret_cast<const Bf16*>(bytes) + i));
    }
    to += kBlock;
    bytes += block_nbytes(kAsBf16);
  }
  if (block < source.num_bf16) nbytes = 0;
  I32 before[kSets] = {}, ahead[kSets] = {};  // bits of the path, one and two values ago
  for_each_run(source, bytes, nbytes, [&](auto width, size_t first, size_t end, const uint8_t* from) {
    constexpr int kWidth = decltype(width)::value;
    for (size_t each = first; each < end; ++each, from += block_nbytes(kWidth)) {
      unpack_block<kWidth>(from, codes + each * kBlock);
    }
    to = slots + end * kBlock;
    for (size_t slot = first * kBlock; slot < end * kBlock; slot += kTrellisLanes) {
      const size_t first_row = slot == source.num_bf16 * kBlock ? kFirst : 0;
      const float* levels = format.tables.levels + (first_row + kWidth - 1) * kLevels;
#pragma GCC unroll 4
      for (size_t set = 0; set < kSets; ++set) {
        const I32 code = widen(load_vector<U8>(codes + slot + set * kLanes)), bit = code >> (kWidth - 1);
        const I32 subset = ((bit ^ ahead[set]) << 1) + before[set];
        const F32 level = level_of<kWidth>(levels, ((code & ((1 << (kWidth - 1)) - 1)) << 2) + subset);
        ahead[set] = before[set];
        before[set] = bit;
        const F32 scale = load(source.scale + slot + set * kLanes);
        store_vector(slots + slot + set * kLanes, level * scale * token_scale);
      }
    }
  });
  memset(to, 0, size_t(all - to) * sizeof(float));
}

// What one rank's row stands for, by slot.
NARROWCAST_INLINE void decode_rank(const Format& format, const Source& source, const uint8_t* payload,
                                   uint8_t* codes, float* slots) {
  const uint8_t *const end = payload + format.row_nbytes, *escapes = payload + 2;
  const bool is_guarded = payload[0] == kGuarded && format.num_escapes;
  const uint8_t code = payload[is_guarded];
  const uint8_t* blocks = is_guarded ? escapes + kEscapeNbytes * format.num_escapes : payload + 1;
  if (code <= kLargestScale) {
    decode_blocks(format, source, blocks, size_t(end - blocks), format.tables.token_scale[code], codes, slots);
  } else {
    for (size_t slot = 0; slot < format.num_blocks * kBlock; slot += kLanes) store_vector(slots + slot, nan_vector());
  }
  if (!is_guarded) return;
  for (size_t i = 0; i < 2 * format.num_escapes; i += 2) {
    const size_t feature = escapes[i] | escapes[i + 1] << 8;
    const uint8_t* value = escapes + 2 * format.num_escapes + i;
    if (feature < format.num_features) {
      slots[source.slots[feature]] = bits_as<float>(uint32_t(value[0] | value[1] << 8) << 16);
    }
  }
}

// Sums are by slot until they are stored if all sources have the same slots, otherwise by feature.
template <class T>
NARROWCAST_FLAT void allocated_decode_sum_row(const Format& format, const Payloads& payloads, size_t row,
                                              const Scratch& scratch, T* out) {
  float *values = scratch.spare, *total = scratch.total;
  const size_t num_slots = format.num_blocks * kBlock;
  const bool by_slot = format.same_order || payloads.num_ranks == 1;
  for (size_t rank = 0; rank < payloads.num_ranks; ++rank) {
    const Source source(format, payloads.first_source + rank);
    decode_rank(format, source, payloads.row(rank, row), scratch.codes, values);
    for (size_t i = 0; i < num_slots; i += kLanes) {
      const F32 value = by_slot ? load(values + i) : gather(values, source.slots + i);
      store_vector(total + i, (rank ? load(total + i) : F32{}) + value);
    }
  }
  const Source last(format, payloads.first_source + payloads.num_ranks - 1);
  for_each_vector(format.num_features, [&](size_t i, size_t count) {
    store(out + i, by_slot ? gather(total, last.slots + i) : load(total + i), count);
  });
}

}  // namespace NARROWCAST_PATH
}  // namespace narrowcast
