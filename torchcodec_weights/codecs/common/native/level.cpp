#include "level.h"

namespace codecs {

int best_level() {
#if defined(CODECS_X86)
  const bool avx512 = __builtin_cpu_supports("avx512f");
  // On AMD's processors the gathers of AVX-512 are slower than those of AVX2: 760 million weights a
  // second against 840 on a Zen 4.
  if (avx512 && !__builtin_cpu_is("amd")) return kAvx512;
  if (__builtin_cpu_supports("avx2")) return kAvx2;
#endif
  return kVector;
}

}  // namespace codecs

#pragma GCC visibility push(default)
// The best instruction set here: 0 scalar, 1 portable vectors, 2 AVX2, 3 AVX-512.
extern "C" int codecs_best_level() { return codecs::best_level(); }
#pragma GCC visibility pop
