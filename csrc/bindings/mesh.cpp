// narrowcast._native.Mesh and Exchange: what transport/tcp.py calls.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <tuple>

#include "exchanges.h"
#include "mesh/mesh.h"

namespace nb = nanobind;

namespace narrowcast {

namespace {

// Exchanges that Python has let go of before they were over: the engine still writes into their buffers.
// Guarded by the GIL; never destroyed.
struct LetGo {
  std::unique_ptr<Operation> operation;
  nb::object buffers;
};

std::vector<LetGo>& all_let_go() {
  static auto* all = new std::vector<LetGo>;
  return *all;
}

void sweep() {
  auto& all = all_let_go();
  const auto over = [](const LetGo& each) { return each.operation->left.load() == 0; };
  all.erase(std::remove_if(all.begin(), all.end(), over), all.end());
}

class Exchange {
 public:
  Exchange(std::unique_ptr<Operation> operation, nb::object buffers, bool spin)
      : operation_(std::move(operation)), buffers_(std::move(buffers)), spin_(spin) {}
  Exchange(Exchange&&) = default;
  ~Exchange() {
    if (operation_ != nullptr && operation_->left.load() > 0) let_go(std::move(operation_), std::move(buffers_));
  }

  // None, or what went wrong: ("lost" | "timeout" | "mismatch", peer, reason, found bytes, expected bytes).
  nb::object wait(double timeout_s) {
    const auto deadline = Clock::now() + std::chrono::nanoseconds(int64_t(timeout_s * 1e9));
    while (true) {
      const Outcome outcome = wait_until(deadline);
      if (outcome.trouble == Trouble::none) return nb::none();
      if (outcome.trouble != Trouble::interrupted) return described(outcome);
      if (PyErr_CheckSignals() != 0) throw nb::python_error();
    }
  }

 private:
  Outcome wait_until(Clock::time_point deadline) {
    if (operation_->left.load(std::memory_order_acquire) == 0 && !operation_->failed) return {};
    nb::gil_scoped_release released;
    return Engine::get().wait(*operation_, deadline, spin_);
  }

  std::unique_ptr<Operation> operation_;
  nb::object buffers_;
  bool spin_;
};

Exchange exchange(Mesh& mesh, const Buffers& sends, const Buffers& recvs, uint64_t tag, nb::object buffers) {
  if (!all_let_go().empty()) sweep();
  std::unique_ptr<Operation> operation;
  {
    nb::gil_scoped_release released;
    operation = mesh.exchange(addressed(sends), addressed(recvs), tag);
  }
  return Exchange(std::move(operation), std::move(buffers), mesh.spins());
}

void hang_up() {
  nb::gil_scoped_release released;
  Engine::get().hang_up("this rank has lost another");
}

}  // namespace

std::vector<Buffer> addressed(const Buffers& buffers) {
  std::vector<Buffer> found;
  found.reserve(buffers.size());
  for (const auto& [peer, address, nbytes] : buffers) found.push_back({peer, reinterpret_cast<char*>(address), nbytes});
  return found;
}

nb::object described(const Outcome& outcome) {
  const char* name = outcome.trouble == Trouble::lost ? "lost" : outcome.trouble == Trouble::timeout ? "timeout" : "mismatch";
  return nb::make_tuple(name, outcome.peer, outcome.reason, outcome.found, outcome.expected);
}

void let_go(std::unique_ptr<Operation> operation, nb::object buffers) {
  all_let_go().push_back({std::move(operation), std::move(buffers)});
}

}  // namespace narrowcast

void bind_mesh(nb::module_& m) {
  using namespace narrowcast;
  nb::class_<Exchange>(m, "Exchange").def("wait", &Exchange::wait, nb::arg("timeout_s"));
  nb::class_<Mesh>(m, "Mesh")
      .def(nb::init<const std::vector<int>&, bool>(), nb::arg("fds"), nb::arg("spin"))
      .def("exchange", &exchange, nb::arg("sends"), nb::arg("recvs"), nb::arg("tag"), nb::arg("buffers"));
  m.def("hang_up", &hang_up);
}
