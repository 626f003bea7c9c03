// One step of four lanes of rANS in the portable vector types of GCC and Clang: NEON on ARM, SSE2
// on an x86 without AVX2. Words are read lane by lane; all else is done four lanes at once.

#pragma once

#include <cstring>

#include "rans.h"

namespace codecs {
namespace {

typedef uint32_t Vector __attribute__((vector_size(16)));
constexpr int kWidth = 4;
constexpr int kVectors = kLanes / kWidth;

// The states after symbols with these slot entries; reads the words that they need.
template <bool kRead>
inline Vector next_states(Vector x, Vector entry, const uint8_t** words) {
  x = (entry & 0xFFF) * (x >> kProbabilityBits) + ((entry >> 12) & 0xFFF);
  if (kRead) {
    const uint8_t* p = *words;
    Vector word;
    const Vector needs = Vector(x < kLowest);
    for (int i = 0; i < kWidth; ++i) {
      uint16_t next = 0;
      if (needs[i]) {
        std::memcpy(&next, p, 2);
        p += 2;
      }
      word[i] = next;
    }
    x = (needs & ((x << 16) | word)) | (~needs & x);
    *words = p;
  }
  return x;
}

}  // namespace
}  // namespace codecs
