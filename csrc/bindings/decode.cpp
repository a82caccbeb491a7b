// What Python sees of a decoding step: attention of few queries, and norms.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <tuple>
#include <vector>

#include "decode/decode.h"
#include "kernels/paths.h"
#include "kernels/threads.h"

namespace nb = nanobind;

namespace narrowcast {
namespace {

using Place = std::tuple<uintptr_t, ptrdiff_t, ptrdiff_t, ptrdiff_t>;  // address; strides by sequence, head, token

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Heads heads(const Place& place) {
  return {at<void>(std::get<0>(place)), std::get<1>(place), std::get<2>(place), std::get<3>(place)};
}

void run(const Attention& a) {
  const Kernels* path = selected_kernels();
  const size_t num_units = a.num_units(), rows = a.rows();
  const bool in_pieces = a.num_pieces() > 1;
  thread_local std::vector<float> partials;
  if (in_pieces) partials.resize(num_units * rows * a.partial_size());
  float* shared = partials.data();
  const size_t nbytes =
      2 * a.num_sequences * a.num_kv_heads * a.context * a.head_dim * (a.dtype == Dtype::fp32 ? 4 : 2);
  const size_t effort = nbytes * (rows + 3) / 4;  // of one row reading is most, of others arithmetic
  for_rows(num_units, effort, a.scratch_size(), 0, [&](size_t begin, size_t end, const Scratch& scratch) {
    path->attend(a, scratch.values, shared, begin, end);
  });
  if (in_pieces) path->join(a, shared, 0, a.num_sequences * a.num_kv_heads);
}

void attend(int dtype, size_t num_sequences, size_t num_heads, size_t num_kv_heads, size_t num_queries, size_t context,
            size_t head_dim, float scale, float softcap, bool causal, const Place& q, const Place& k, const Place& v,
            const Place& out, int mask_kind, int mask_dtype, const Place& mask, ptrdiff_t mask_key,
            const Place& new_k, const Place& new_v, uintptr_t cos, uintptr_t sin, ptrdiff_t turn_sequence,
            ptrdiff_t turn_token, size_t turn_size) {
  nb::gil_scoped_release release;
  const Mask limits = {at<const void>(std::get<0>(mask)), static_cast<MaskKind>(mask_kind),
                       static_cast<Dtype>(mask_dtype),    std::get<1>(mask),
                       std::get<2>(mask),                 std::get<3>(mask),
                       mask_key};
  const NewTokens added = {heads(new_k),  heads(new_v), at<const void>(cos), at<const void>(sin),
                           turn_sequence, turn_token,   turn_size};
  run({static_cast<Dtype>(dtype), num_sequences, num_heads, num_kv_heads, num_queries, context, head_dim, scale,
       softcap, causal, heads(q), heads(k), heads(v), heads(out), limits, added});
}

void rms_norm(int dtype, uintptr_t x, ptrdiff_t stride, uintptr_t weight, uintptr_t out, size_t num_rows,
              size_t num_values, float epsilon, bool from_one) {
  nb::gil_scoped_release release;
  const RmsNorm norm = {static_cast<Dtype>(dtype), at<const void>(x), at<const void>(weight), at<void>(out), stride,
                        static_cast<ptrdiff_t>(num_values), num_rows, num_values, epsilon, from_one};
  const Kernels* path = selected_kernels();
  for_rows(num_rows, num_rows * num_values * (norm.dtype == Dtype::fp32 ? 4 : 2), 0, 0,
           [&](size_t begin, size_t end, const Scratch&) { path->norm(norm, begin, end); });
}

}  // namespace
}  // namespace narrowcast

void bind_decode(nb::module_& m) {
  m.def("attend", &narrowcast::attend);
  m.def("rms_norm", &narrowcast::rms_norm);
}
