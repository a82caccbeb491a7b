// The codecs' kernels: what the bindings call, and what every path (AVX-512, AVX2, portable) provides.
//
// Contract (docs/formats.md): equal bit for bit to the reference kernels in src/narrowcast/codecs. FP32, every
// operation rounded by itself (-ffp-contract=off), half to even, ranks in order.
#pragma once

#include <cstddef>
#include <cstdint>

namespace narrowcast {

enum class Dtype : int { bf16 = 0, fp16 = 1, fp32 = 2 };

// T rows of E values: addresses of rows are `stride` values apart, those of values in a row one.
struct Rows {
  void* data;
  Dtype dtype;
  ptrdiff_t stride;
  size_t num_rows, num_values;

  void* row(size_t index) const {
    const ptrdiff_t itemsize = dtype == Dtype::fp32 ? 4 : 2;
    return static_cast<char*>(data) + static_cast<ptrdiff_t>(index) * stride * itemsize;
  }
};

// T rows of B bytes, `stride` apart.
struct Payload {
  uint8_t* data;
  ptrdiff_t stride;

  uint8_t* row(size_t index) const { return data + static_cast<ptrdiff_t>(index) * stride; }
};

// Payloads of several ranks, `rank_stride` bytes apart; they were coded by the sources first, first + 1, ...
struct Payloads {
  Payload first;
  ptrdiff_t rank_stride;
  size_t num_ranks;
  size_t first_source;

  const uint8_t* row(size_t rank, size_t index) const {
    return first.row(index) + static_cast<ptrdiff_t>(rank) * rank_stride;
  }
};

struct Counts {
  int64_t saturated = 0, non_finite = 0, guarded = 0;
};

// Room for one row, with space for vectors that run over the end (kScratchSlack bytes).
struct Scratch {
  float *values, *spare;  // [E]: a row on its way through `recode`; for whatever a kernel likes
  float* total;           // [E]: a sum that a kernel takes apart from the others, or whatever it likes
  uint8_t* codes;         // [R, codes_stride]
  size_t codes_stride;
  float* groups;          // [kGroupRows, groups_stride]: numbers for each group of features
  size_t groups_stride;

  float* group_row(size_t index) const { return groups + index * groups_stride; }
};

constexpr size_t kScratchSlack = 256;
constexpr size_t kGroupRows = 6, kSmallestGroup = 16;

enum class Kind : int { cast, feature, group, minifloat, allocated };

// A floating-point format of 8 bits or fewer (codecs/floats.py). Codes above the largest are NaN.
struct Element {
  int num_bits, mantissa_bits, smallest_exponent, largest_code;

  int sign() const { return 1 << (num_bits - 1); }
  bool has_nan() const { return largest_code < sign() - 1; }
  int nan_code() const { return sign() - 1; }
  int largest_exponent() const { return (largest_code >> mantissa_bits) - 1 + smallest_exponent; }
  float largest() const {
    const int mantissa = (largest_code & ((1 << mantissa_bits) - 1)) | 1 << mantissa_bits;
    return static_cast<float>(mantissa) * static_cast<float>(1 << (largest_exponent() - mantissa_bits + 8)) / 256;
  }
};

constexpr Element kE4m3 = {8, 3, -6, 0x7E};

enum class ScaleFormat : int { bf16 = 0, e8m0 = 1, e4m3 = 2 };

// What the codes of `allocated` stand for (codecs/token_scale.py, trellis.py). Rows are by width, from one bit on, and
// again those of first values.
struct LevelTables {
  const float *token_scale, *token_reciprocal;  // [256], by code; zero where a code stands for no number
  const float* scale_edges;                     // [256]: mean squares at which the next code begins, then NaN
  const float* levels;                          // [16, 512], ascending: those of four subsets in turn
  // For encoders, in units of 2**-width (codecs/kernels/cpu.py):
  const float* by_subset;                       // [16, 4, 128]: levels
  const float *edges, *bisected;                // [16, 512]: ascending, then infinity; by bisection, then NaN
  const float* nearest;                         // [16, 512, 4]: levels by how many edges are not above a value
  const uint16_t* up_to;                        // [16, 2048]: how many edges lie below place / 128 - 8
};

// A codec with its parameters, which belong to the Python codec.
struct Format {
  Kind kind;
  Dtype dtype;   // cast
  int num_bits;  // feature, group
  size_t num_features;  // feature, allocated: as calibrated
  // feature: FP32 [R, E], by slot (of which there are fewer than E); reciprocals by feature, zero where there is an
  // outlier; int64 [K], [H], [H].
  const float *scale, *reciprocal;
  const int64_t *outliers, *holes, *fillers;
  size_t num_outliers, num_holes;
  bool tame;  // feature: sums of finite values neither overflow nor are subnormal, for any number of ranks up to R
  int guard_bits;  // feature: of tokens far out of range, which are coded as `group`, symmetric; 0 for no guard
  size_t guard_group_size;
  size_t group_size;       // group; minifloat, where 0 means all features
  bool symmetric, spikes;  // group
  Element element;         // minifloat
  ScaleFormat scale_format;
  // allocated: `scale` is FP32 [R, 32 * N], by slot, `reciprocal` [R, E] by feature, zero where it is sent in BF16;
  // features by slot [R, 32 * N], E in slots that have none; slots by feature [R, 32 * N]; bits of blocks [R, N], never
  // rising.
  const uint16_t *order, *slots;
  const uint8_t* widths;
  size_t num_blocks, num_escapes, row_nbytes;
  bool same_order;  // of all sources
  LevelTables tables;
};

struct WeightKernels;  // weights/weights.h
struct Attention;  // ../decode/decode.h
struct RmsNorm;
struct Combination;

// One path. Row ranges [begin, end) let threads share a tensor.
struct Kernels {
  const char* name;
  void (*encode)(const Format&, const Rows& x, size_t source, const Payload& out, Counts&, const Scratch&,
                 size_t begin, size_t end);
  // Codes x + residue, and leaves in the residue (FP32) what is lost, or nothing of what is not finite.
  void (*encode_with_residue)(const Format&, const Rows& x, const Rows& residue, size_t source, const Payload& out,
                              Counts&, const Scratch&, size_t begin, size_t end);
  void (*decode_sum)(const Format&, const Payloads&, const Rows& out, const Scratch&, size_t begin, size_t end);
  // What two_shot does to a share: add up, and code the sum again, a row at a time.
  void (*recode)(const Format& partial, const Payloads&, const Format& reduced, size_t num_features,
                 const Payload& out, Counts&, const Scratch&, size_t begin, size_t end);
  const WeightKernels* weights;
  // Attention of few queries, by units of work; where the context has several pieces, partial results are joined.
  void (*attend)(const Attention&, float* scratch, float* partials, size_t begin, size_t end);
  void (*join)(const Attention&, const float* partials, size_t begin, size_t end);
  void (*norm)(const RmsNorm&, size_t begin, size_t end);
  void (*combine)(const Combination&, size_t begin, size_t end);
};

extern const Kernels avx512_bf16_kernels, avx512_kernels, avx2_kernels, portable_kernels;

}  // namespace narrowcast
