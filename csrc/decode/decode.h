// What a decoding step does besides products: attention of few queries, norms, values one by one. Knows addresses and
// nothing of PyTorch.
//
// Contract (src/narrowcast/runtime/attention.py has the reference): the same bits on every path, for any number of
// threads, and for a head whatever other heads and sequences there are. FP32, every operation rounded by itself.
#pragma once

#include "../kernels/kernels.h"

namespace narrowcast {

// Vectors of D values by sequence, head and token; strides are in values, those within a vector one.
struct Heads {
  void* data;
  ptrdiff_t sequence, head, token;

  template <class T>
  T* at(size_t b, size_t h, size_t t) const {
    return static_cast<T*>(data) + static_cast<ptrdiff_t>(b) * sequence + static_cast<ptrdiff_t>(h) * head +
           static_cast<ptrdiff_t>(t) * token;
  }
};

enum class MaskKind : int { none = 0, allowed = 1, added = 2 };  // bytes, 0 for what is not seen; FP32 or the dtype

struct Mask {
  const void* data;
  MaskKind kind;
  Dtype dtype;
  ptrdiff_t sequence, head, query, key;

  ptrdiff_t place(size_t b, size_t h, size_t t, size_t c) const {
    return static_cast<ptrdiff_t>(b) * sequence + static_cast<ptrdiff_t>(h) * head +
           static_cast<ptrdiff_t>(t) * query + static_cast<ptrdiff_t>(c) * key;
  }
};

// What the new tokens of a step bring: their keys and values, which go into the cache, and the cosines and sines
// [B or 1, T, `size`] that turn the first `size` values of queries and keys. `cos` is null where nothing is to be done.
struct NewTokens {
  Heads k, v;
  const void *cos, *sin;
  ptrdiff_t sequence, token;
  size_t size;
};

// Where the keys of each sequence are in a cache that all of them share: sequence b has places[spans[2 b]] to
// places[spans[2 b + 1] - 1], in this order. Null where each has a cache of its own, key c at place c.
struct Paged {
  const int64_t *places, *spans;
};

// Contexts are cut into pieces of so many keys, whatever else there is; each is attended to by itself.
constexpr size_t kPiece = 512;
constexpr size_t kMostHeadDim = 256, kBlock = 32;

struct Attention {
  Dtype dtype;
  size_t num_sequences, num_heads, num_kv_heads, num_queries, context, head_dim;
  float scale, softcap;  // 0 for none
  bool causal;           // query t sees the first context - num_queries + t + 1 keys
  Heads q, k, v, out;
  Mask mask;
  NewTokens added;  // none where keys are paged
  Paged paged;      // then `context` is the longest

  size_t group() const { return num_heads / num_kv_heads; }
  size_t rows() const { return group() * num_queries; }  // that share keys
  size_t num_pieces() const { return (context + kPiece - 1) / kPiece; }
  size_t context_of(size_t b) const {
    return paged.places ? static_cast<size_t>(paged.spans[2 * b + 1] - paged.spans[2 * b]) : context;
  }
  size_t num_pieces_of(size_t b) const { return (context_of(b) + kPiece - 1) / kPiece; }
  // Where paged key c is.
  size_t place_of(size_t b, size_t c) const {
    return static_cast<size_t>(paged.places[static_cast<size_t>(paged.spans[2 * b]) + c]);
  }
  size_t num_units() const { return num_sequences * num_kv_heads * num_pieces(); }
  size_t width() const { return (head_dim + kBlock - 1) / kBlock * kBlock; }  // of a vector in FP32, padded
  size_t partial_size() const { return width() + 2; }  // floats of a row of a unit, where there are several pieces
  // Floats that `attend` needs for itself: of each row scores, the query, what is summed, and two numbers.
  size_t scratch_size() const { return rows() * (kPiece + 2 * width() + 2); }
};

struct RmsNorm {
  Dtype dtype;
  const void *x, *weight;
  void* out;
  ptrdiff_t stride, out_stride;  // of rows, in values
  size_t num_rows, num_values;
  float epsilon;
  bool from_one;  // the weight is added to one, and multiplied with in FP32
};

// Values of one or two tensors [T, E], BF16 or FP32, combined one by one.
enum class How : int { copy = 0, add = 1, multiply = 2 };

struct Combination {
  How how;
  Rows a, b, out;  // no b for a copy
};

// A function of BF16, as a table of its values by the bits of the argument.
struct Function {
  const uint16_t* table;
  Rows x, out;
};

}  // namespace narrowcast
