// The functions of PyTorch's stable C interface that operators need: torch/csrc/stable/c/shim.h and
// torch/csrc/inductor/aoti_torch/c/shim.h of torch 2.11 and later. They are looked up in the libtorch
// that is in the process, so that this library is built without torch, and one binary serves all
// versions (studies/architecture.md).

#pragma once

#include <cstdint>
#include <string>

#include "threads.h"

namespace codecs {

struct AtenTensorOpaque;
struct StableListOpaque;
struct TorchLibraryOpaque;

using TensorHandle = AtenTensorOpaque*;
using ListHandle = StableListOpaque*;
using LibraryHandle = TorchLibraryOpaque*;
using TorchError = int32_t;  // 0 for success

// An argument or result of an operator: a number, an owned handle of a tensor or list, or, of an
// optional argument, null or a pointer to one on the heap. Whoever takes it frees it.
using StableIValue = uint64_t;

// Takes its arguments from the stack and leaves its results there.
using Kernel = void (*)(StableIValue* stack, uint64_t inputs, uint64_t outputs);

// The version of the interface that this library is written for.
constexpr uint64_t kTorchVersion = 2ull << 56 | 11ull << 48;

#define CODECS_LIBTORCH(FUNCTION)                                                               \
  FUNCTION(TorchError, aoti_torch_delete_tensor_object, (TensorHandle))                         \
  FUNCTION(TorchError, aoti_torch_new_tensor_handle, (TensorHandle, TensorHandle*))             \
  FUNCTION(TorchError, aoti_torch_get_storage_size, (TensorHandle, int64_t*))                   \
  FUNCTION(TorchError, aoti_torch_get_storage_offset, (TensorHandle, int64_t*))                 \
  FUNCTION(TorchError, aoti_torch_get_dim, (TensorHandle, int64_t*))                            \
  FUNCTION(TorchError, aoti_torch_get_numel, (TensorHandle, int64_t*))                          \
  FUNCTION(TorchError, aoti_torch_get_sizes, (TensorHandle, int64_t**))                         \
  FUNCTION(TorchError, aoti_torch_is_contiguous, (TensorHandle, bool*))                         \
  FUNCTION(TorchError, aoti_torch_get_dtype, (TensorHandle, int32_t*))                          \
  FUNCTION(TorchError, aoti_torch_get_device_type, (TensorHandle, int32_t*))                    \
  FUNCTION(TorchError, aoti_torch_empty_strided,                                                \
           (int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, TensorHandle*)) \
  FUNCTION(TorchError, aoti_torch_library_init_impl,                                            \
           (const char*, const char*, const char*, uint32_t, LibraryHandle*))                   \
  FUNCTION(TorchError, aoti_torch_library_init_fragment,                                        \
           (const char*, const char*, uint32_t, LibraryHandle*))                                \
  FUNCTION(TorchError, aoti_torch_library_def, (LibraryHandle, const char*))                    \
  FUNCTION(int32_t, aoti_torch_device_type_cpu, ())                                             \
  FUNCTION(int32_t, aoti_torch_dtype_float32, ())                                               \
  FUNCTION(int32_t, aoti_torch_dtype_float16, ())                                               \
  FUNCTION(int32_t, aoti_torch_dtype_bfloat16, ())                                              \
  FUNCTION(int32_t, aoti_torch_dtype_uint8, ())                                                 \
  FUNCTION(int32_t, aoti_torch_dtype_int32, ())                                                 \
  FUNCTION(int32_t, aoti_torch_dtype_int64, ())                                                 \
  FUNCTION(TorchError, torch_get_const_data_ptr, (TensorHandle, const void**))                  \
  FUNCTION(TorchError, torch_get_mutable_data_ptr, (TensorHandle, void**))                      \
  FUNCTION(TorchError, torch_list_size, (ListHandle, size_t*))                                  \
  FUNCTION(TorchError, torch_list_get_item, (ListHandle, size_t, StableIValue*))                \
  FUNCTION(TorchError, torch_delete_list, (ListHandle))                                         \
  FUNCTION(TorchError, torch_get_num_threads, (uint32_t*))                                      \
  FUNCTION(TorchError, torch_library_impl, (LibraryHandle, const char*, Kernel, uint64_t))      \
  FUNCTION(TorchError, torch_call_dispatcher, (const char*, const char*, StableIValue*, uint64_t))

struct LibTorch {
#define CODECS_DECLARE(Result, name, arguments) Result(*name) arguments;
  CODECS_LIBTORCH(CODECS_DECLARE)
#undef CODECS_DECLARE

  // What the functions of the same names return.
  int32_t cpu, float32, float16, bfloat16, uint8, int32, int64;

  // GOMP_parallel of the OpenMP runtime that libtorch uses, or null; see threads.h.
  Parallel parallel;
};

// Of the libtorch in this process; null, with a message for users, if there is none that has all of
// the interface.
const LibTorch* libtorch(std::string* message);

}  // namespace codecs
