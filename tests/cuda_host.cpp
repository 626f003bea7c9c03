// The kernels of torchcodec_weights/codecs/ectcq/gpu.cu as a library for a CPU.

#include "cuda_host.h"

#include "gpu.cu"

namespace {

std::string error;

template <typename Kernel>
bool matches(const char* name, const char* other, Kernel* kernel, uint64_t blocks, uint64_t threads,
             uint64_t shared, const uint64_t* arguments, uint64_t seed) {
  if (std::strcmp(name, other) != 0) return false;
  cuda_host::launch(kernel, blocks, threads, shared, arguments, seed);
  return true;
}

}  // namespace

// Null, or what went wrong.
extern "C" const char* cuda_host_launch(const char* name, uint64_t blocks, uint64_t threads,
                                        uint64_t shared, const uint64_t* arguments, uint64_t seed) {
  const auto is = [&](const char* other, auto* kernel) {
    return matches(name, other, kernel, blocks, threads, shared, arguments, seed);
  };
#define IS(kernel) is(#kernel, kernel)
  try {
    if (IS(ectcq_index) || IS(ectcq_scale) || IS(ectcq_decode_float32) ||
        IS(ectcq_decode_float16) || IS(ectcq_decode_bfloat16) || IS(ectcq_gather_float32) ||
        IS(ectcq_gather_float16) || IS(ectcq_gather_bfloat16) || IS(ectcq_multiply_1) ||
        IS(ectcq_multiply_2) || IS(ectcq_multiply_4) || IS(ectcq_multiply_8) ||
        IS(ectcq_columns_index) || IS(ectcq_columns_decode_float32) ||
        IS(ectcq_columns_decode_float16) || IS(ectcq_columns_decode_bfloat16) ||
        IS(ectcq_columns_multiply) || IS(ectcq_columns_sum)) {
      return nullptr;
    }
    error = "no such kernel";
  } catch (const std::exception& problem) {
    error = problem.what();
  }
  return error.c_str();
}
