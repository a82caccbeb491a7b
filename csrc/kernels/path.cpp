// All kernels of one path. CMakeLists.txt compiles this file once for each, with its flags and its name.
#include <type_traits>

#include "allocated.h"
#include "cast.h"
#include "feature.h"
#include "minifloat.h"
#include "weights/weights.h"
#include "../decode/elementwise.h"
#include "../decode/norm.h"

namespace narrowcast {
namespace NARROWCAST_PATH {

#define NARROWCAST_QUOTED(name) #name
#define NARROWCAST_TEXT(macro) NARROWCAST_QUOTED(macro)
#define NARROWCAST_JOINED(left, right) left##right
#define NARROWCAST_TABLE(path) NARROWCAST_JOINED(path, _kernels)
#define NARROWCAST_WEIGHTS(path) NARROWCAST_JOINED(path, _weights)

// Calls `body` with a null pointer that tells the type of the values.
template <class Body>
NARROWCAST_INLINE void with_dtype(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::bf16: body(static_cast<Bf16*>(nullptr)); return;
    case Dtype::fp16: body(static_cast<Fp16*>(nullptr)); return;
    case Dtype::fp32: body(static_cast<float*>(nullptr)); return;
  }
}

static void encode(const Format& format, const Rows& x, size_t source, const Payload& out, Counts& counts,
                   const Scratch& scratch, size_t begin, size_t end) {
  with_dtype(x.dtype, [&](auto* from) {
    switch (format.kind) {
      case Kind::cast:
        with_dtype(format.dtype, [&](auto* to) { cast_encode_rows(from, x, to, out, counts, begin, end); });
        return;
      case Kind::feature: feature_encode_rows(from, format, x, source, out, counts, scratch, begin, end); return;
      case Kind::group: group_encode_rows(from, format, x, out, counts, scratch, begin, end); return;
      case Kind::minifloat: minifloat_encode_rows(from, format, x, out, counts, scratch, begin, end); return;
      case Kind::allocated:
        allocated_encode_rows(from, format, x, source, out, counts, scratch, begin, end);
        return;
    }
  });
}

template <class T>
NARROWCAST_INLINE void add_row(const T* x, float* residue, size_t num_values) {
  for_each_vector(num_values, [&](size_t first, size_t count) {
    store(residue + first, load(x + first, count) + load(residue + first, count), count);
  });
}

NARROWCAST_INLINE void keep_lost_row(float* coded, const float* decoded, size_t num_values) {
  for_each_vector(num_values, [&](size_t first, size_t count) {
    const F32 lost = load(coded + first, count) - load(decoded + first, count);
    store(coded + first, select(lost - lost == splat(0.0f), lost, splat(0.0f)), count);
  });
}

template <class T>
static void decode_sum_row(const Format& format, const Payloads& payloads, size_t row, const Scratch& scratch, T* out,
                           size_t num_values) {
  switch (format.kind) {
    case Kind::cast:
      with_dtype(format.dtype, [&](auto* from) { cast_decode_sum_row(from, payloads, row, num_values, out); });
      return;
    case Kind::feature: feature_decode_sum_row(format, payloads, row, scratch, out); return;
    case Kind::group: group_decode_sum_row(format, payloads, row, scratch, out, num_values); return;
    case Kind::minifloat: minifloat_decode_sum_row(format, payloads, row, scratch, out, num_values); return;
    case Kind::allocated: allocated_decode_sum_row(format, payloads, row, scratch, out); return;
  }
}

static void decode_sum(const Format& format, const Payloads& payloads, const Rows& out, const Scratch& scratch,
                       size_t begin, size_t end) {
  with_dtype(out.dtype, [&](auto* to) {
    for (size_t row = begin; row < end; ++row) {
      decode_sum_row(format, payloads, row, scratch, static_cast<decltype(to)>(out.row(row)), out.num_values);
    }
  });
}

static void encode_with_residue(const Format& format, const Rows& x, const Rows& residue, size_t source,
                                const Payload& out, Counts& counts, const Scratch& scratch, size_t begin, size_t end) {
  for (size_t row = begin; row < end; ++row) {
    float* coded = static_cast<float*>(residue.row(row));
    with_dtype(x.dtype, [&](auto* from) {
      add_row(static_cast<const std::remove_pointer_t<decltype(from)>*>(x.row(row)), coded, x.num_values);
    });
    encode(format, {coded, Dtype::fp32, 0, 1, x.num_values}, source, {out.row(row), 0}, counts, scratch, 0, 1);
    const Payloads payload = {{out.row(row), 0}, 0, 1, source};
    decode_sum_row(format, payload, 0, scratch, scratch.values, x.num_values);
    keep_lost_row(coded, scratch.values, x.num_values);
  }
}

static void recode(const Format& partial, const Payloads& payloads, const Format& reduced, size_t num_features,
                   const Payload& out, Counts& counts, const Scratch& scratch, size_t begin, size_t end) {
  const Rows total = {scratch.values, Dtype::fp32, 0, 1, num_features};
  for (size_t row = begin; row < end; ++row) {
    decode_sum_row(partial, payloads, row, scratch, scratch.values, num_features);
    encode(reduced, total, 0, {out.row(row), 0}, counts, scratch, 0, 1);
  }
}

static void attend(const Attention& a, float* scratch, float* partials, size_t begin, size_t end) {
  with_dtype(a.dtype, [&](auto* of) { attend_units(of, a, scratch, partials, begin, end); });
}

static void join(const Attention& a, const float* partials, size_t begin, size_t end) {
  with_dtype(a.dtype, [&](auto* of) { join_pieces(of, a, partials, begin, end); });
}

static void norm(const RmsNorm& n, size_t begin, size_t end) {
  with_dtype(n.dtype, [&](auto* of) { norm_rows(of, n, begin, end); });
}

}  // namespace NARROWCAST_PATH

const Kernels NARROWCAST_TABLE(NARROWCAST_PATH) = {
    NARROWCAST_TEXT(NARROWCAST_PATH),
    NARROWCAST_PATH::encode,
    NARROWCAST_PATH::encode_with_residue,
    NARROWCAST_PATH::decode_sum,
    NARROWCAST_PATH::recode,
    &NARROWCAST_WEIGHTS(NARROWCAST_PATH),
    NARROWCAST_PATH::attend,
    NARROWCAST_PATH::join,
    NARROWCAST_PATH::norm,
    NARROWCAST_PATH::combine_rows,
};

}  // namespace narrowcast
