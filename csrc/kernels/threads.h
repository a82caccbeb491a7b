// Rows shared out among threads, each with its scratch.
#pragma once

#include <cstddef>
#include <functional>

#include "kernels.h"

namespace narrowcast {

// At most as many threads as this, the caller included; 1 until it is called.
void limit_threads(size_t most);

// Calls `work(begin, end, scratch)` so that all rows are worked on once, by several threads if there are `nbytes`
// enough for them. `work` may run at the same time in several threads; what it throws in one of them is thrown here.
void for_rows(size_t num_rows, size_t nbytes, size_t num_features, size_t num_ranks,
              const std::function<void(size_t, size_t, const Scratch&)>& work);

// Calls `work(index, num_parts)` for each index below `num_parts`, once, in as many threads as come in time: parts that
// no thread has begun with when the caller is done with its own are the caller's, too. Handing over takes less than a
// microsecond, as workers that have just been at work spin for a while.
void for_parts(size_t num_parts, const std::function<void(size_t, size_t)>& work);

}  // namespace narrowcast
