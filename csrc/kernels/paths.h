// Which paths there are. Apart from kernels.h, as no path may see anything from std.
#pragma once

#include <vector>

#include "kernels.h"

namespace narrowcast {

// Those that this machine can run, from the slowest to the fastest.
std::vector<const Kernels*> runnable_kernels();

}  // namespace narrowcast
