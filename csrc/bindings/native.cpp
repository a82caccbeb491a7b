// The Python module narrowcast._native: kernels of the codecs, the TCP mesh, sums that are one call of both, products
// with weights in few bits, and layers that are one call of all of these.
// Tensors come as addresses; the GIL is released while anything is done with them.
#include <nanobind/nanobind.h>

void bind_kernels(nanobind::module_& m);
void bind_mesh(nanobind::module_& m);
void bind_schedule(nanobind::module_& m);
void bind_sum(nanobind::module_& m);
void bind_weights(nanobind::module_& m);

NB_MODULE(_native, m) {
  m.doc() = "Kernels of the codecs and the TCP mesh.";
  nanobind::set_leak_warnings(false);  // what caches hold when Python ends is no leak
  bind_kernels(m);
  bind_mesh(m);
  bind_sum(m);
  bind_weights(m);
  bind_schedule(m);
}
