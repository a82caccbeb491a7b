// The Python module narrowcast._native: kernels of the codecs, the TCP mesh, the link emulator.
// Tensors come as addresses; the GIL is released while anything is done with them.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_link(nb::module_& m);

NB_MODULE(_native, m) {
  m.doc() = "Kernels of the codecs, the TCP mesh, the link emulator.";
  bind_link(m);
}
