// Runs CUDA kernels on a CPU: as much of CUDA C++ as torchcodec_weights/codecs/ectcq/gpu.cu uses.
//
// Each thread of a block is a fiber. A fiber runs until it needs what others have not brought yet, a
// ballot or a barrier, and which one goes on next is random: a kernel that lacks a barrier comes out
// wrong. Blocks run one after the other, and shared memory is theirs in turn.

#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

namespace cuda_host {

struct Index {
  uint32_t x = 0;
};
inline Index thread_index, block_index, block_size, grid_size;
inline unsigned char* dynamic_shared = nullptr;  // of the block that runs

constexpr size_t kStack = 1 << 16;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Index thread;
  bool done = false;
};

// Threads that wait for each other, and what they bring.
struct Meeting {
  uint32_t size = 0;
  uint32_t arrived = 0;
  uint64_t number = 0;  // of meetings that are over
  const char* what = nullptr;
  std::vector<uint64_t> brought, given;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting all;
  ucontext_t scheduler;
  Fiber* running = nullptr;
  uint64_t progress = 0;
  std::string error;
};
inline Block* block = nullptr;
inline std::function<void()> kernel;

inline void yield() {
  Fiber* fiber = block->running;
  swapcontext(&fiber->context, &block->scheduler);
}

// Wait until all threads of a meeting have brought a value; returns all of them.
inline const uint64_t* meet(Meeting& meeting, uint32_t place, const char* what, uint64_t value) {
  if (meeting.arrived == 0) {
    meeting.what = what;
  } else if (std::strcmp(meeting.what, what) != 0) {
    block->error = std::string("threads at ") + what + " and at " + meeting.what;
  }
  const uint64_t number = meeting.number;
  meeting.brought[place] = value;
  ++block->progress;
  if (++meeting.arrived == meeting.size) {
    meeting.given = meeting.brought;
    meeting.arrived = 0;
    ++meeting.number;
  }
  while (meeting.number == number) yield();
  return meeting.given.data();
}

inline const uint64_t* meet_warp(const char* what, uint64_t value) {
  return meet(block->warps[thread_index.x / 32], thread_index.x % 32, what, value);
}

inline void run_thread() {
  kernel();
  block->running->done = true;
  ++block->progress;
  yield();
}

// One block of threads, a multiple of 32 of them.
inline void run_block(uint32_t threads, std::mt19937& random) {
  Block current;
  block = &current;
  current.fibers.resize(threads);
  current.warps.resize(threads / 32);
  for (Meeting& warp : current.warps) {
    warp.size = 32;
    warp.brought.resize(32);
  }
  current.all.size = threads;
  current.all.brought.resize(threads);
  std::vector<Fiber*> left;
  for (uint32_t i = 0; i < threads; ++i) {
    Fiber& fiber = current.fibers[i];
    fiber.thread.x = i;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_thread, 0);
    left.push_back(&fiber);
  }
  while (!left.empty()) {
    const uint64_t before = current.progress;
    // Swaps at random: a full shuffle would take most of the time.
    for (int k = 0; k < 8; ++k)
      std::swap(left[random() % left.size()], left[random() % left.size()]);
    for (Fiber* fiber : left) {
      current.running = fiber;
      thread_index = fiber->thread;
      swapcontext(&current.scheduler, &fiber->context);
      if (!current.error.empty()) throw std::runtime_error(current.error);
    }
    if (current.progress == before)
      throw std::runtime_error("threads wait for others that do not come");
    std::vector<Fiber*> rest;
    for (Fiber* fiber : left) {
      if (!fiber->done) rest.push_back(fiber);
    }
    left.swap(rest);
  }
  block = nullptr;
}

// d += a · b of tensor cores, mma.m16n8k8 of TF32, as gpu.cu says which lane has what.
inline void multiply_add(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  struct Parts {
    float a[4], b[2];
  };
  const auto truncated = [](float value) {
    uint32_t bits = 0;
    std::memcpy(&bits, &value, 4);
    bits &= 0xFFFFE000;
    std::memcpy(&value, &bits, 4);
    return value;
  };
  Parts own{};
  for (int i = 0; i < 4; ++i) own.a[i] = truncated(a[i]);
  for (int i = 0; i < 2; ++i) own.b[i] = truncated(b[i]);
  const uint64_t* const given = meet_warp("mma", reinterpret_cast<uintptr_t>(&own));
  const Parts* parts[32];
  for (int lane = 0; lane < 32; ++lane) parts[lane] = reinterpret_cast<const Parts*>(given[lane]);
  const uint32_t group = thread_index.x % 32 / 4, place = thread_index.x % 4;
  for (uint32_t i = 0; i < 4; ++i) {
    for (uint32_t k = 0; k < 8; ++k) {
      const float left = parts[group * 4 + k % 4]->a[k / 4 * 2 + i / 2];
      d[i] += left * parts[(place * 2 + i % 2) * 4 + k % 4]->b[k / 4];
    }
  }
  meet_warp("mma", 0);  // until all have read what the others have on their stacks
}

template <typename... Parameters, size_t... Places>
void call(void (*function)(Parameters...), const uint64_t* arguments,
          std::index_sequence<Places...>) {
  const auto convert = [](auto* to, uint64_t value) { std::memcpy(to, &value, sizeof(*to)); };
  std::tuple<Parameters...> values;
  (convert(&std::get<Places>(values), arguments[Places]), ...);
  function(std::get<Places>(values)...);
}

// Launch a kernel, all of whose parameters are of 64 bits.
template <typename... Parameters>
void launch(void (*function)(Parameters...), uint64_t blocks, uint64_t threads, uint64_t shared,
            const uint64_t* arguments, uint64_t seed) {
  static_assert(((sizeof(Parameters) == 8) && ...), "a parameter is not of 64 bits");
  std::mt19937 random(static_cast<uint32_t>(seed));
  kernel = [=] { call(function, arguments, std::index_sequence_for<Parameters...>{}); };
  block_size.x = static_cast<uint32_t>(threads);
  grid_size.x = static_cast<uint32_t>(blocks);
  for (uint64_t i = 0; i < blocks; ++i) {
    block_index.x = static_cast<uint32_t>(i);
    // Of its own for each block, not cleared: a sanitizer sees what lies beside it.
    const std::unique_ptr<uint64_t[]> memory(new uint64_t[shared / 8 + 1]);
    std::memset(memory.get(), 0xA5, shared);
    dynamic_shared = reinterpret_cast<unsigned char*>(memory.get());
    run_block(block_size.x, random);
  }
}

}  // namespace cuda_host

#define threadIdx cuda_host::thread_index
#define blockIdx cuda_host::block_index
#define blockDim cuda_host::block_size
#define gridDim cuda_host::grid_size
#define dynamic_shared cuda_host::dynamic_shared

inline void __syncthreads() {
  cuda_host::meet(cuda_host::block->all, threadIdx.x, "__syncthreads", 0);
}

inline void __syncwarp() { cuda_host::meet_warp("__syncwarp", 0); }

inline uint32_t __ballot_sync(uint32_t, bool value) {
  const uint64_t* values = cuda_host::meet_warp("__ballot_sync", value);
  uint32_t ballot = 0;
  for (int i = 0; i < 32; ++i) ballot |= static_cast<uint32_t>(values[i]) << i;
  return ballot;
}

inline float __shfl_xor_sync(uint32_t, float value, uint32_t mask) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, 4);
  const uint64_t* values = cuda_host::meet_warp("__shfl_xor_sync", bits);
  std::memcpy(&value, &values[(threadIdx.x % 32) ^ mask], 4);
  return value;
}

inline float __shfl_sync(uint32_t, float value, uint32_t from) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, 4);
  std::memcpy(&value, &cuda_host::meet_warp("__shfl_sync", bits)[from % 32], 4);
  return value;
}

template <typename Value>
Value __ldg(const Value* from) {
  return *from;
}

[[noreturn]] inline void __trap() {
  cuda_host::block->error = "__trap";
  for (;;) cuda_host::yield();
}

inline uint32_t __popc(uint32_t value) { return static_cast<uint32_t>(__builtin_popcount(value)); }

inline float __fmul_rn(float a, float b) { return a * b; }

inline float __fadd_rn(float a, float b) { return a + b; }

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
