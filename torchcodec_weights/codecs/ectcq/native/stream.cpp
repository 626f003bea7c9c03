#include "stream.h"

#include <cstring>

#include "common/native/stream.h"

namespace ectcq {

StepsFunction steps_function(int level) {
#if defined(CODECS_X86)
  if (level >= kAvx512) return steps_avx512;
  if (level == kAvx2) return steps_avx2;
#endif
  return level == kScalar ? steps_scalar : steps_vector;
}

int decode_stream(const Tables& tables, int level, const uint8_t* payload, size_t size,
                  size_t count, float* out) {
  Lanes lanes;
  std::memset(lanes.trellis, 0, sizeof(lanes.trellis));
  const auto by = [&](StepsFunction steps_of) {
    return [&tables, &lanes, steps_of](const uint8_t** words, const uint8_t* end, size_t steps,
                                       bool read, float* to) {
      return steps_of(tables, lanes, words, end, steps, read, to);
    };
  };
  return decode_lanes(payload, size, count, lanes.x, out, by(steps_function(level)),
                      by(steps_scalar));
}

}  // namespace ectcq
