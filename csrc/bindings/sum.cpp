// narrowcast._native.Sum: what collectives/one_call.py records, and runs.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <utility>

#include "exchanges.h"
#include "kernels/paths.h"
#include "sums/sum.h"

namespace nb = nanobind;

namespace narrowcast {
namespace {

using Place = std::tuple<int, uintptr_t>;  // Base, and the address or the bytes from there

Address address(const Place& place) { return {static_cast<Base>(std::get<0>(place)), std::get<1>(place)}; }

class RecordedSum {
 public:
  // `kept`: whatever the steps point to.
  RecordedSum(Mesh& mesh, nb::object kept) : sum_(mesh), kept_(std::move(kept)) {}
  RecordedSum(RecordedSum&&) = delete;
  ~RecordedSum() {
    for (auto& operation : sum_.abandon()) let_go(std::move(operation), kept_);
  }

  void encode(const Format& format, const Place& x, int dtype, size_t num_tokens, size_t num_features,
              ptrdiff_t stride, size_t source, const Place& out, ptrdiff_t out_stride) {
    sum_.add(encoded(Action::encode, format, x, dtype, num_tokens, num_features, stride, source, out, out_stride));
  }

  void encode_with_residue(const Format& format, const Place& x, int dtype, size_t num_tokens, size_t num_features,
                           ptrdiff_t stride, const Place& residue, ptrdiff_t residue_stride, size_t source,
                           const Place& out, ptrdiff_t out_stride) {
    Step step = encoded(Action::encode_with_residue, format, x, dtype, num_tokens, num_features, stride, source, out,
                        out_stride);
    step.residue = {address(residue), Dtype::fp32, residue_stride};
    sum_.add(std::move(step));
  }

  void decode_sum(const Format& format, const Place& payloads, size_t num_ranks, ptrdiff_t rank_stride,
                  ptrdiff_t token_stride, size_t first_source, const Place& out, int dtype, size_t num_tokens,
                  size_t num_features, ptrdiff_t stride) {
    Step step = sized(Action::decode_sum, format, num_tokens, num_features);
    step.payload = {address(payloads), token_stride};
    step.num_ranks = num_ranks;
    step.rank_stride = rank_stride;
    step.source = first_source;
    step.values = {address(out), static_cast<Dtype>(dtype), stride};
    sum_.add(std::move(step));
  }

  void recode(const Format& partial, const Place& payloads, size_t num_ranks, ptrdiff_t rank_stride,
              ptrdiff_t token_stride, const Format& reduced, size_t num_tokens, size_t num_features, const Place& out,
              ptrdiff_t out_stride) {
    Step step = sized(Action::recode, partial, num_tokens, num_features);
    step.payloads = {address(payloads), token_stride};
    step.num_ranks = num_ranks;
    step.rank_stride = rank_stride;
    step.reduced = &reduced;
    step.payload = {address(out), out_stride};
    sum_.add(std::move(step));
  }

  void exchange(const Buffers& sends, const Buffers& recvs) { sum_.add_exchange(addressed(sends), addressed(recvs)); }

  // None, or what went wrong; the object is not to be used again then, nor after an exception.
  nb::object run(uintptr_t x, uintptr_t y, uintptr_t residue, uintptr_t stats, uint64_t tag, double timeout_s) {
    const uintptr_t bases[] = {0, x, y, residue};
    const auto patience = std::chrono::nanoseconds(int64_t(timeout_s * 1e9));
    sum_.begin(bases, reinterpret_cast<int64_t*>(stats), tag);
    while (true) {
      Outcome outcome;
      {
        nb::gil_scoped_release released;
        outcome = sum_.proceed(*selected_kernels(), patience);
      }
      if (outcome.trouble == Trouble::none) return nb::none();
      if (outcome.trouble != Trouble::interrupted) return described(outcome);
      if (PyErr_CheckSignals() != 0) throw nb::python_error();
    }
  }

 private:
  static Step sized(Action action, const Format& format, size_t num_tokens, size_t num_features) {
    Step step{};
    step.action = action;
    step.format = &format;
    step.num_tokens = num_tokens;
    step.num_features = num_features;
    return step;
  }

  static Step encoded(Action action, const Format& format, const Place& x, int dtype, size_t num_tokens,
                      size_t num_features, ptrdiff_t stride, size_t source, const Place& out, ptrdiff_t out_stride) {
    Step step = sized(action, format, num_tokens, num_features);
    step.values = {address(x), static_cast<Dtype>(dtype), stride};
    step.source = source;
    step.payload = {address(out), out_stride};
    return step;
  }

  Sum sum_;
  nb::object kept_;
};

}  // namespace
}  // namespace narrowcast

void bind_sum(nb::module_& m) {
  using namespace narrowcast;
  nb::class_<RecordedSum>(m, "Sum")
      .def(nb::init<Mesh&, nb::object>(), nb::arg("mesh"), nb::arg("kept"), nb::keep_alive<1, 2>())
      .def("encode", &RecordedSum::encode)
      .def("encode_with_residue", &RecordedSum::encode_with_residue)
      .def("decode_sum", &RecordedSum::decode_sum)
      .def("recode", &RecordedSum::recode)
      .def("exchange", &RecordedSum::exchange)
      .def("run", &RecordedSum::run);
}
