// Tables of a binary search for a lane's symbol in registers, without a gather.

#pragma once

#include "ectcq.h"

namespace ectcq {

struct Kernels;

// What the search ends at, an index, tells in its highest bit the union quantizer, and in the bits
// below it what the comparisons said, each of which shifts in a 1 where the slot is less than its
// threshold. So a comparison's threshold is chosen by few bits.
struct SearchTables {
  static constexpr int kMost = 8;  // comparisons
  static constexpr int kFew = 6;   // comparisons of tables that have an entry for each symbol

  int comparisons;
  alignas(64) uint16_t
      thresholds[608];  // of comparison j from threshold(j) on, by the bits before it
  alignas(64) uint16_t frequency[2 << kFew];  // by index
  alignas(64) uint16_t start[2 << kFew];
  alignas(64) uint16_t flips[2 << kFew];                 // of the trellis, after its shift
  alignas(64) uint16_t low[2 << kFew], high[2 << kFew];  // halves of the value

  // Those of more symbols. A symbol's start and end are the nearest thresholds, and its value is a
  // multiple of unit / 128.
  alignas(64) uint16_t flips_of_many[32];     // by union quantizer and lowest bit of the index
  alignas(64) uint16_t multiple[2 << kMost];  // by index; signed
  float scale;                                // 2^-16 of unit / 128

  // In registers of 32 entries.
  static constexpr int threshold(int j) { return j < 5 ? 32 * j : 96 + (2 << j); }

  // The same for instruction sets that read tables byte by byte, sixteen entries at a time.
  static constexpr int kShort = 3;  // comparisons whose thresholds, of two bytes, are no more
  struct Bytes {
    alignas(16) uint8_t first[kShort][16];  // low bytes by index, then high bytes
    alignas(16) uint8_t threshold[kFew - kShort][2][1 << kFew];  // of the others; low, high
    alignas(16) uint8_t frequency[2][2 << kFew];                 // of 16 · frequency; low, high
    alignas(16) uint8_t start[2][2 << kFew];
    alignas(16) uint8_t value[4][2 << kFew];
    alignas(16) uint8_t feedback[16], input[16];
  } bytes;

  // False where a quantizer has too many symbols from its first to its last for the kernels, or where
  // their tables do not hold the trellis. Frequencies add up to kSlots, and none is kSlots.
  bool fill(const Kernels& by, const ColumnClass& of, uint32_t feedback, uint32_t input);

  // The same for the tables of a row-major stream. False too where these are no such tables.
  bool fill(const Kernels& by, const Tables& of);

 private:
  bool fill(const Kernels& by, int at_most, const ColumnClass& of, uint32_t feedback,
            uint32_t input, float unit);
  bool fill_many(const ColumnClass& of, const uint32_t* begin, uint32_t feedback, uint32_t input,
                 float unit);
};

}  // namespace ectcq
