// The frequencies of 256 symbols: from counts, to and from bytes, and to the decoder's table.

#pragma once

#include <cstddef>
#include <cstdint>

#include "common/native/rans.h"

namespace lossless {

using namespace codecs;

constexpr int kSymbols = 256;

// Out of 4096, 0 where a symbol does not occur; none is 4096, as 12 bits do not hold that.
struct Frequencies {
  uint32_t of[kSymbols];
};

// Frequencies for the counts of symbols, of which at least one is not 0.
Frequencies frequencies_of(const uint64_t* counts);

// Bits that symbols with these counts take.
double coded_bits(const Frequencies& frequencies, const uint64_t* counts);

constexpr size_t kTableBound = 1 + 2 * kSymbols;

// Write as stored; returns the bytes, at most kTableBound.
size_t write_table(const Frequencies& frequencies, uint8_t* out);

// Read what write_table wrote and advance `*p`; kOk or kBadHeader.
int read_table(const uint8_t** p, const uint8_t* end, Frequencies* frequencies);

void fill_slots(const Frequencies& frequencies, uint32_t* slots);

}  // namespace lossless
