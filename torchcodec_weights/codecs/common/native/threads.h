// Threads that wait for work: making one takes as long as decoding a tile.
//
// PyTorch's own, of its OpenMP runtime, if Python has found that: after each of PyTorch's operators
// they spin for a while, and others would have to share the cores with them. Else a pool of ours.

#pragma once

#include <cstddef>
#include <functional>

namespace codecs {

// Call work() once in each of `threads` threads, one of which is the caller's; return when all have.
// Calls from several threads at once are served one after the other, but for the caller's own part.
void in_threads(size_t threads, const std::function<void()>& work);

}  // namespace codecs
