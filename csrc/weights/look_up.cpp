// Rows of matrices in few bits, as values: what an embedding gives. A number at a time, as rows are few.
#include <cstring>

#include "product.h"

namespace narrowcast {
namespace {

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float from_fp16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = uint32_t(half & 0x7FFF) << 13;
  if ((half & 0x7C00) == 0x7C00) return float_of(sign | 0x7F800000 | magnitude);
  const float value = float_of(magnitude) * 0x1p112f;  // the exponent's bias is 112 too small
  return sign ? -value : value;
}

// The `lane`-th of 16 numbers.
float number(const uint8_t* numbers, size_t lane, bool is_bf16) {
  uint16_t half;
  std::memcpy(&half, numbers + 2 * lane, 2);
  return is_bf16 ? float_of(uint32_t(half) << 16) : from_fp16(half);
}

void ternary_row(const PackedMatrix& matrix, const uint8_t* row, size_t lane, size_t num_columns, float* out) {
  for (size_t k = 0; k < num_columns; ++k) {
    const uint8_t four = row[k / 16 * 64 + 4 * lane + k % 4];
    out[k] = float((four >> (2 * (k / 4 % 4)) & 3) - 1) * matrix.scale;
  }
}

void zero_point_row(const PackedMatrix& matrix, const uint8_t* row, size_t lane, size_t num_columns, float* out) {
  constexpr int kByte[8] = {0, 2, 0, 2, 1, 3, 1, 3};  // even columns are in the first two of four bytes
  const size_t nbytes = block_shape(matrix.kind, matrix.group_size).nbytes;
  for (size_t k = 0; k < num_columns; ++k) {
    const uint8_t* block = row + k / matrix.group_size * nbytes;
    const uint8_t two = block[64 + k % matrix.group_size / 8 * 64 + 4 * lane + kByte[k % 8]];
    const int code = (k % 4 < 2 ? two : two >> 4) & 15;
    const float zero = number(block + 32, lane, matrix.bf16_scales);
    out[k] = (float(code - 8) - zero) * number(block, lane, matrix.bf16_scales);
  }
}

void grouped_row(const PackedMatrix& matrix, const uint8_t* row, size_t lane, size_t num_columns, float* out) {
  const size_t nbytes = block_shape(matrix.kind, matrix.group_size).nbytes;
  const bool has_minimum = matrix.kind == WeightKind::int4_minimum, is_int8 = matrix.kind == WeightKind::int8;
  for (size_t k = 0; k < num_columns; ++k) {
    const uint8_t* block = row + k / 64 * nbytes;
    const size_t half = k / 32 % 2, quad = k / 4 % 8;
    const uint8_t* codes = block + (has_minimum ? 128 : 64) + half * (is_int8 ? 512 : 256) + 4 * lane + k % 4;
    const float scale = number(block + 32 * half, lane, false);
    if (is_int8) {
      out[k] = float(codes[64 * quad] - 128) * scale;
      continue;
    }
    const int code = (quad < 4 ? codes[64 * quad] : codes[64 * (quad - 4)] >> 4) & 15;
    out[k] = has_minimum ? float(code) * scale + number(block + 64 + 32 * half, lane, false) : float(code - 8) * scale;
  }
}

}  // namespace

void look_up(const PackedMatrix& matrix, const int64_t* rows, size_t num_rows, size_t num_columns, float* out) {
  for (size_t i = 0; i < num_rows; ++i, out += num_columns) {
    const uint8_t* row = matrix.blocks + size_t(rows[i]) / kBlockRows * matrix.row_stride;
    const size_t lane = size_t(rows[i]) % kBlockRows;
    switch (matrix.kind) {
      case WeightKind::ternary: ternary_row(matrix, row, lane, num_columns, out); break;
      case WeightKind::int4_zero_point: zero_point_row(matrix, row, lane, num_columns, out); break;
      default: grouped_row(matrix, row, lane, num_columns, out);
    }
  }
}

}  // namespace narrowcast
