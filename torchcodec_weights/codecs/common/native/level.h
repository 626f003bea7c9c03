// The instruction sets that there are decoders for; all find the same values. compiled.py names them.

#pragma once

namespace codecs {

enum Level : int {
  kScalar = 0,
  kVector = 1,
  // x86
  kAvx2 = 2,
  kAvx512 = 3,
  kVbmi2 = 4,
  // AArch64
  kNeon = 2,
};

// The best of this processor.
int best_level();

}  // namespace codecs
