// Words that lanes read, put in their places by a shuffle of bytes.

#pragma once

#include <cstdint>

namespace ectcq {
namespace {

// For each mask of eight lanes that need a word: where its bytes are among those of the next eight
// words, and for lanes that need none what a shuffle (pshufb, tbl) answers with zero.
struct WordPlaces {
  alignas(16) uint8_t of[256][16];
  constexpr WordPlaces() : of{} {
    for (int mask = 0; mask < 256; ++mask) {
      uint8_t next = 0;
      for (int l = 0; l < 8; ++l) {
        const bool needs = mask >> l & 1;
        of[mask][2 * l] = needs ? next : 0x80;
        of[mask][2 * l + 1] = needs ? static_cast<uint8_t>(next + 1) : 0x80;
        if (needs) next = static_cast<uint8_t>(next + 2);
      }
    }
  }
};
constexpr WordPlaces kWordPlaces;

}  // namespace
}  // namespace ectcq
