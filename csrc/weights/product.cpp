#include "product.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "kernels/threads.h"

namespace narrowcast {
namespace {

constexpr size_t kBytesForAThread = 1 << 16;  // some 3 us of reading; handing a part over takes less than one
constexpr size_t kTokensPrepared = 1024;      // at a time: for more, scratch would grow with the longest prompt
constexpr size_t kTokensAtATime = 128;        // prepared ones that stay in the L2 cache while a block of rows is read

// Room that stays with its thread.
struct Scratch {
  std::vector<int8_t> codes;
  std::vector<uint16_t> values;
  std::vector<float> scales;
  std::vector<int32_t> offsets;
  std::vector<Tile> tiles;
};

thread_local Scratch scratch;

size_t width_of(size_t num_left, size_t most) {
  if (num_left >= most) return most;
  size_t width = 1;
  while (width < num_left) width *= 2;
  return width > 8 ? 8 : width;  // nine tokens are eight and one
}

// Tiles of M tokens, with their places in the scratch.
std::vector<Tile>& lay_out(const PackedMatrix& matrix, size_t num_tokens, size_t num_columns) {
  const bool in_halves = matrix.kind == WeightKind::int4_zero_point;
  const size_t num_groups = num_columns / matrix.group_size;
  size_t num_places = 0;
  scratch.tiles.clear();
  for (size_t first = 0; first < num_tokens;) {
    const size_t width = width_of(num_tokens - first, in_halves ? 4 : kMostTokens);
    const size_t count = std::min(width, num_tokens - first);
    scratch.tiles.push_back({first, count, width, nullptr, nullptr, nullptr, nullptr});
    first += count;
    num_places += width;
  }
  auto grow = [](auto& room, size_t size) { room.resize(std::max(room.size(), size)); };
  grow(scratch.scales, num_places * num_groups);
  if (in_halves) {
    grow(scratch.values, num_places * num_columns);
  } else {
    grow(scratch.codes, num_places * num_columns);
    grow(scratch.offsets, num_places * num_groups);
  }
  size_t place = 0;
  for (Tile& tile : scratch.tiles) {
    tile.codes = scratch.codes.data() + place * num_columns;
    tile.values = scratch.values.data() + place * num_columns;
    tile.scales = scratch.scales.data() + place * num_groups;
    tile.offsets = scratch.offsets.data() + place * num_groups;
    place += tile.width;
  }
  return scratch.tiles;
}

size_t parts_of(size_t num_threads, size_t nbytes, size_t num_items) {
  return std::max<size_t>(1, std::min({num_threads, nbytes / kBytesForAThread, num_items}));
}

Rows some_rows(const Rows& rows, size_t first, size_t count) {
  return {rows.row(first), rows.dtype, rows.stride, count, rows.num_values};
}

void multiply_some(const WeightKernels& kernels, const PackedMatrix& matrix, const MatrixPart& part, const Rows& x,
                   const void* bias, const Rows& y, size_t num_threads) {
  const std::vector<Tile>& tiles = lay_out(matrix, x.num_rows, part.num_columns);
  for_parts(parts_of(num_threads, x.num_rows * part.num_columns, tiles.size()), [&](size_t index, size_t num_parts) {
    for (size_t i = index * tiles.size() / num_parts; i < (index + 1) * tiles.size() / num_parts; ++i) {
      kernels.prepare(matrix.kind, matrix.group_size, x, tiles[i]);
    }
  });
  const size_t first_block = part.first_row / kBlockRows;
  const size_t num_blocks = (part.num_rows + kBlockRows - 1) / kBlockRows;
  const BlockShape shape = block_shape(matrix.kind, matrix.group_size);
  const size_t nbytes = num_blocks * (part.num_columns / shape.num_columns + 1) * shape.nbytes;
  for_parts(parts_of(num_threads, nbytes * tiles.size(), num_blocks), [&](size_t index, size_t num_parts) {
    alignas(64) float block_y[kMostTokens * kBlockRows];
    const size_t end = (index + 1) * num_blocks / num_parts;
    for (size_t first_tile = 0; first_tile < tiles.size();) {
      size_t last_tile = first_tile, num_tokens = 0;
      while (last_tile < tiles.size() && num_tokens < kTokensAtATime) num_tokens += tiles[last_tile++].num_tokens;
      for (size_t block = index * num_blocks / num_parts; block < end; ++block) {
        const size_t num_rows = std::min(kBlockRows, part.num_rows - block * kBlockRows);
        for (size_t i = first_tile; i < last_tile; ++i) {
          kernels.multiply(matrix, part, first_block + block, tiles[i], block_y);
          kernels.finish(block_y, tiles[i], block * kBlockRows, num_rows, bias, y);
        }
      }
      first_tile = last_tile;
    }
  });
}

}  // namespace

void multiply(const WeightKernels& kernels, const PackedMatrix& matrix, const MatrixPart& part, const Rows& x,
              const void* bias, const Rows& y, size_t num_threads) {
  for (size_t first = 0; first < x.num_rows; first += kTokensPrepared) {
    const size_t count = std::min(kTokensPrepared, x.num_rows - first);
    multiply_some(kernels, matrix, part, some_rows(x, first, count), bias, some_rows(y, first, count), num_threads);
  }
}

void multiply_dense(const WeightKernels& kernels, const DenseMatrix& matrix, const Rows& x, const void* bias,
                    const Rows& y, size_t num_threads) {
  const size_t nbytes = 2 * matrix.num_rows * matrix.num_columns;
  for_parts(parts_of(num_threads, nbytes, matrix.num_rows), [&](size_t index, size_t num_parts) {
    const size_t begin = index * matrix.num_rows / num_parts, end = (index + 1) * matrix.num_rows / num_parts;
    for (size_t first = 0; first < x.num_rows;) {
      const size_t left = x.num_rows - first, count = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      const auto* rows = static_cast<const uint16_t*>(x.row(first));
      kernels.multiply_dense(matrix, rows, count, bias, y, first, begin, end);
      first += count;
    }
  });
}

void dequantize(const WeightKernels& kernels, const PackedMatrix& matrix, const MatrixPart& part, uint16_t* out,
                size_t num_threads) {
  const size_t first_block = part.first_row / kBlockRows;
  const size_t num_blocks = (part.num_rows + kBlockRows - 1) / kBlockRows;
  const size_t nbytes = 2 * part.num_rows * part.num_columns;
  for_parts(parts_of(num_threads, nbytes, num_blocks), [&](size_t index, size_t num_parts) {
    for (size_t block = index * num_blocks / num_parts; block < (index + 1) * num_blocks / num_parts; ++block) {
      kernels.dequantize(matrix, part, first_block + block, out);
    }
  });
}

uint64_t read_memory(const WeightKernels& kernels, const uint8_t* from, size_t nbytes, size_t num_threads) {
  std::atomic<uint64_t> total{0};
  const size_t num_lines = nbytes / 64;
  for_parts(num_threads, [&](size_t index, size_t num_parts) {
    const size_t begin = index * num_lines / num_parts, end = (index + 1) * num_lines / num_parts;
    total += kernels.read(from + 64 * begin, end - begin);
  });
  return total;
}

}  // namespace narrowcast
