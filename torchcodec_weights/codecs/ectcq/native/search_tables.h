// Tables of few symbols, which registers hold: a lane finds its symbol by a binary search, without a
// gather.

#pragma once

#include "ectcq.h"

namespace ectcq {

// What the search ends at, an index, tells in its lowest bit the union quantizer, and in the bit
// above it what the first comparison said, and so on. So a comparison's threshold is chosen by few
// bits, and the last comparison tells the symbol's parity.
struct SearchTables {
  static constexpr int kLeast = 4, kMost = 6;  // comparisons

  int comparisons;
  uint16_t feedback, input;                           // of the trellis
  alignas(64) uint16_t threshold[kMost][1 << kMost];  // by comparison and the bits before it
  alignas(64) uint16_t frequency[2 << kMost];         // by index
  alignas(64) uint16_t start[2 << kMost];
  alignas(64) uint16_t low[2 << kMost], high[2 << kMost];  // halves of the value

  // False where a quantizer has more than 2^kMost symbols from its first to its last. Frequencies
  // add up to kSlots, and none is kSlots.
  bool fill(const ColumnClass& of, uint32_t feedback_bits, uint32_t input_bits);

  // The same for the tables of a row-major stream. False too where these are no such tables.
  bool fill(const Tables& of);
};

// A stream between its steps.
struct Stream {
  alignas(64) uint16_t low[kLanes], high[kLanes];  // halves of the states
  alignas(64) uint16_t trellis[kLanes];
  const uint8_t* words;
  const uint8_t* end;
  size_t reading;  // steps that read words, of those that are left
};

// Steps of several streams in one loop, as one is bound by the latency of its steps.
constexpr size_t kTogether = 4;

// Decode `steps` steps of each of 1 to kTogether streams as long as a whole step's words are sure to be
// there; returns the number of steps done. Without `read`, which is of one stream, no words are read.
// Where `x` is null, stream s puts its values at out[s], [steps][32]. If not, out[s] is
// [steps][16]: out[s][t][0] + … + out[s][t][15] grows by Σ_l value of lane l · x[l].
size_t steps_vbmi2(const SearchTables& tables, Stream* const* streams, size_t count, size_t steps,
                   bool read, const float* x, float* const* out);

// As steps_vbmi2 with x, of values that are decoded already.
void accumulate_vbmi2(const float* z, size_t steps, const float* x, float* sums);

// Weights of a row, or a part of it: out[j] = z[j] · row · columns[j · column_stride], plus *zero where
// it is not null, rounded to `type` as narrow (floats.h) does.
void scale_row_vbmi2(const float* z, size_t count, float row, const float* columns,
                     size_t column_stride, const float* zero, int type, void* out);

float dot_vbmi2(const float* a, const float* b, size_t count);

}  // namespace ectcq
