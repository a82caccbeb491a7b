// narrowcast._native.Sum: what collectives/one_call.py records, and runs.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <utility>

#include "recorded_sum.h"

namespace nb = nanobind;

namespace narrowcast {
namespace {

using Place = std::tuple<int, uintptr_t>;  // Base, and the address or the bytes from there

Address address(const Place& place) { return {static_cast<Base>(std::get<0>(place)), std::get<1>(place)}; }

Step sized(Action action, const Format& format, size_t num_tokens, size_t num_features) {
  Step step{};
  step.action = action;
  step.format = &format;
  step.num_tokens = num_tokens;
  step.num_features = num_features;
  return step;
}

Step encoded(Action action, const Format& format, const Place& x, int dtype, size_t num_tokens, size_t num_features,
             ptrdiff_t stride, size_t source, const Place& out, ptrdiff_t out_stride) {
  Step step = sized(action, format, num_tokens, num_features);
  step.values = {address(x), static_cast<Dtype>(dtype), stride};
  step.source = source;
  step.payload = {address(out), out_stride};
  return step;
}

void encode(RecordedSum& sum, const Format& format, const Place& x, int dtype, size_t num_tokens, size_t num_features,
            ptrdiff_t stride, size_t source, const Place& out, ptrdiff_t out_stride) {
  sum.steps().add(encoded(Action::encode, format, x, dtype, num_tokens, num_features, stride, source, out, out_stride));
}

void encode_with_residue(RecordedSum& sum, const Format& format, const Place& x, int dtype, size_t num_tokens,
                         size_t num_features, ptrdiff_t stride, const Place& residue, ptrdiff_t residue_stride,
                         size_t source, const Place& out, ptrdiff_t out_stride) {
  Step step = encoded(Action::encode_with_residue, format, x, dtype, num_tokens, num_features, stride, source, out,
                      out_stride);
  step.residue = {address(residue), Dtype::fp32, residue_stride};
  sum.steps().add(std::move(step));
}

void decode_sum(RecordedSum& sum, const Format& format, const Place& payloads, size_t num_ranks,
                ptrdiff_t rank_stride, ptrdiff_t token_stride, size_t first_source, const Place& out, int dtype,
                size_t num_tokens, size_t num_features, ptrdiff_t stride) {
  Step step = sized(Action::decode_sum, format, num_tokens, num_features);
  step.payload = {address(payloads), token_stride};
  step.num_ranks = num_ranks;
  step.rank_stride = rank_stride;
  step.source = first_source;
  step.values = {address(out), static_cast<Dtype>(dtype), stride};
  sum.steps().add(std::move(step));
}

void recode(RecordedSum& sum, const Format& partial, const Place& payloads, size_t num_ranks, ptrdiff_t rank_stride,
            ptrdiff_t token_stride, const Format& reduced, size_t num_tokens, size_t num_features, const Place& out,
            ptrdiff_t out_stride) {
  Step step = sized(Action::recode, partial, num_tokens, num_features);
  step.payloads = {address(payloads), token_stride};
  step.num_ranks = num_ranks;
  step.rank_stride = rank_stride;
  step.reduced = &reduced;
  step.payload = {address(out), out_stride};
  sum.steps().add(std::move(step));
}

void exchange(RecordedSum& sum, const Buffers& sends, const Buffers& recvs) {
  sum.steps().add_exchange(addressed(sends), addressed(recvs));
}

nb::object run(RecordedSum& sum, uintptr_t x, uintptr_t y, uintptr_t residue, uintptr_t stats, uint64_t tag,
               double timeout_s) {
  const uintptr_t bases[] = {0, x, y, residue};
  sum.steps().begin(bases, reinterpret_cast<int64_t*>(stats), tag);
  const auto proceed = [&](const Kernels& kernels, Clock::duration patience) {
    return sum.steps().proceed(kernels, patience);
  };
  return run_until_done(proceed, timeout_s);
}

}  // namespace
}  // namespace narrowcast

void bind_sum(nb::module_& m) {
  using namespace narrowcast;
  nb::class_<RecordedSum>(m, "Sum")
      .def(nb::init<Mesh&, nb::object>(), nb::arg("mesh"), nb::arg("kept"), nb::keep_alive<1, 2>())
      .def("encode", &encode)
      .def("encode_with_residue", &encode_with_residue)
      .def("decode_sum", &decode_sum)
      .def("recode", &recode)
      .def("exchange", &exchange)
      .def("run", &run);
}
