// Threads that wait for work: making one takes as long as decoding a tile.

#pragma once

#include <cstddef>
#include <functional>

namespace ectcq {

// Call work() once in each of `threads` threads, one of which is the caller's; return when all have.
// Calls from several threads at once are served one after the other, but for the caller's own part.
void in_threads(size_t threads, const std::function<void()>& work);

}  // namespace ectcq
