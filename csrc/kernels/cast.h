// `cast`: values as they are, rounded to the codec's dtype; what is not finite afterwards is the canonical NaN.
#pragma once

#include "values.h"

namespace narrowcast {
namespace NARROWCAST_PATH {

// Only a rounded value tells whether it stayed finite: FP16 ends at 65504.
template <class To>
NARROWCAST_INLINE void store_finite(To* to, F32 x, size_t count) {
  store(to, x, count);
  store(to, nan_unless_finite(load(to, count)), count);
}

template <class From, class To>
NARROWCAST_INLINE void store_finite_of(const From*, To* to, F32 x, size_t count) { store_finite(to, x, count); }
NARROWCAST_INLINE void store_finite_of(const Bf16*, Bf16* to, F32 x, size_t count) {
  store_exact(to, nan_unless_finite(x), count);  // nothing to round
}

// Null pointers tell types.
template <class From, class To>
NARROWCAST_FLAT void cast_encode_rows(const From*, const Rows& x, const To*, const Payload& out, Counts& counts,
                                      size_t begin, size_t end) {
  I32 non_finite = {};
  for (size_t row = begin; row < end; ++row) {
    const From* values = static_cast<const From*>(x.row(row));
    To* rounded = reinterpret_cast<To*>(out.row(row));
    for_each_vector(x.num_values, [&](size_t first, size_t count) {
      const F32 value = load(values + first, count);
      non_finite -= not_finite(value);
      store_finite_of(values, rounded + first, value, count);
    });
  }
  counts.non_finite += sum(non_finite);
}

template <class From, class To>
NARROWCAST_FLAT void cast_decode_sum_row(const From*, const Payloads& payloads, size_t row, size_t num_values,
                                         To* out) {
  for_each_vector(num_values, [&](size_t first, size_t count) {
    F32 total = {};
    for (size_t rank = 0; rank < payloads.num_ranks; ++rank) {
      const F32 value = load(reinterpret_cast<const From*>(payloads.row(rank, row)) + first, count);
      total = rank ? total + value : value;
    }
    store(out + first, total, count);
  });
}

}  // namespace NARROWCAST_PATH
}  // namespace narrowcast
