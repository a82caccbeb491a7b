// Random matrices in few bits and random tokens through the products of all paths, whose bits must be the same.
#include "kernels/fuzz.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "kernels/paths.h"
#include "product.h"

namespace narrowcast {
namespace {

constexpr size_t kMostThreads = 3;

// A matrix whose blocks end with their last byte, and a part of it; some parts begin in a half of a block.
struct Weights {
  Buffer<uint8_t> blocks{0};
  PackedMatrix matrix = {};
  MatrixPart part = {};
};

Weights any_weights() {
  Weights made;
  PackedMatrix& matrix = made.matrix;
  matrix.kind = static_cast<WeightKind>(below(5));
  matrix.group_size = matrix.kind == WeightKind::int4_zero_point ? 32 << below(4) : kActivationGroup;
  matrix.num_rows = 1 + below(coin() ? 20 : 200);
  matrix.bf16_scales = coin();
  matrix.scale = 0.01f;
  const BlockShape shape = block_shape(matrix.kind, matrix.group_size);
  const size_t num_groups = 1 + below(below(8) ? 6 : 50), num_columns = num_groups * matrix.group_size;
  const size_t num_blocks = (num_columns + shape.num_columns - 1) / shape.num_columns;
  matrix.row_stride = (num_blocks + below(2)) * shape.nbytes;  // of a matrix that is columns of a larger one
  const size_t num_block_rows = (matrix.num_rows + kBlockRows - 1) / kBlockRows;
  made.blocks = random_bytes<uint8_t>((num_block_rows - 1) * matrix.row_stride + num_blocks * shape.nbytes);
  matrix.blocks = made.blocks.data.get();
  const size_t first_row = kBlockRows * below(num_block_rows), first_group = below(num_groups);
  made.part = {first_row, 1 + below(matrix.num_rows - first_row), first_group * matrix.group_size,
               (1 + below(num_groups - first_group)) * matrix.group_size};
  return made;
}

size_t itemsize(Dtype dtype) { return dtype == Dtype::fp32 ? 4 : 2; }

// Any bytes, or numbers of magnitudes from 2**-32 to 2 that are finite.
Buffer<uint8_t> any_numbers(size_t count, Dtype dtype, bool tame) {
  auto values = random_bytes<uint8_t>(count * itemsize(dtype));
  if (!tame) return values;
  for (size_t i = itemsize(dtype) - 1; i < values.size; i += itemsize(dtype)) {
    values.data[i] = uint8_t((values.data[i] & 0x8F) | 0x30);
  }
  return values;
}

// In products with activations in BF16 those above 2**100 become infinite: where sums overflow, one path finds an
// infinity and another one NaN.
void without_large(Buffer<uint8_t>& values, Dtype dtype) {
  for (size_t i = itemsize(dtype); i <= values.size; i += itemsize(dtype)) {
    uint16_t upper;
    std::memcpy(&upper, &values.data[i - 2], 2);
    if ((upper & 0x7FFF) > (127 + 100) << 7) upper = uint16_t((upper & 0x8000) | (coin() ? 0x7F80 : 0x7FC0));
    std::memcpy(&values.data[i - 2], &upper, 2);
  }
}

Dtype bf16_or_fp32() { return coin() ? Dtype::bf16 : Dtype::fp32; }

// Rows of `num_values`, the first of them first, with a gap behind each but the last.
Rows with_gaps(Buffer<uint8_t>& buffer, Dtype dtype, size_t num_rows, size_t num_values, size_t gap) {
  return {buffer.data.get(), dtype, ptrdiff_t(num_values + gap), num_rows, num_values};
}

size_t with_gaps(size_t num_rows, size_t num_values, size_t gap) { return num_rows * (num_values + gap) - gap; }

// The same bytes from `compute(kernels, out)` of all paths.
template <class Compute>
void compare_paths(const char* what, size_t nbytes, Compute compute) {
  const Buffer<uint8_t> before = random_bytes<uint8_t>(nbytes);
  Buffer<uint8_t> expected(0);
  const char* first = nullptr;
  for (const Kernels* path : runnable_kernels()) {
    Buffer<uint8_t> found(nbytes);
    std::memcpy(found.data.get(), before.data.get(), nbytes);  // what lies in gaps stays
    // A thread of its own: its scratch is no larger than the case needs.
    std::thread([&] { compute(*path->weights, found); }).join();
    if (first && std::memcmp(found.data.get(), expected.data.get(), nbytes)) {
      std::fprintf(stderr, "%s: %s and %s differ\n", what, first, path->name);
      std::exit(1);
    }
    first = path->name;
    expected = std::move(found);
  }
}

void run_packed() {
  const Weights weights = any_weights();
  const auto& [blocks, matrix, part] = weights;
  const size_t num_tokens = 1 + below(40), num_threads = 1 + below(kMostThreads);
  const Dtype dtype = bf16_or_fp32();
  const size_t gap = below(3), out_gap = below(3);
  Buffer<uint8_t> x = any_numbers(with_gaps(num_tokens, part.num_columns, gap), dtype, below(4));
  if (matrix.kind == WeightKind::int4_zero_point) without_large(x, dtype);
  const Buffer<uint8_t> bias = any_numbers(part.num_rows, dtype, coin());
  const Rows from = with_gaps(x, dtype, num_tokens, part.num_columns, gap);
  const void* terms = coin() ? bias.data.get() : nullptr;
  const size_t num_out = with_gaps(num_tokens, part.num_rows, out_gap);
  compare_paths("multiply", num_out * itemsize(dtype), [&](const WeightKernels& kernels, Buffer<uint8_t>& y) {
    multiply(kernels, matrix, part, from, terms, with_gaps(y, dtype, num_tokens, part.num_rows, out_gap), num_threads);
  });
  if (matrix.kind == WeightKind::int4_zero_point) {
    compare_paths("dequantize", 2 * part.num_rows * part.num_columns,
                  [&](const WeightKernels& kernels, Buffer<uint8_t>& out) {
                    dequantize(kernels, matrix, part, reinterpret_cast<uint16_t*>(out.data.get()), num_threads);
                  });
  }
  const size_t num_columns = part.first_column + part.num_columns;
  Buffer<int64_t> rows(1 + below(4));
  for (size_t i = 0; i < rows.size; ++i) rows.data[i] = int64_t(below(matrix.num_rows));
  Buffer<float> found(rows.size * num_columns);
  look_up(matrix, rows.data.get(), rows.size, num_columns, found.data.get());
}

// Of sums below 2**-100 and above 2**128 bits may differ by path (halves.h), so only tame numbers are compared.
void run_dense() {
  const size_t num_rows = 1 + below(coin() ? 20 : 300), num_columns = 1 + below(coin() ? 40 : 700), gap = below(3);
  const size_t num_tokens = 1 + below(7), num_threads = 1 + below(kMostThreads), out_gap = below(3);
  const bool tame = below(4);
  Buffer<uint8_t> values = any_numbers(with_gaps(num_rows, num_columns, gap), Dtype::bf16, tame);
  Buffer<uint8_t> x = any_numbers(num_tokens * num_columns, Dtype::bf16, tame);
  const Buffer<uint8_t> bias = any_numbers(num_rows, Dtype::bf16, coin());
  const auto* weight = reinterpret_cast<const uint16_t*>(values.data.get());
  const DenseMatrix matrix = {weight, num_columns + gap, num_rows, num_columns};
  const Rows from = with_gaps(x, Dtype::bf16, num_tokens, num_columns, 0);
  const void* terms = coin() ? bias.data.get() : nullptr;
  const size_t nbytes = 2 * with_gaps(num_tokens, num_rows, out_gap);
  auto compute = [&](const WeightKernels& kernels, Buffer<uint8_t>& y) {
    multiply_dense(kernels, matrix, from, terms, with_gaps(y, Dtype::bf16, num_tokens, num_rows, out_gap), num_threads);
  };
  if (tame) return compare_paths("multiply_dense", nbytes, compute);
  for (const Kernels* path : runnable_kernels()) {
    Buffer<uint8_t> y(nbytes);
    compute(*path->weights, y);
  }
}

}  // namespace

void run_products() { run_packed(), run_dense(); }

}  // namespace narrowcast
