// Steps of 32 lanes in eight vectors of four (rans_vector.h). Tables are read lane by lane.

#include <cstring>

#include "common/native/rans_vector.h"
#include "ectcq.h"

namespace ectcq {
namespace {

template <bool kRead>
size_t steps(const Tables& tables, Lanes& lanes, const uint8_t** words, const uint8_t* end,
             size_t count, float* out) {
  const uint8_t* p = *words;
  Vector x[kVectors], trellis[kVectors];
  std::memcpy(x, lanes.x, sizeof(x));
  std::memcpy(trellis, lanes.trellis, sizeof(trellis));
  size_t done = 0;
  for (; done < count; ++done) {
    if (kRead && static_cast<size_t>(end - p) < 2 * kLanes) break;
    for (int v = 0; v < kVectors; ++v) {
      const Vector q = trellis[v] & 1;
      const Vector slot = (x[v] & (kSlots - 1)) | (q << kProbabilityBits);
      Vector entry;
      for (int i = 0; i < kWidth; ++i) entry[i] = tables.slots[slot[i]];
      const Vector symbol = entry >> 24;
      const Vector index = symbol | (q << 8);
      float* to = out + done * kLanes + v * kWidth;
      for (int i = 0; i < kWidth; ++i) to[i] = tables.values[index[i]];
      trellis[v] = (trellis[v] >> 1) ^ (-q & tables.feedback) ^ (-(symbol & 1) & tables.input);
      x[v] = next_states<kRead>(x[v], entry, &p);
    }
  }
  std::memcpy(lanes.x, x, sizeof(x));
  std::memcpy(lanes.trellis, trellis, sizeof(trellis));
  *words = p;
  return done;
}

}  // namespace

size_t steps_vector(const Tables& tables, Lanes& lanes, const uint8_t** words, const uint8_t* end,
                    size_t count, bool read, float* out) {
  return read ? steps<true>(tables, lanes, words, end, count, out)
              : steps<false>(tables, lanes, words, end, count, out);
}

}  // namespace ectcq
