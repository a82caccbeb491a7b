// All weight kernels of one path. CMakeLists.txt compiles this file once for each, with its flags and its name.
#include "halves.h"
#include "integers.h"

namespace narrowcast {
namespace NARROWCAST_PATH {

#define NARROWCAST_JOINED(left, right) left##right
#define NARROWCAST_TABLE(path) NARROWCAST_JOINED(path, _weights)

static int32_t too_large(WeightKind kind) {
  switch (kind) {
    case WeightKind::int4: return -8;
    case WeightKind::int8: return -128;
    case WeightKind::ternary: return -1;
    default: return 1;  // of a minimum, as many times as the sum says
  }
}

template <class T>
static void prepare_values(WeightKind kind, size_t group_size, const Rows& x, const Tile& tile) {
  if (kind == WeightKind::int4_zero_point) prepare_halves<T>(x, tile, group_size);
  else prepare_integers<T>(x, tile, too_large(kind), kind == WeightKind::ternary);
}

static void prepare(WeightKind kind, size_t group_size, const Rows& x, const Tile& tile) {
  if (x.dtype == Dtype::bf16) prepare_values<Bf16>(kind, group_size, x, tile);
  else prepare_values<float>(kind, group_size, x, tile);
}

template <WeightKind kind>
static void multiply_integers(const PackedMatrix& matrix, const uint8_t* row, size_t first_group, size_t num_groups,
                              const Tile& tile, float* y) {
  switch (tile.width) {
    case 1: multiply_groups<kind, 1>(matrix, row, first_group, num_groups, tile, y); return;
    case 2: multiply_groups<kind, 2>(matrix, row, first_group, num_groups, tile, y); return;
    case 4: multiply_groups<kind, 4>(matrix, row, first_group, num_groups, tile, y); return;
    case 8: multiply_groups<kind, 8>(matrix, row, first_group, num_groups, tile, y); return;
    default: multiply_groups<kind, 16>(matrix, row, first_group, num_groups, tile, y); return;
  }
}

template <bool bf16_scales>
static void multiply_with_zero_points(const PackedMatrix& matrix, const uint8_t* row, size_t first_group,
                                      size_t num_groups, const Tile& tile, float* y) {
  switch (tile.width) {
    case 1: multiply_zero_point<bf16_scales, 1>(matrix, row, first_group, num_groups, tile, y); return;
    case 2: multiply_zero_point<bf16_scales, 2>(matrix, row, first_group, num_groups, tile, y); return;
    default: multiply_zero_point<bf16_scales, 4>(matrix, row, first_group, num_groups, tile, y); return;
  }
}

static void multiply(const PackedMatrix& matrix, const MatrixPart& part, size_t block, const Tile& tile, float* y) {
  const uint8_t* row = matrix.blocks + block * matrix.row_stride;
  const size_t first = part.first_column / matrix.group_size, count = part.num_columns / matrix.group_size;
  switch (matrix.kind) {
    case WeightKind::int4: multiply_integers<WeightKind::int4>(matrix, row, first, count, tile, y); return;
    case WeightKind::int4_minimum:
      multiply_integers<WeightKind::int4_minimum>(matrix, row, first, count, tile, y);
      return;
    case WeightKind::int8: multiply_integers<WeightKind::int8>(matrix, row, first, count, tile, y); return;
    case WeightKind::ternary: multiply_integers<WeightKind::ternary>(matrix, row, first, count, tile, y); return;
    case WeightKind::int4_zero_point:
      if (matrix.bf16_scales) multiply_with_zero_points<true>(matrix, row, first, count, tile, y);
      else multiply_with_zero_points<false>(matrix, row, first, count, tile, y);
      return;
  }
}

template <class T>
static void finish_rows(const float* block_y, const Tile& tile, size_t first_row, size_t num_rows, const T* bias,
                        const Rows& y) {
  for (size_t t = 0; t < tile.num_tokens; ++t) {
    T* to = static_cast<T*>(y.row(tile.first_token + t)) + first_row;
    for_each_vector(num_rows, [&](size_t first, size_t count) {
      F32 sum = load(block_y + t * kBlockRows + first, count);
      if (bias) sum = sum + load(bias + first_row + first, count);
      store(to + first, sum, count);
    });
  }
}

static void finish(const float* block_y, const Tile& tile, size_t first_row, size_t num_rows, const void* bias,
                   const Rows& y) {
  if (y.dtype == Dtype::bf16) {
    finish_rows(block_y, tile, first_row, num_rows, static_cast<const Bf16*>(bias), y);
  } else {
    finish_rows(block_y, tile, first_row, num_rows, static_cast<const float*>(bias), y);
  }
}

static void multiply_dense(const DenseMatrix& matrix, const uint16_t* x, size_t num_tokens, const void* bias,
                           const Rows& y, size_t first_token, size_t begin, size_t end) {
  const Bf16* terms = static_cast<const Bf16*>(bias);
  switch (num_tokens) {
    case 1: multiply_dense_rows<1>(matrix, x, terms, y, first_token, begin, end); return;
    case 2: multiply_dense_rows<2>(matrix, x, terms, y, first_token, begin, end); return;
    default: multiply_dense_rows<4>(matrix, x, terms, y, first_token, begin, end); return;
  }
}

static void dequantize(const PackedMatrix& matrix, const MatrixPart& part, size_t block, uint16_t* out) {
  const uint8_t* row = matrix.blocks + block * matrix.row_stride;
  const size_t first = part.first_column / matrix.group_size, count = part.num_columns / matrix.group_size;
  const size_t done = block * kBlockRows - part.first_row, left = part.num_rows - done;
  const size_t num_rows = left < kBlockRows ? left : kBlockRows;
  out += done * part.num_columns;
  if (matrix.bf16_scales) dequantize_zero_point<true>(matrix, row, first, count, num_rows, out, part.num_columns);
  else dequantize_zero_point<false>(matrix, row, first, count, num_rows, out, part.num_columns);
}

static uint64_t read(const uint8_t* from, size_t num_lines) {
  constexpr size_t vectors = 256 / kVectorBytes;  // four lines
  I32 sums[vectors] = {};
  for (size_t line = 0; line + 4 <= num_lines; line += 4) {
#pragma GCC unroll 16
    for (size_t v = 0; v < vectors; ++v) sums[v] ^= load_vector<I32>(from + 64 * line + v * kVectorBytes);
  }
  uint64_t total = 0;
  for (const I32& sum : sums) total += static_cast<uint32_t>(sum_of_lanes(sum));
  return total;
}

}  // namespace NARROWCAST_PATH

const WeightKernels NARROWCAST_TABLE(NARROWCAST_PATH) = {
    NARROWCAST_PATH::prepare,  NARROWCAST_PATH::multiply,   NARROWCAST_PATH::finish,
    NARROWCAST_PATH::multiply_dense, NARROWCAST_PATH::dequantize, NARROWCAST_PATH::read,
};

}  // namespace narrowcast
