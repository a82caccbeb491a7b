// Which paths there are. Apart from kernels.h, as no path may see anything from std.
#pragma once

#include <vector>

#include "kernels.h"

namespace narrowcast {

// Those that this machine can run, from the slowest to the fastest.
std::vector<const Kernels*> runnable_kernels();

// The one in use, by all threads: the fastest, unless another was selected.
const Kernels* selected_kernels();
void select_kernels(const Kernels* kernels);

}  // namespace narrowcast
