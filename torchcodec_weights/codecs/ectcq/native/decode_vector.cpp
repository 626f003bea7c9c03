// Steps of 32 lanes in eight vectors of four, in GCC's portable vector types: NEON on ARM, SSE2 on
// an x86 without AVX2. Tables and words are read lane by lane; all else is done four lanes at once.

#include <cstring>

#include "ectcq.h"

namespace ectcq {
namespace {

typedef uint32_t Vector __attribute__((vector_size(16)));
constexpr int kWidth = 4;
constexpr int kVectors = kLanes / kWidth;

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
      x[v] = (entry & 0xFFF) * (x[v] >> kProbabilityBits) + ((entry >> 12) & 0xFFF);
      if (kRead) {
        Vector word;
        const Vector needs = Vector(x[v] < kLowest);
        for (int i = 0; i < kWidth; ++i) {
          uint16_t next = 0;
          if (needs[i]) {
            std::memcpy(&next, p, 2);
            p += 2;
          }
          word[i] = next;
        }
        x[v] = (needs & ((x[v] << 16) | word)) | (~needs & x[v]);
      }
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
