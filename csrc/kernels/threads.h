// Rows shared out among threads, each with its scratch.
#pragma once

#include <cstddef>
#include <functional>

#include "kernels.h"

namespace narrowcast {

// At most as many threads as this, the caller included; 1 until it is called.
void limit_threads(size_t most);

// Calls `work(begin, end, scratch)` so that all rows are worked on once, by several threads if there are `nbytes`
// enough for them. `work` may run at the same time in several threads.
void for_rows(size_t num_rows, size_t nbytes, size_t num_features, size_t num_ranks,
              const std::function<void(size_t, size_t, const Scratch&)>& work);

// Calls `work(index, num_parts)` for each index below `num_parts`, at the same time in as many threads, or one after the
// other where they are at other work. Handing over takes less than a microsecond: workers that have just been at work
// spin for a while.
void for_parts(size_t num_parts, const std::function<void(size_t, size_t)>& work);

}  // namespace narrowcast
