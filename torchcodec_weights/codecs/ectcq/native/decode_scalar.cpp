// Steps of 32 lanes in plain C++: the fallback, and the reference for the vector versions.

#include "common/native/rans_scalar.h"
#include "ectcq.h"

namespace ectcq {
namespace {

template <bool kRead>
size_t steps(const Tables& tables, Lanes& lanes, const uint8_t** words, const uint8_t* end,
             size_t count, float* out) {
  const uint8_t* p = *words;
  size_t done = 0;
  for (; done < count; ++done) {
    if (kRead && static_cast<size_t>(end - p) < 2 * kLanes) break;
    for (int l = 0; l < kLanes; ++l) {
      const uint32_t x = lanes.x[l];
      const uint32_t s = lanes.trellis[l];
      const uint32_t q = s & 1;
      const uint32_t entry = tables.slots[(x & (kSlots - 1)) | (q << kProbabilityBits)];
      const uint32_t symbol = entry >> 24;
      lanes.trellis[l] =
          (s >> 1) ^ ((0u - q) & tables.feedback) ^ ((0u - (symbol & 1)) & tables.input);
      out[done * kLanes + l] = tables.values[symbol | (q << 8)];
      lanes.x[l] = next_state<kRead>(x, entry, &p);
    }
  }
  *words = p;
  return done;
}

}  // namespace

size_t steps_scalar(const Tables& tables, Lanes& lanes, const uint8_t** words, const uint8_t* end,
                    size_t count, bool read, float* out) {
  return read ? steps<true>(tables, lanes, words, end, count, out)
              : steps<false>(tables, lanes, words, end, count, out);
}

}  // namespace ectcq
