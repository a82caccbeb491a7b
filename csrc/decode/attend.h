// Attention of few queries: keys and values are read once, for all queries that share them. A unit of work is one piece
// of the context of one sequence and KV head; a row is a query of one of the heads that share it.
//
// Scores: sixteen partial sums over D, added up in one order. Softmax: the largest score, exponentials, sixteen partial
// sums over keys. Values: key after key. Pieces: in order, each weighted by its largest score.
#pragma once

#include "decode.h"
#include "wide.h"

namespace narrowcast {
namespace NARROWCAST_PATH {

NARROWCAST_INLINE F32 rounded(F32 x, const float*) { return x; }
NARROWCAST_INLINE F32 rounded(F32 x, const Bf16*) { return from_bf16(to_bf16(x)); }
NARROWCAST_INLINE F32 rounded(F32 x, const Fp16*) { return from_fp16(to_fp16(x)); }

// Rotary embedding of token t of sequence b, rounded as Transformers does: both products, then their sum.
template <class T>
NARROWCAST_INLINE void turn(const NewTokens& added, size_t b, size_t t, const T* x, size_t head_dim, T* out) {
  if (!added.cos) {
    memcpy(out, x, head_dim * sizeof(T));
    return;
  }
  const ptrdiff_t place = static_cast<ptrdiff_t>(b) * added.sequence + static_cast<ptrdiff_t>(t) * added.token;
  const T *cos = static_cast<const T*>(added.cos) + place, *sin = static_cast<const T*>(added.sin) + place;
  const size_t half = added.size / 2;
  for_each_vector(half, [&](size_t i, size_t count) {
    const F32 low = load(x + i, count), high = load(x + half + i, count);
    const F32 a = rounded(low * load(cos + i, count), x) + rounded(-high * load(sin + i, count), x);
    const size_t j = half + i;
    store(out + j, rounded(high * load(cos + j, count), x) + rounded(low * load(sin + j, count), x), count);
    store(out + i, a, count);
  });
  memcpy(out + added.size, x + added.size, (head_dim - added.size) * sizeof(T));
}

struct Softmax {
  float most, total;  // the largest score, the sum of exponentials
};

// A unit, and where its rows have their room: scores [rows, kPiece], queries and sums [rows, padded D].
template <class T>
struct Unit {
  const Attention& a;
  size_t b, h, begin, end;
  float *scores, *queries, *sums;
  Softmax* softmax;

  size_t group_of(size_t row) const { return h * a.group() + row / a.num_queries; }
  size_t query_of(size_t row) const { return row % a.num_queries; }
  float* scores_of(size_t row) const { return scores + row * kPiece; }
  float* query(size_t row) const { return queries + row * a.width(); }
  float* sum(size_t row) const { return sums + row * a.width(); }
};

// Keys or values at equal distances.
template <class T>
struct InRow {
  const T* first;
  ptrdiff_t stride;

  const T* operator[](size_t i) const { return first + static_cast<ptrdiff_t>(i) * stride; }
};

constexpr size_t kAhead = 32;  // keys that are asked for before they are needed, as processors foresee only rows

// Calls `use` with what finds `count` keys, or values, of the unit by index: those from c on, at most kWide.
template <class T, class Use>
NARROWCAST_INLINE void with(const Unit<T>& u, const Heads& vectors, size_t c, size_t count, Use&& use) {
  if (!u.a.paged.places) return use(InRow<T>{vectors.at<const T>(u.b, u.h, c), vectors.token});
  const T* anywhere[kWide];
  auto find = [&](size_t key) { return vectors.at<const T>(u.b, u.h, u.a.place_of(u.b, key)); };
  for (size_t i = 0; i < count; ++i) {
    anywhere[i] = find(c + i);
    if (c + i + kAhead >= u.end) continue;
    const T* later = find(c + i + kAhead);
    for (size_t j = 0; j < u.a.head_dim; j += 64 / sizeof(T)) __builtin_prefetch(later + j);
  }
  use(anywhere);
}

template <class T>
static void add_new_tokens(const Unit<T>& u) {
  const Attention& a = u.a;
  const size_t first = a.context - a.num_queries;
  for (size_t t = 0; t < a.num_queries; ++t) {
    if (first + t < u.begin || first + t >= u.end) continue;
    const size_t c = first + t;
    turn(a.added, u.b, t, a.added.k.at<const T>(u.b, u.h, t), a.head_dim, a.k.at<T>(u.b, u.h, c));
    memcpy(a.v.at<T>(u.b, u.h, c), a.added.v.at<const T>(u.b, u.h, t), a.head_dim * sizeof(T));
  }
}

template <class T>
static void prepare_queries(const Unit<T>& u) {
  const Attention& a = u.a;
  for (size_t row = 0; row < a.rows(); ++row) {
    T turned[kMostHeadDim];
    const size_t t = u.query_of(row);
    turn(a.added, u.b, t, a.q.at<const T>(u.b, u.group_of(row), t), a.head_dim, turned);
    for (size_t i = 0; i < a.head_dim; i += kBlock) {
      store_prepared(u.query(row) + i, load_pair(turned + i, a.head_dim - i));
    }
  }
}

// Products of a query with keys.
template <int num_keys, class Keys>
NARROWCAST_INLINE void dot(const float* query, const Keys& keys, size_t head_dim, float* scores) {
  Wide partial[num_keys];
  for (int key = 0; key < num_keys; ++key) partial[key] = wide_splat(0.0f);
  size_t i = 0;
  for (; i + kBlock <= head_dim; i += kBlock) {
    const Pair q = prepared_pair(query + i);
#pragma GCC unroll 4
    for (int key = 0; key < num_keys; ++key) {
      const Pair x = load_pair(keys[key] + i);
      add_product(partial[key], q.first, x.first);
      add_product(partial[key], q.second, x.second);
    }
  }
  if (i < head_dim) {
    const Pair q = prepared_pair(query + i);
    for (int key = 0; key < num_keys; ++key) {
      const Pair x = load_pair(keys[key] + i, head_dim - i);
      add_product(partial[key], q.first, x.first);
      add_product(partial[key], q.second, x.second);
    }
  }
  for (int key = 0; key < num_keys; ++key) scores[key] = total(partial[key]);
}

template <class T>
static void score(const Unit<T>& u, size_t first, size_t last) {
  const size_t rows = u.a.rows(), head_dim = u.a.head_dim;
  size_t c = first;
  for (; c + 4 <= last; c += 4) {
    with(u, u.a.k, c, 4, [&](const auto& keys) {
      for (size_t row = 0; row < rows; ++row) dot<4>(u.query(row), keys, head_dim, u.scores_of(row) + (c - u.begin));
    });
  }
  for (; c < last; ++c) {
    with(u, u.a.k, c, 1, [&](const auto& keys) {
      for (size_t row = 0; row < rows; ++row) dot<1>(u.query(row), keys, head_dim, u.scores_of(row) + (c - u.begin));
    });
  }
}

NARROWCAST_INLINE float added_by(const Mask& mask, ptrdiff_t place) {
  if (mask.dtype == Dtype::fp32) return static_cast<const float*>(mask.data)[place];
  const uint16_t* at = static_cast<const uint16_t*>(mask.data) + place;
  if (mask.dtype == Dtype::bf16) return load(reinterpret_cast<const Bf16*>(at), 1)[0];
  return load(reinterpret_cast<const Fp16*>(at), 1)[0];
}

// The keys [first, last) of the piece outside of which no row sees any.
template <class T>
static void find_seen(const Unit<T>& u, size_t& first, size_t& last) {
  first = u.begin, last = u.end;
  const Attention& a = u.a;
  if (a.mask.kind != MaskKind::allowed) return;
  size_t least = u.end, most = u.begin;
  for (size_t row = 0; row < a.rows(); ++row) {
    auto is_seen = [&](size_t c) {
      const ptrdiff_t place = a.mask.place(u.b, u.group_of(row), u.query_of(row), c);
      return static_cast<const uint8_t*>(a.mask.data)[place] != 0;
    };
    size_t c = u.begin;
    while (c < least && !is_seen(c)) ++c;
    least = c < least ? c : least;
    c = u.end;
    while (c > most && !is_seen(c - 1)) --c;
    most = c > most ? c : most;
    if (a.mask.head == 0 && row + 1 == a.num_queries) break;  // heads see alike
  }
  first = u.begin + (least - u.begin) / kWide * kWide;  // whole vectors, so that each key keeps its lane
  last = most;
  if (least >= most) first = last = u.begin;
}

// What is no part of the product: scale, cap and mask. Minus infinity is what is not seen.
template <class T>
NARROWCAST_INLINE void limit_scores(const Unit<T>& u, size_t row, size_t first, size_t last, size_t end) {
  const Attention& a = u.a;
  float* scores = u.scores_of(row) - u.begin;
  const size_t t = u.query_of(row), head = u.group_of(row);
  const size_t context = a.context_of(u.b), seen = a.causal ? context - a.num_queries + t + 1 : context;
  for (size_t c = first; c < end; c += kLanes) {
    F32 s = load_vector<F32>(scores + c) * a.scale;
    if (a.softcap != 0.0f) s = tanh_of(s / a.softcap) * a.softcap;
    store_vector(scores + c, s);
  }
  const float never = -bits_as<float>(kInfinity);
  if (a.mask.kind == MaskKind::allowed) {
    const uint8_t* allowed = static_cast<const uint8_t*>(a.mask.data) + a.mask.place(u.b, head, t, 0);
    for (size_t c = first; c < last; ++c) {
      if (!allowed[static_cast<ptrdiff_t>(c) * a.mask.key]) scores[c] = never;
    }
  } else if (a.mask.kind == MaskKind::added) {
    for (size_t c = first; c < last; ++c) scores[c] += added_by(a.mask, a.mask.place(u.b, head, t, c));
  }
  for (size_t c = seen < last ? (seen > first ? seen : first) : last; c < end; ++c) scores[c] = never;
}

// Exponentials in place of scores.
NARROWCAST_INLINE Softmax exponentiate(float* scores, size_t count) {
  Wide most = wide_splat(-bits_as<float>(kInfinity)), sum = wide_splat(0.0f);
  for (size_t c = 0; c < count; c += kWide) {
    most = each(load_wide(scores + c), most, [](F32 s, F32 m) { return max(s, m); });  // m, if s is NaN
  }
  const float largest_score = largest(most);
  const float shift = largest_score == -bits_as<float>(kInfinity) ? 0.0f : largest_score;
  for (size_t c = 0; c < count; c += kWide) {
    const Wide p = each(load_wide(scores + c), [&](F32 s) { return exp_of_negative(s - shift); });
    add(sum, p);
    store_wide(scores + c, p);
  }
  return {largest_score, total(sum)};
}

// sums += p * values, of `32 * blocks` columns from `column` on.
template <int blocks, class Values>
NARROWCAST_INLINE void weigh(const float* p, const Values& values, size_t num_keys, size_t column, float* sums) {
  Pair sum[blocks];
#pragma GCC unroll 4
  for (int i = 0; i < blocks; ++i) sum[i] = prepared_pair(sums + column + i * kBlock);
  for (size_t key = 0; key < num_keys; ++key) {
    const Wide weight = wide_splat(p[key]);
#pragma GCC unroll 4
    for (int i = 0; i < blocks; ++i) {
      const Pair x = load_pair(values[key] + column + i * kBlock);
      add_product(sum[i].first, weight, x.first);
      add_product(sum[i].second, weight, x.second);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < blocks; ++i) store_prepared(sums + column + i * kBlock, sum[i]);
}

template <class Values>
NARROWCAST_INLINE void weigh_rest(const float* p, const Values& values, size_t num_keys, size_t column, size_t head_dim,
                                  float* sums) {
  Pair sum = prepared_pair(sums + column);
  for (size_t key = 0; key < num_keys; ++key) {
    const Pair x = load_pair(values[key] + column, head_dim - column);
    add_product(sum.first, wide_splat(p[key]), x.first);
    add_product(sum.second, wide_splat(p[key]), x.second);
  }
  store_prepared(sums + column, sum);
}

template <class T>
static void add_values(const Unit<T>& u, size_t first, size_t last) {
  constexpr int blocks = kLanes / 4;  // whose sums fill half of the registers
  const size_t rows = u.a.rows(), head_dim = u.a.head_dim;
  memset(u.sums, 0, rows * u.a.width() * sizeof(float));
  for (size_t c = first; c < last; c += kWide) {
    const size_t num_keys = last - c < kWide ? last - c : kWide;
    with(u, u.a.v, c, num_keys, [&](const auto& values) {
      for (size_t row = 0; row < rows; ++row) {
        const float* p = u.scores_of(row) + (c - u.begin);
        size_t i = 0;
        for (; i + blocks * kBlock <= head_dim; i += blocks * kBlock) {
          weigh<blocks>(p, values, num_keys, i, u.sum(row));
        }
        for (; i + kBlock <= head_dim; i += kBlock) weigh<1>(p, values, num_keys, i, u.sum(row));
        if (i < head_dim) weigh_rest(p, values, num_keys, i, head_dim, u.sum(row));
      }
    });
  }
}

// Nothing of a query that sees nothing.
template <class T>
NARROWCAST_INLINE void write_mean(const float* sums, float total, size_t head_dim, T* out) {
  for (size_t i = 0; i < head_dim; i += kBlock) {
    auto mean = [&](F32 sum) { return total == 0.0f ? splat(0.0f) : sum / total; };
    const Pair sum = prepared_pair(sums + i);
    store_pair(out + i, Pair{each(sum.first, mean), each(sum.second, mean)}, head_dim - i);
  }
}

// A partial result of a row: its largest score, the sum of exponentials, and what they weigh up.
template <class T>
NARROWCAST_FLAT void attend_unit(const Unit<T>& u, float* partials) {
  const Attention& a = u.a;
  if (a.added.k.data) add_new_tokens(u);
  prepare_queries(u);
  size_t first, last;
  find_seen(u, first, last);
  score(u, first, last);
  const size_t end = first + (last - first + kWide - 1) / kWide * kWide;
  for (size_t row = 0; row < a.rows(); ++row) {
    limit_scores(u, row, first, last, end);
    u.softmax[row] = exponentiate(u.scores_of(row) + (first - u.begin), end - first);
  }
  add_values(u, first, last);
  for (size_t row = 0; row < a.rows(); ++row) {
    if (a.num_pieces_of(u.b) == 1) {
      T* out = a.out.at<T>(u.b, u.group_of(row), u.query_of(row));
      write_mean(u.sum(row), u.softmax[row].total, a.head_dim, out);
    } else {
      float* partial = partials + row * a.partial_size();
      partial[0] = u.softmax[row].most;
      partial[1] = u.softmax[row].total;
      memcpy(partial + 2, u.sum(row), a.width() * sizeof(float));
    }
  }
}

// Units [begin, end). `partials`: [units, rows, partial_size], where there are several pieces.
template <class T>
static void attend_units(const T*, const Attention& a, float* scratch, float* partials, size_t begin, size_t end) {
  const size_t rows = a.rows(), pieces = a.num_pieces();
  for (size_t unit = begin; unit < end; ++unit) {
    const size_t item = unit / pieces, start = unit % pieces * kPiece, context = a.context_of(item / a.num_kv_heads);
    if (start >= context) continue;  // others are longer
    const size_t stop = start + kPiece < context ? start + kPiece : context;
    float *queries = scratch + rows * kPiece, *sums = queries + rows * a.width();
    Softmax* softmax = reinterpret_cast<Softmax*>(sums + rows * a.width());
    const Unit<T> u = {a, item / a.num_kv_heads, item % a.num_kv_heads, start, stop, scratch, queries, sums, softmax};
    attend_unit(u, partials + unit * rows * a.partial_size());
  }
}

NARROWCAST_INLINE float weight_of(float most, float most_of_all) {
  return exp_of_negative(splat(most - most_of_all))[0];
}

// Pieces of sequences and KV heads [begin, end) become outputs.
template <class T>
static void join_pieces(const T*, const Attention& a, const float* partials, size_t begin, size_t end) {
  const size_t rows = a.rows(), size = a.partial_size(), width = a.width();
  for (size_t index = begin * rows; index < end * rows; ++index) {
    const size_t item = index / rows, row = index % rows, h = item % a.num_kv_heads;
    const size_t pieces = a.num_pieces_of(item / a.num_kv_heads);
    if (pieces == 1) continue;  // written already
    const float* first = partials + (item * a.num_pieces() * rows + row) * size;
    float most = first[0];
    for (size_t piece = 1; piece < pieces; ++piece) {
      const float other = first[piece * rows * size];
      most = other > most ? other : most;
    }
    if (most == -bits_as<float>(kInfinity)) most = 0.0f;
    float total = 0.0f, sums[kMostHeadDim] = {};
    for (size_t piece = 0; piece < pieces; ++piece) {
      const float *partial = first + piece * rows * size, weight = weight_of(partial[0], most);
      total += partial[1] * weight;
      for (size_t i = 0; i < width; i += kWide) {
        Wide sum = load_wide(sums + i);
        add_product(sum, load_wide(partial + 2 + i), wide_splat(weight));
        store_wide(sums + i, sum);
      }
    }
    T* out = a.out.at<T>(item / a.num_kv_heads, h * a.group() + row / a.num_queries, row % a.num_queries);
    write_mean(sums, total, a.head_dim, out);
  }
}

}  // namespace NARROWCAST_PATH
}  // namespace narrowcast
