// A libcuda.so.1 that starts nothing: it prints what it is asked, so that a test sees what the real
// one would get. Structures are those of cuda.h. Kernels have as many parameters as their names'
// last digit says. FAIL=CALL:CODE in the environment lets a call fail.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

struct Attribute {
  int id;
  char pad[8 - sizeof(int)];
  union {
    char pad[64];
    int allowed;
  } value;
};

struct Config {
  unsigned grid[3], block[3], shared;
  void* stream;
  Attribute* attributes;
  unsigned count;
};

int depth = 0;  // contexts that were pushed

int result(const char* call) {
  const char* fail = std::getenv("FAIL");
  const size_t length = std::strlen(call);
  if (fail == nullptr || std::strncmp(fail, call, length) != 0 || fail[length] != ':') return 0;
  return std::atoi(fail + length + 1);
}

const char* name_of(void* function) { return static_cast<std::string*>(function)->c_str(); }

}  // namespace

extern "C" {

int cuInit(unsigned flags) { return flags ? 1 : result("cuInit"); }

int cuGetErrorName(int code, const char** name) {
  *name = code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : nullptr;
  return *name ? 0 : 1;
}

int cuGetErrorString(int code, const char** text) {
  *text = code == 700 ? "an illegal memory access was encountered" : nullptr;
  return *text ? 0 : 1;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = 40 + ordinal;
  return result("cuDeviceGet");
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  std::printf("device %d attribute %d\n", device, attribute);
  std::fflush(stdout);
  *value = attribute == 97 ? 232448 : std::atoi(std::getenv("CAPABILITY"));
  return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = reinterpret_cast<void*>(INT64_C(0x7000000000) + device);
  return result("cuDevicePrimaryCtxRetain");
}

int cuCtxPushCurrent_v2(void* context) {
  depth += context == reinterpret_cast<void*>(INT64_C(0x7000000000) + 41);
  return 0;
}

int cuCtxPopCurrent_v2(void** context) {
  *context = nullptr;
  --depth;
  return 0;
}

int cuModuleLoadData(void** module, const void* image) {
  if (depth != 1) return 201;
  *module = std::memcmp(image,
                        "\x7f"
                        "ELF",
                        4) == 0
                ? reinterpret_cast<void*>(INT64_C(1) << 40)
                : nullptr;
  return *module ? result("cuModuleLoadData") : 200;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (depth != 1 || module != reinterpret_cast<void*>(INT64_C(1) << 40)) return 400;
  *function = new std::string(name);
  return result("cuModuleGetFunction");
}

int cuFuncLoad(void* function) {
  std::printf("load %s\n", name_of(function));
  std::fflush(stdout);
  return 0;
}

int cuFuncGetAttribute(int* value, int attribute, void* function) {
  if (depth != 1 || name_of(function)[0] != 'k') return 1;
  *value = attribute == 1 ? 1000 : attribute;
  return 0;
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
  std::printf("%s attribute %d is %d\n", name_of(function), attribute, value);
  std::fflush(stdout);
  return 0;
}

int cuLaunchKernelEx(const Config* c, void* function, void** parameters, void** extra) {
  if (depth != 1 || extra != nullptr) return 1;
  std::printf("%s grid %u %u %u block %u %u %u shared %u stream %p", name_of(function), c->grid[0],
              c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2], c->shared, c->stream);
  for (unsigned i = 0; i < c->count; ++i) {
    std::printf(" attribute %d is %d", c->attributes[i].id, c->attributes[i].value.allowed);
  }
  std::printf(":");
  const std::string name = name_of(function);
  for (int i = 0; i < name.back() - '0'; ++i) {
    std::printf(" %lld", static_cast<long long>(*static_cast<int64_t*>(parameters[i])));
  }
  std::printf("\n");
  std::fflush(stdout);
  return result("cuLaunchKernelEx");
}

}  // extern "C"
