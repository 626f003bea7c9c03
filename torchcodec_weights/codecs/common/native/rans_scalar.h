// One step of one lane of rANS in plain C++: the reference for rans_vector.h, rans_avx2.h and
// rans_avx512.h.

#pragma once

#include <cstring>

#include "rans.h"

namespace codecs {
namespace {

// The state after a symbol with this slot entry; reads a word if it needs one.
template <bool kRead>
inline uint32_t next_state(uint32_t x, uint32_t entry, const uint8_t** words) {
  x = (entry & 0xFFF) * (x >> kProbabilityBits) + ((entry >> 12) & 0xFFF);
  if (kRead && x < kLowest) {
    uint16_t word;
    std::memcpy(&word, *words, 2);
    *words += 2;
    x = (x << 16) | word;
  }
  return x;
}

}  // namespace
}  // namespace codecs
