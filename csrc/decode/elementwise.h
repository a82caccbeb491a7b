// Values combined one by one, in FP32, rounded to the dtype of the result: as PyTorch does with BF16 and FP32.
#pragma once

#include "../kernels/values.h"
#include "decode.h"

namespace narrowcast {
namespace NARROWCAST_PATH {

NARROWCAST_INLINE F32 load_from(const Rows& x, size_t row, size_t i, size_t count) {
  if (x.dtype == Dtype::fp32) return load(static_cast<const float*>(x.row(row)) + i, count);
  return load(static_cast<const Bf16*>(x.row(row)) + i, count);
}

NARROWCAST_INLINE void store_to(const Rows& out, size_t row, size_t i, F32 value, size_t count) {
  if (out.dtype == Dtype::fp32) return store(static_cast<float*>(out.row(row)) + i, value, count);
  store(static_cast<Bf16*>(out.row(row)) + i, value, count);
}

static void combine_rows(const Combination& c, size_t begin, size_t end) {
  for (size_t row = begin; row < end; ++row) {
    for_each_vector(c.out.num_values, [&](size_t i, size_t count) {
      const F32 a = load_from(c.a, row, i, count);
      switch (c.how) {
        case How::copy: return store_to(c.out, row, i, a, count);
        case How::add: return store_to(c.out, row, i, a + load_from(c.b, row, i, count), count);
        case How::multiply: return store_to(c.out, row, i, a * load_from(c.b, row, i, count), count);
      }
    });
  }
}

}  // namespace NARROWCAST_PATH
}  // namespace narrowcast
