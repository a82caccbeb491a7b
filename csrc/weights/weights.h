// Linear layers whose weights lie in memory in few bits: what the bindings call, and what every path provides.
//
// Blocks of 16 rows, whose lanes never meet: an output is one chain over the groups of its row, in their order, each
// operation rounded by itself. So bits depend neither on the path nor on tokens, threads and rows beside it
// (docs/formats.md#weights; the reference is src/narrowcast/weights/reference.py).
#pragma once

#include "kernels/kernels.h"

namespace narrowcast {

constexpr size_t kBlockRows = 16;
constexpr size_t kActivationGroup = 32;  // columns whose activations share a scale, where they are of 8 bits
constexpr size_t kMostTokens = 16;       // of a tile

enum class WeightKind : int { int4 = 0, int4_minimum = 1, int8 = 2, int4_zero_point = 3, ternary = 4 };

// Columns that share a header, and bytes of 16 rows of them.
struct BlockShape {
  size_t num_columns, nbytes;
};

constexpr BlockShape block_shape(WeightKind kind, size_t group_size) {
  switch (kind) {
    case WeightKind::int4: return {64, 64 + 512};
    case WeightKind::int4_minimum: return {64, 128 + 512};
    case WeightKind::int8: return {64, 64 + 1024};
    case WeightKind::int4_zero_point: return {group_size, 64 + 8 * group_size};
    case WeightKind::ternary: return {32, 128};
  }
  return {0, 0};
}

struct PackedMatrix {
  WeightKind kind;
  const uint8_t* blocks;
  size_t row_stride;  // bytes from 16 rows to the next 16
  size_t num_rows;    // the last block may have rows that do not count
  size_t group_size;
  bool bf16_scales;   // those of int4_zero_point; all others are FP16
  float scale;        // ternary: of all weights
};

// Part of a matrix: whole blocks of rows, and columns from `first_column` on, whole groups.
struct MatrixPart {
  size_t first_row, num_rows, first_column, num_columns;
};

// A few tokens as the kernels read them. By group, then by token: 32 codes, a scale, and the sum of the codes times
// what a code of the weights is too large by. For activations in BF16: by 8 columns, then by token, 8 of them, those
// below 2**-118 zero, and their sum by group.
struct Tile {
  size_t first_token, num_tokens, width;  // `width` of them, a power of two, those behind the last one zero
  int8_t* codes;
  uint16_t* values;
  float* scales;
  int32_t* offsets;
};

// Rows of BF16 as PyTorch has them.
struct DenseMatrix {
  const uint16_t* values;
  size_t stride, num_rows, num_columns;
};

struct WeightKernels {
  void (*prepare)(WeightKind, size_t group_size, const Rows& x, const Tile&);
  // y, FP32 [width, 16], of one block of rows.
  void (*multiply)(const PackedMatrix&, const MatrixPart&, size_t block, const Tile&, float* y);
  // Adds the bias, if any, of the dtype of y, and rounds.
  void (*finish)(const float* block_y, const Tile&, size_t first_row, size_t num_rows, const void* bias, const Rows& y);
  // Products of rows [begin, end) with 1, 2 or 4 tokens, BF16 of [T, K] without gaps.
  void (*multiply_dense)(const DenseMatrix&, const uint16_t* x, size_t num_tokens, const void* bias, const Rows& y,
                         size_t first_token, size_t begin, size_t end);
  // BF16 [num_rows, num_columns] of int4_zero_point, rounded once.
  void (*dequantize)(const PackedMatrix&, const MatrixPart&, size_t block, uint16_t* out);
  // Some number of lines of 64 bytes, four by four, read as fast as a core can.
  uint64_t (*read)(const uint8_t* from, size_t num_lines);
};

extern const WeightKernels avx512_bf16_weights, avx512_weights, avx2_weights, portable_weights;

}  // namespace narrowcast
