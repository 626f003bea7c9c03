// Tables of few symbols, which registers hold: a lane finds its symbol by a binary search, without a
// gather.

#pragma once

#include "ectcq.h"

namespace ectcq {

struct Kernels;

// What the search ends at, an index, tells in its highest bit the union quantizer, and in the bits
// below it what the comparisons said, each of which shifts in a 1 where the slot is less than its
// threshold. So a comparison's threshold is chosen by few bits.
struct SearchTables {
  static constexpr int kMost = 6;  // comparisons

  int comparisons;
  alignas(64) uint16_t threshold[kMost][1 << kMost];  // by comparison and the bits before it
  alignas(64) uint16_t frequency[2 << kMost];         // by index
  alignas(64) uint16_t start[2 << kMost];
  alignas(64) uint16_t flips[2 << kMost];                  // of the trellis, after its shift
  alignas(64) uint16_t low[2 << kMost], high[2 << kMost];  // halves of the value

  // The same for instruction sets that read tables byte by byte, sixteen entries at a time.
  static constexpr int kShort = 3;  // comparisons whose thresholds, of two bytes, are no more
  struct Bytes {
    alignas(16) uint8_t first[kShort][16];  // low bytes by index, then high bytes
    alignas(16) uint8_t threshold[kMost - kShort][2][1 << kMost];  // of the others; low, high
    alignas(16) uint8_t frequency[2][2 << kMost];                  // of 16 · frequency; low, high
    alignas(16) uint8_t start[2][2 << kMost];
    alignas(16) uint8_t value[4][2 << kMost];
    alignas(16) uint8_t feedback[16], input[16];
  } bytes;

  // False where a quantizer has too many symbols from its first to its last for the kernels, or where
  // their tables do not hold the trellis. Frequencies add up to kSlots, and none is kSlots.
  bool fill(const Kernels& by, const ColumnClass& of, uint32_t feedback, uint32_t input);

  // The same for the tables of a row-major stream. False too where these are no such tables.
  bool fill(const Kernels& by, const Tables& of);

 private:
  bool fill(const Kernels& by, int at_most, const ColumnClass& of, uint32_t feedback,
            uint32_t input);
};

}  // namespace ectcq
