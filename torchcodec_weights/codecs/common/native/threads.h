// Threads that wait for work, as starting a thread takes as long as decoding a tile.
//
// They are those of PyTorch's OpenMP runtime if that was found: after each of PyTorch's
// operators these spin for a while, and threads of our own would share the cores with them. If not,
// a pool of our own.

#pragma once

#include <cstddef>
#include <functional>

namespace codecs {

// Call work() once in each of `threads` threads, one of which is the caller's; return when all have.
// Calls from several threads at once are served one after the other, but for the caller's own part.
void in_threads(size_t threads, const std::function<void()>& work);

// GOMP_parallel of libgomp: call function(data) in a team of threads.
using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

}  // namespace codecs

// Take threads from an OpenMP runtime from now on.
extern "C" void codecs_use_openmp(codecs::Parallel parallel);
