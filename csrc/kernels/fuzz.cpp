// Random bytes through all kernels of all paths, in heap buffers that end with their last byte. Built with sanitizers
// by tests/test_fuzz.py, it ends at the first read or write beyond a buffer: `fuzz NUM_CASES SEED`.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

#include "../decode/decode.h"
#include "fuzz.h"
#include "kernels.h"
#include "paths.h"
#include "threads.h"

using namespace narrowcast;

namespace {

size_t packed_nbytes(size_t num_codes, int num_bits) {
  size_t nbytes = 0;
  for (int width : {8, 4, 2, 1}) nbytes += num_bits & width ? (num_codes * width + 7) / 8 : 0;
  return nbytes;
}

// A format with random parameters, the tensors that it points to, and its size.
struct Case {
  Format format = {};
  size_t row_nbytes = 0;
  std::vector<Buffer<float>> floats;
  std::vector<Buffer<int64_t>> indices;
  std::vector<Buffer<uint16_t>> places;
  std::vector<Buffer<uint8_t>> bytes;
};

const int64_t* kept(Case& made, const std::vector<int64_t>& values) {
  made.indices.emplace_back(values.size());
  std::copy(values.begin(), values.end(), made.indices.back().data.get());
  return made.indices.back().data.get();
}

Case feature_case(size_t num_features, size_t num_ranks) {
  Case made;
  Format& format = made.format;
  format.kind = Kind::feature;
  format.num_bits = 2 + int(below(7));
  format.num_features = num_features;
  format.tame = coin();
  std::vector<int64_t> outliers, holes, fillers;
  const size_t odds = 1 + below(70);
  for (size_t i = 0; i < num_features; ++i) {
    if (below(odds) == 0) outliers.push_back(int64_t(i));
  }
  const size_t num_coded = num_features - outliers.size();
  size_t next = 0;
  for (size_t i = 0; i < num_features; ++i) {
    const bool is_outlier = next < outliers.size() && size_t(outliers[next]) == i;
    next += is_outlier;
    if (is_outlier && i < num_coded) holes.push_back(int64_t(i));
    if (!is_outlier && i >= num_coded) fillers.push_back(int64_t(i));
  }
  format.outliers = kept(made, outliers);
  format.holes = kept(made, holes);
  format.fillers = kept(made, fillers);
  format.num_outliers = outliers.size();
  format.num_holes = holes.size();
  for (const float** part : {&format.scale, &format.reciprocal}) {
    made.floats.emplace_back(num_ranks * num_features);
    for (size_t i = 0; i < num_ranks * num_features; ++i) made.floats.back().data[i] = std::ldexp(1.0f, int(below(9)));
    *part = made.floats.back().data.get();
  }
  made.row_nbytes = 2 * outliers.size() + packed_nbytes(num_coded, format.num_bits);
  format.guard_bits = outliers.empty() ? 0 : int(below(size_t(format.num_bits)));
  format.guard_group_size = 32 * (1 + below(4));
  const size_t num_groups = (num_features + format.guard_group_size - 1) / format.guard_group_size;
  const size_t guarded = 2 + 2 * num_groups + packed_nbytes(num_features, format.guard_bits);
  if (guarded > made.row_nbytes) format.guard_bits = 0;
  return made;
}

Case group_case(size_t num_features) {
  Case made;
  Format& format = made.format;
  format.kind = Kind::group;
  format.num_bits = 2 + int(below(7));
  format.group_size = 32 << below(3);
  format.symmetric = coin();
  format.spikes = !format.symmetric && coin();
  const size_t num_groups = (num_features + format.group_size - 1) / format.group_size;
  const size_t parameters = format.symmetric ? 2 : format.spikes ? 10 : 4;
  made.row_nbytes = parameters * num_groups + packed_nbytes(num_features, format.num_bits);
  return made;
}

Case minifloat_case(size_t num_features) {
  static constexpr Element kElements[] = {kE4m3, {8, 2, -14, 0x7B}, {6, 3, 0, 0x1F}, {6, 2, -2, 0x1F}, {4, 1, 0, 0x07}};
  static constexpr size_t kSizes[] = {0, 16, 32, 64, 128};
  Case made;
  Format& format = made.format;
  format.kind = Kind::minifloat;
  format.element = kElements[below(5)];
  format.scale_format = static_cast<ScaleFormat>(below(3));
  const bool is_bf16 = format.scale_format == ScaleFormat::bf16;
  format.group_size = is_bf16 ? kSizes[below(5)] : format.scale_format == ScaleFormat::e8m0 ? 32 : 16;
  const size_t size = format.group_size ? format.group_size : num_features;
  const size_t num_blocks = (num_features + size - 1) / size;
  made.row_nbytes = (is_bf16 ? 2 : 1) * num_blocks + (format.scale_format == ScaleFormat::e4m3 ? 2 : 0) +
                    packed_nbytes(num_features, format.element.num_bits);
  return made;
}

template <class T, class Value>
const T* filled(std::vector<Buffer<T>>& kept, size_t size, Value value) {
  kept.emplace_back(size);
  for (size_t i = 0; i < size; ++i) kept.back().data[i] = T(value(i));
  return kept.back().data.get();
}

// Tables as Python makes them, but for what the numbers are.
LevelTables level_tables(Case& made) {
  constexpr float kSpacing = 0.0078f;
  auto num_edges = [](size_t width) { return (size_t{4} << width) - 4; };  // counted from 0
  auto edge = [](size_t i, size_t count) { return kSpacing * (float(i) - float(count) / 2); };
  auto scale = [](size_t code) { return code > 0 && code < 254 ? std::exp2((float(code) - 127) / 8) : 0.0f; };
  LevelTables tables;
  tables.token_scale = filled(made.floats, 256, scale);
  tables.token_reciprocal = filled(made.floats, 256, [&](size_t i) { return scale(i) > 0 ? 1 / scale(i) : 0.0f; });
  tables.scale_edges = filled(made.floats, 256, [&](size_t i) { return i < 252 ? scale(i + 1) * scale(i + 2) : NAN; });
  tables.levels = filled(made.floats, 16 * 512, [](size_t i) { return float(i % 512); });
  tables.by_subset = filled(made.floats, 16 * 4 * 128, [](size_t i) { return float(i % 128); });
  tables.edges = filled(made.floats, 16 * 512, [&](size_t i) {
    const size_t width = i / 512 % 8, count = num_edges(width);
    return i % 512 < count ? edge(i % 512, count) * float(2 << width) : INFINITY;
  });
  tables.bisected = filled(made.floats, 16 * 512, [](size_t i) { return i % 7 ? float(i % 16) - 8 : NAN; });
  tables.nearest = filled(made.floats, 16 * 512 * 4, [](size_t i) { return float(i % 4); });
  tables.up_to = filled(made.places, 16 * 2048, [&](size_t i) {
    const size_t count = num_edges(i / 2048 % 8);
    size_t below = 0;
    while (below < count && edge(below, count) < float(i % 2048) / 128 - 8) ++below;
    return below;
  });
  return tables;
}

Case allocated_case(size_t num_features, size_t num_ranks) {
  Case made;
  Format& format = made.format;
  format.kind = Kind::allocated;
  format.num_features = num_features;
  const size_t num_blocks = format.num_blocks = (num_features + 31) / 32, num_slots = 32 * num_blocks;
  format.same_order = coin();
  std::vector<uint16_t> order, slots;
  std::vector<uint8_t> widths;
  for (size_t rank = 0; rank < num_ranks; ++rank) {
    std::vector<uint16_t> own(num_features), back(num_slots, 0);
    for (size_t i = 0; i < num_features; ++i) own[i] = uint16_t(i);
    if (!format.same_order) std::shuffle(own.begin(), own.end(), generator);
    for (size_t i = 0; i < num_features; ++i) back[own[i]] = uint16_t(i);
    own.resize(num_slots, uint16_t(num_features));
    order.insert(order.end(), own.begin(), own.end());
    slots.insert(slots.end(), back.begin(), back.end());
    std::vector<uint8_t> falling(num_blocks);
    for (uint8_t& width : falling) width = uint8_t(below(4) ? below(9) : 16);
    std::sort(falling.rbegin(), falling.rend());
    widths.insert(widths.end(), falling.begin(), falling.end());
    made.row_nbytes = std::max<size_t>(made.row_nbytes, 1 + 4 * std::accumulate(falling.begin(), falling.end(), 0));
  }
  format.row_nbytes = made.row_nbytes;
  format.num_escapes = made.row_nbytes < 10 ? 0 : std::min<size_t>(15, (made.row_nbytes - 2) / 8);
  format.order = filled(made.places, order.size(), [&](size_t i) { return order[i]; });
  format.slots = filled(made.places, slots.size(), [&](size_t i) { return slots[i]; });
  format.widths = filled(made.bytes, widths.size(), [&](size_t i) { return widths[i]; });
  auto random_scale = [](size_t) { return std::ldexp(1.0f, int(below(9))); };
  format.scale = filled(made.floats, num_ranks * num_slots, random_scale);
  format.reciprocal = filled(made.floats, num_ranks * num_features, random_scale);
  format.tables = level_tables(made);
  return made;
}

Case any_case(size_t num_features, size_t num_ranks) {
  switch (below(5)) {
    case 0: {
      Case made;
      made.format.kind = Kind::cast;
      made.format.dtype = static_cast<Dtype>(below(3));
      made.row_nbytes = num_features * (made.format.dtype == Dtype::fp32 ? 4 : 2);
      return made;
    }
    case 1: return feature_case(num_features, num_ranks);
    case 2: return group_case(num_features);
    case 3: return allocated_case(num_features, num_ranks);
    default: return minifloat_case(num_features);
  }
}

void run_case(const Kernels& path) {
  const size_t num_features = 1 + below(coin() ? 40 : 400), num_tokens = 1 + below(3), num_ranks = 1 + below(4);
  const Dtype dtype = static_cast<Dtype>(below(3));
  const size_t itemsize = dtype == Dtype::fp32 ? 4 : 2, num_values = num_tokens * num_features;
  const Case partial = any_case(num_features, num_ranks), reduced = any_case(num_features, 1);
  const ptrdiff_t stride = ptrdiff_t(partial.row_nbytes), reduced_stride = ptrdiff_t(reduced.row_nbytes);
  auto values = random_bytes<uint8_t>(num_values * itemsize);
  if (coin()) {  // finite, as the guard of `feature` leaves a row alone that is not
    for (size_t i = itemsize - 1; i < values.size; i += itemsize) values.data[i] &= 0xBF;
  }
  auto payloads = random_bytes<uint8_t>(num_ranks * num_tokens * partial.row_nbytes);
  for (size_t row = 0; partial.row_nbytes > 1 && row < num_ranks * num_tokens; ++row) {
    if (below(3)) continue;
    if (partial.format.kind == Kind::allocated) {
      payloads.data[row * partial.row_nbytes] = 254;  // what announces a guarded token there
      continue;
    }
    payloads.data[row * partial.row_nbytes] = 0xC1;  // that guard's mark
    payloads.data[row * partial.row_nbytes + 1] = 0xFF;
  }
  Buffer<uint8_t> coded(num_tokens * partial.row_nbytes), recoded(num_tokens * reduced.row_nbytes);
  auto residue = random_bytes<uint8_t>(num_values * sizeof(float));
  const Rows rows = {values.data.get(), dtype, ptrdiff_t(num_features), num_tokens, num_features};
  const Rows lost = {residue.data.get(), Dtype::fp32, ptrdiff_t(num_features), num_tokens, num_features};
  const Payloads from = {{payloads.data.get(), stride}, ptrdiff_t(num_tokens) * stride, num_ranks, 0};
  for_rows(num_tokens, 0, num_features, num_ranks, [&](size_t begin, size_t end, const Scratch& scratch) {
    Counts counts;
    path.encode(partial.format, rows, below(num_ranks), {coded.data.get(), stride}, counts, scratch, begin, end);
    path.encode_with_residue(partial.format, rows, lost, below(num_ranks), {coded.data.get(), stride}, counts, scratch,
                             begin, end);
    path.decode_sum(partial.format, from, rows, scratch, begin, end);
    const Payload out = {recoded.data.get(), reduced_stride};
    path.recode(partial.format, from, reduced.format, num_features, out, counts, scratch, begin, end);
  });
}

// Vectors of D values, densely, sequence after sequence and head after head.
Heads dense(Buffer<uint8_t>& buffer, size_t num_heads, size_t num_tokens, size_t head_dim) {
  return {buffer.data.get(), ptrdiff_t(num_heads * num_tokens * head_dim), ptrdiff_t(num_tokens * head_dim),
          ptrdiff_t(head_dim)};
}

void run_step(const Kernels& path) {
  Attention a = {};
  a.dtype = static_cast<Dtype>(below(3));
  a.num_sequences = 1 + below(2), a.num_kv_heads = 1 + below(2), a.num_heads = a.num_kv_heads * (1 + below(3));
  a.num_queries = 1 + below(4), a.head_dim = 8 * (1 + below(kMostHeadDim / 8));
  a.context = a.num_queries + below(below(4) ? 50 : 2 * kPiece);
  a.scale = 0.1f, a.softcap = coin() ? 5.0f : 0.0f, a.causal = coin();
  const size_t itemsize = a.dtype == Dtype::fp32 ? 4 : 2, turned = 2 * (1 + below(a.head_dim / 2));
  const size_t num_vectors = a.num_sequences * a.num_kv_heads * a.head_dim * itemsize;
  auto keys = random_bytes<uint8_t>(num_vectors * a.context), values = random_bytes<uint8_t>(num_vectors * a.context);
  auto new_keys = random_bytes<uint8_t>(num_vectors * a.num_queries);
  auto queries = random_bytes<uint8_t>(num_vectors * a.num_queries * a.group());
  Buffer<uint8_t> out(queries.size);
  auto turns = random_bytes<uint8_t>(a.num_queries * turned * itemsize);
  auto mask = random_bytes<uint8_t>(a.num_sequences * a.num_queries * a.context * itemsize);
  a.q = dense(queries, a.num_heads, a.num_queries, a.head_dim);
  a.out = dense(out, a.num_heads, a.num_queries, a.head_dim);
  a.k = dense(keys, a.num_kv_heads, a.context, a.head_dim), a.v = dense(values, a.num_kv_heads, a.context, a.head_dim);
  a.mask = {mask.data.get(), static_cast<MaskKind>(below(3)), a.dtype, ptrdiff_t(a.num_queries * a.context), 0,
            ptrdiff_t(a.context), 1};
  std::vector<int64_t> places, spans;
  if (coin()) {
    a.k.sequence = a.v.sequence = 0;
    for (size_t b = 0; b < a.num_sequences; ++b) {
      const size_t shortest = b ? a.num_queries : a.context;  // one is as long as all may be
      spans.push_back(int64_t(places.size()));
      for (size_t c = shortest + below(a.context - shortest + 1); c > 0; --c) places.push_back(int64_t(below(a.context)));
      spans.push_back(int64_t(places.size()));
    }
    places.shrink_to_fit();
    a.paged = {places.data(), spans.data()};
  } else if (coin()) {
    const Heads added = dense(new_keys, a.num_kv_heads, a.num_queries, a.head_dim);
    a.added = {added, added, turns.data.get(), turns.data.get(), 0, ptrdiff_t(turned), turned};
  }
  Buffer<float> scratch(a.scratch_size()), partials(a.num_units() * a.rows() * a.partial_size());
  path.attend(a, scratch.data.get(), partials.data.get(), 0, a.num_units());
  if (a.num_pieces() > 1) path.join(a, partials.data.get(), 0, a.num_sequences * a.num_kv_heads);
  const RmsNorm norm = {a.dtype, queries.data.get(), new_keys.data.get(), out.data.get(), ptrdiff_t(a.head_dim),
                        ptrdiff_t(a.head_dim), a.num_heads, a.head_dim, 1e-6f, coin()};
  path.norm(norm, 0, norm.num_rows);
}

}  // namespace

int main(int argc, char** argv) {
  const int num_cases = argc > 1 ? std::atoi(argv[1]) : 1000;
  generator.seed(argc > 2 ? unsigned(std::atoi(argv[2])) : 0);
  for (const Kernels* path : runnable_kernels()) {
    // A thread of its own for each: its scratch is no larger than the case needs.
    for (int i = 0; i < num_cases; ++i) std::thread([path] { run_case(*path), run_step(*path); }).join();
    std::printf("%s: %d cases\n", path->name, num_cases);
  }
  for (int i = 0; i < num_cases; ++i) run_products();
  std::printf("products: %d cases\n", num_cases);
}
