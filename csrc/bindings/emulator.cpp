// The Python module narrowcast._emulator: links between ranks, for benchmarks and tests alone.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "emulator/emulator.h"

namespace nb = nanobind;

NB_MODULE(_emulator, m) {
  using namespace narrowcast;
  m.doc() = "The link emulator.";
  m.def("enter_namespace", &enter_namespace, nb::arg("address"), nb::arg("mtu"),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("carry", &carry, nb::arg("devices"), nb::arg("rate_bps"), nb::arg("delay_s"), nb::arg("queue_bytes"),
        nb::call_guard<nb::gil_scoped_release>());
}
