// narrowcast._native.Schedule, and the operators that it may have: each is declared once, run by the module's function
// and noted by the schedule's method, with the same arguments.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <utility>

#include "kernels/paths.h"
#include "recorded_sum.h"
#include "schedules/schedule.h"

namespace nb = nanobind;

namespace narrowcast {
namespace {

using Place = std::tuple<uintptr_t, ptrdiff_t, ptrdiff_t, ptrdiff_t>;  // address; strides by sequence, head, token
using Matrix = std::tuple<uintptr_t, int, ptrdiff_t, size_t, size_t>;  // address, dtype, stride, rows, values of a row

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Heads heads(const Place& place) {
  return {at<void>(std::get<0>(place)), std::get<1>(place), std::get<2>(place), std::get<3>(place)};
}

Rows rows(const Matrix& x) {
  return {at<void>(std::get<0>(x)), static_cast<Dtype>(std::get<1>(x)), std::get<2>(x), std::get<3>(x), std::get<4>(x)};
}

Mask mask_of(const Place& mask, ptrdiff_t key, MaskKind kind, Dtype dtype) {
  return {at<const void>(std::get<0>(mask)), kind, dtype, std::get<1>(mask), std::get<2>(mask), std::get<3>(mask), key};
}

// With the longest of the sequences as context, once all of `num_keys` keys are found to be in a cache of `num_places`.
void set_paged(Attention& a, const int64_t* places, size_t num_keys, size_t num_places, const int64_t* spans) {
  const auto is_span = [&](int64_t begin, int64_t end) {
    const int64_t least = static_cast<int64_t>(a.num_queries), most = static_cast<int64_t>(a.context);
    const bool inside = 0 <= begin && begin <= end && end <= static_cast<int64_t>(num_keys);
    return inside && end - begin >= least && end - begin <= most;
  };
  size_t longest = 0;
  for (size_t b = 0; b < a.num_sequences; ++b) {
    if (!is_span(spans[2 * b], spans[2 * b + 1])) throw nb::value_error("spans that are none of these keys");
    longest = std::max(longest, static_cast<size_t>(spans[2 * b + 1] - spans[2 * b]));
  }
  for (size_t key = 0; key < num_keys; ++key) {
    if (static_cast<uint64_t>(places[key]) >= num_places) throw nb::value_error("keys that are not in the cache");
  }
  a.context = longest;
  a.paged = {places, spans};
}

Attention attention(int dtype, size_t num_sequences, size_t num_heads, size_t num_kv_heads, size_t num_queries,
                    size_t context, size_t head_dim, float scale, float softcap, bool causal, const Place& q,
                    const Place& k, const Place& v, const Place& out, int mask_kind, int mask_dtype, const Place& mask,
                    ptrdiff_t mask_key, const Place& new_k, const Place& new_v, uintptr_t cos, uintptr_t sin,
                    ptrdiff_t turn_sequence, ptrdiff_t turn_token, size_t turn_size, uintptr_t places, size_t num_keys,
                    size_t num_places, uintptr_t spans) {
  const Mask limits = mask_of(mask, mask_key, static_cast<MaskKind>(mask_kind), static_cast<Dtype>(mask_dtype));
  const NewTokens added = {heads(new_k),  heads(new_v), at<const void>(cos), at<const void>(sin),
                           turn_sequence, turn_token,   turn_size};
  Attention a = {static_cast<Dtype>(dtype), num_sequences, num_heads, num_kv_heads, num_queries, context, head_dim,
                 scale, softcap, causal, heads(q), heads(k), heads(v), heads(out), limits, added, {}};
  if (places) set_paged(a, at<const int64_t>(places), num_keys, num_places, at<const int64_t>(spans));
  return a;
}

RmsNorm rms_norm(int dtype, uintptr_t x, ptrdiff_t stride, uintptr_t weight, uintptr_t out, size_t num_rows,
                 size_t num_values, float epsilon, bool from_one) {
  return {static_cast<Dtype>(dtype), at<const void>(x), at<const void>(weight), at<void>(out), stride,
          static_cast<ptrdiff_t>(num_values), num_rows, num_values, epsilon, from_one};
}

Combination combination(int how, const Matrix& a, const Matrix& b, const Matrix& out) {
  return {static_cast<How>(how), rows(a), rows(b), rows(out)};
}

Function function(uintptr_t table, const Matrix& x, const Matrix& out) {
  return {at<const uint16_t>(table), rows(x), rows(out)};
}

PackedProduct packed_product(const PackedMatrix& matrix, size_t first_row, size_t num_rows, size_t first_column,
                             size_t num_columns, uintptr_t x, int dtype, size_t num_tokens, ptrdiff_t x_stride,
                             uintptr_t bias, uintptr_t y, ptrdiff_t y_stride, size_t num_threads) {
  const Rows from = {at<void>(x), static_cast<Dtype>(dtype), x_stride, num_tokens, num_columns};
  const Rows to = {at<void>(y), static_cast<Dtype>(dtype), y_stride, num_tokens, num_rows};
  return {matrix, {first_row, num_rows, first_column, num_columns}, from, at<const void>(bias), to, num_threads};
}

DenseProduct dense_product(uintptr_t weight, ptrdiff_t stride, size_t num_rows, size_t num_columns, uintptr_t x,
                           size_t num_tokens, uintptr_t bias, uintptr_t y, ptrdiff_t y_stride, size_t num_threads) {
  const Rows from = {at<void>(x), Dtype::bf16, ptrdiff_t(num_columns), num_tokens, num_columns};
  const Rows to = {at<void>(y), Dtype::bf16, y_stride, num_tokens, num_rows};
  return {{at<const uint16_t>(weight), size_t(stride), num_rows, num_columns}, from, at<const void>(bias), to,
          num_threads};
}

class RecordedSchedule {
 public:
  // `kept`: whatever the steps point to, and that does not move.
  RecordedSchedule(std::vector<std::pair<uintptr_t, size_t>> moving, nb::object kept)
      : schedule_(std::move(moving)), kept_(std::move(kept)) {}

  template <class Operator>
  void add(const Operator& recorded) {
    schedule_.add(recorded);
  }

  void sum(RecordedSum& sum, uintptr_t x, uintptr_t y, uintptr_t residue, uintptr_t stats) {
    const uintptr_t bases[] = {0, x, y, residue};
    schedule_.add_sum(sum.steps(), bases, stats);
  }

  nb::object run(const std::vector<uintptr_t>& moving, const Place& keys, const Place& values, size_t context,
                 const Place& mask, ptrdiff_t mask_key, const std::vector<uint64_t>& tags, double timeout_s) {
    if (moving.size() != schedule_.num_moving()) throw nb::value_error("one address for each tensor that moves");
    const Mask limits = mask_of(mask, mask_key, MaskKind::none, Dtype::bf16);
    schedule_.begin(moving, {heads(keys), heads(values), context, limits}, tags);
    const auto proceed = [&](const Kernels& kernels, Clock::duration patience) {
      return schedule_.proceed(kernels, patience);
    };
    return run_until_done(proceed, timeout_s);
  }

 private:
  Schedule schedule_;
  nb::object kept_;
};

template <class Operator, class... Arguments>
void bind_operator(nb::module_& m, nb::class_<RecordedSchedule>& schedule, const char* name,
                   Operator (*make)(Arguments...)) {
  m.def(name, [make](Arguments... arguments) {
    const Operator made = make(arguments...);
    nb::gil_scoped_release release;
    run(made);
  });
  schedule.def(name, [make](RecordedSchedule& s, Arguments... arguments) { s.add(make(arguments...)); });
}

}  // namespace
}  // namespace narrowcast

void bind_schedule(nb::module_& m) {
  using namespace narrowcast;
  nb::class_<RecordedSchedule> schedule(m, "Schedule");
  schedule.def(nb::init<std::vector<std::pair<uintptr_t, size_t>>, nb::object>())
      .def("sum", &RecordedSchedule::sum)
      .def("run", &RecordedSchedule::run);
  bind_operator(m, schedule, "attend", &attention);
  bind_operator(m, schedule, "rms_norm", &rms_norm);
  bind_operator(m, schedule, "combine", &combination);
  bind_operator(m, schedule, "look_up", &function);
  bind_operator(m, schedule, "multiply_packed", &packed_product);
  bind_operator(m, schedule, "multiply_bf16", &dense_product);
}
