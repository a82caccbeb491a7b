// What Python has of a sum in one call, and of what else runs with such sums in it.
#pragma once

#include <nanobind/nanobind.h>

#include <utility>

#include "exchanges.h"
#include "kernels/paths.h"
#include "sums/sum.h"

namespace narrowcast {

// Calls `proceed` until all is done, without the GIL but to look for signals. None, or what went wrong: what was run is
// not to be used again then, nor after an exception.
template <class Proceed>
nanobind::object run_until_done(const Proceed& proceed, double timeout_s) {
  const auto patience = std::chrono::nanoseconds(int64_t(timeout_s * 1e9));
  while (true) {
    Outcome outcome;
    {
      nanobind::gil_scoped_release released;
      outcome = proceed(*selected_kernels(), patience);
    }
    if (outcome.trouble == Trouble::none) return nanobind::none();
    if (outcome.trouble != Trouble::interrupted) return described(outcome);
    if (PyErr_CheckSignals() != 0) throw nanobind::python_error();
  }
}

class RecordedSum {
 public:
  // `kept`: whatever the steps point to.
  RecordedSum(Mesh& mesh, nanobind::object kept) : sum_(mesh), kept_(std::move(kept)) {}
  RecordedSum(RecordedSum&&) = delete;
  ~RecordedSum() {
    for (auto& operation : sum_.abandon()) let_go(std::move(operation), kept_);
  }

  Sum& steps() { return sum_; }

 private:
  Sum sum_;
  nanobind::object kept_;
};

}  // namespace narrowcast
