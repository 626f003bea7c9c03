// Steps of 32 lanes in plain C++: the fallback, and the meaning of the others.

#include <cstring>

#include "ectcq.h"

namespace ectcq {

size_t steps_scalar(const Tables& tables, Lanes& lanes, const uint8_t** words, const uint8_t* end,
                    size_t steps, bool read, float* out) {
  const uint8_t* p = *words;
  size_t done = 0;
  for (; done < steps; ++done) {
    if (read && static_cast<size_t>(end - p) < 2 * kLanes) break;
    for (int l = 0; l < kLanes; ++l) {
      uint32_t x = lanes.x[l];
      const uint32_t s = lanes.trellis[l];
      const uint32_t q = s & 1;
      const uint32_t entry = tables.slots[(x & (kSlots - 1)) | (q << kProbabilityBits)];
      const uint32_t symbol = entry >> 24;
      x = (entry & 0xFFF) * (x >> kProbabilityBits) + ((entry >> 12) & 0xFFF);
      lanes.trellis[l] =
          (s >> 1) ^ ((0u - q) & tables.feedback) ^ ((0u - (symbol & 1)) & tables.input);
      out[done * kLanes + l] = tables.values[symbol | (q << 8)];
      if (read && x < kLowest) {
        uint16_t word;
        std::memcpy(&word, p, 2);
        p += 2;
        x = (x << 16) | word;
      }
      lanes.x[l] = x;
    }
  }
  *words = p;
  return done;
}

}  // namespace ectcq
