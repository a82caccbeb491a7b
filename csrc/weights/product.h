// Products of tokens with matrices in few bits, shared out among threads.
#pragma once

#include "weights.h"

namespace narrowcast {

// y [M, part.num_rows] = x [M, part.num_columns] times the part of the matrix, transposed, plus `bias`, if any. x and y
// are BF16 or FP32, the bias of the dtype of y.
void multiply(const WeightKernels&, const PackedMatrix&, const MatrixPart&, const Rows& x, const void* bias,
              const Rows& y, size_t num_threads);

// The same for rows of BF16, whose `x` [M, K] is BF16, without gaps; for a few tokens.
void multiply_dense(const WeightKernels&, const DenseMatrix&, const Rows& x, const void* bias, const Rows& y,
                    size_t num_threads);

// The part's values in BF16 [num_rows, num_columns], of int4_zero_point.
void dequantize(const WeightKernels&, const PackedMatrix&, const MatrixPart&, uint16_t* out, size_t num_threads);

// Values of rows by their numbers, FP32 [num_rows, num_columns] without gaps.
void look_up(const PackedMatrix&, const int64_t* rows, size_t num_rows, size_t num_columns, float* out);

// Reads memory and does nothing with it, for measuring; some number.
uint64_t read_memory(const WeightKernels& kernels, const uint8_t* from, size_t nbytes, size_t num_threads);

}  // namespace narrowcast
