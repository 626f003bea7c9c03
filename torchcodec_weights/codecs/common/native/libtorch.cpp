#include "libtorch.h"

#include <dlfcn.h>

namespace codecs {
namespace {

#ifdef __APPLE__
constexpr const char* kLibrary = "libtorch_cpu.dylib";
#else
constexpr const char* kLibrary = "libtorch_cpu.so";
#endif

struct Found {
  LibTorch torch;
  std::string message;  // empty if all was found

  Found() {
    // By its name: in a Python process its symbols are not global, except on macOS.
    void* library = dlopen(kLibrary, RTLD_LAZY | RTLD_NOLOAD);
    const auto look_up = [&](const char* name) {
      void* symbol = library ? dlsym(library, name) : nullptr;
      return symbol ? symbol : dlsym(RTLD_DEFAULT, name);
    };
    const auto find = [&](auto& function, const char* name) {
      void* symbol = look_up(name);
      if (!symbol && message.empty()) {
        message = std::string("libtorch in this process lacks ") + name +
                  ": torch 2.11 or later is needed, loaded before the operators are registered";
      }
      function = reinterpret_cast<std::decay_t<decltype(function)>>(symbol);
    };
#define CODECS_FIND(Result, name, arguments) find(torch.name, #name);
    CODECS_LIBTORCH(CODECS_FIND)
#undef CODECS_FIND
    if (!message.empty()) return;
    torch.parallel = reinterpret_cast<Parallel>(look_up("GOMP_parallel"));
    torch.cpu = torch.aoti_torch_device_type_cpu();
    torch.float32 = torch.aoti_torch_dtype_float32();
    torch.float16 = torch.aoti_torch_dtype_float16();
    torch.bfloat16 = torch.aoti_torch_dtype_bfloat16();
    torch.uint8 = torch.aoti_torch_dtype_uint8();
    torch.int32 = torch.aoti_torch_dtype_int32();
    torch.int64 = torch.aoti_torch_dtype_int64();
  }
};

}  // namespace

const LibTorch* libtorch(std::string* message) {
  static const Found found;
  *message = found.message;
  return found.message.empty() ? &found.torch : nullptr;
}

}  // namespace codecs
