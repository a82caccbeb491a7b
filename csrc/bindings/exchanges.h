// What the bindings of exchanges share.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <tuple>
#include <vector>

#include "mesh/mesh.h"

namespace narrowcast {

using Buffers = std::vector<std::tuple<int, uintptr_t, size_t>>;  // peer, address, bytes

std::vector<Buffer> addressed(const Buffers& buffers);

// Of what went wrong: ("lost" | "timeout" | "mismatch", peer, reason, found bytes, expected bytes).
nanobind::object described(const Outcome& outcome);

// Keep an exchange, and the buffers that the engine may still write into, until it is over. With the GIL.
void let_go(std::unique_ptr<Operation> operation, nanobind::object buffers);

}  // namespace narrowcast
