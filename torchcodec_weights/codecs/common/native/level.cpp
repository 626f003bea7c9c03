#include "level.h"

namespace codecs {

int best_level() {
#if defined(CODECS_X86)
  // AMD's processors too, whose gathers are slow: this level has none but for columns of many symbols.
  if (__builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    return kVbmi2;
  }
  if (__builtin_cpu_supports("avx512f")) return kAvx512;
  if (__builtin_cpu_supports("avx2")) return kAvx2;
#endif
#if defined(CODECS_NEON)
  return kNeon;  // every processor of the architecture has it
#else
  return kVector;
#endif
}

}  // namespace codecs

#pragma GCC visibility push(default)
// The best Level here.
extern "C" int codecs_best_level() { return codecs::best_level(); }
#pragma GCC visibility pop
