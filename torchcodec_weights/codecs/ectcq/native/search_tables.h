// Tables of few symbols, which registers hold: a lane finds its symbol by a binary search, without a
// gather.

#pragma once

#include "ectcq.h"

namespace ectcq {

// What the search ends at, an index, tells in its highest bit the union quantizer, and in the bits
// below it what the comparisons said, each of which shifts in a 1 where the slot is less than its
// threshold. So a comparison's threshold is chosen by few bits.
struct SearchTables {
  static constexpr int kLeast = 4, kMost = 6;  // comparisons

  int comparisons;
  alignas(64) uint16_t threshold[kMost][1 << kMost];  // by comparison and the bits before it
  alignas(64) uint16_t frequency[2 << kMost];         // by index
  alignas(64) uint16_t start[2 << kMost];
  alignas(64) uint16_t flips[2 << kMost];                  // of the trellis, after its shift
  alignas(64) uint16_t low[2 << kMost], high[2 << kMost];  // halves of the value

  // False where a quantizer has more than 2^kMost symbols from its first to its last. Frequencies
  // add up to kSlots, and none is kSlots.
  bool fill(const ColumnClass& of, uint32_t feedback, uint32_t input);

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

// What becomes of a step: its 32 values are stored, or added up in 16 sums, or the indices that the
// search ended at are stored, a byte each.
enum class Sink { kValues, kSums, kIndices };

// What a step takes at its sink, in floats.
constexpr size_t width_of(Sink sink) {
  return sink == Sink::kValues ? kLanes : sink == Sink::kSums ? kLanes / 2 : kLanes / 4;
}

// Decode `steps` steps of each of 1 to kTogether streams as long as a whole step's words are sure to
// be there; returns the number of steps done. Without `read`, which is of one stream, no words are
// read. Stream s has its sink at out[s], [steps][width_of(sink)]. Sums grow:
// out[s][t][0] + … + out[s][t][15] by Σ_l value of lane l · x[l].
size_t steps_vbmi2(const SearchTables& tables, Stream* const* streams, size_t count, size_t steps,
                   bool read, Sink sink, const float* x, float* const* out);

// Sums as those of steps_vbmi2, of values that are decoded already.
void accumulate_vbmi2(const float* z, size_t steps, const float* x, float* sums);

// Weights of a row, or a part of it: out[j] = z[j] · row · columns[j · column_stride], plus *zero where
// it is not null, rounded to `type` as narrow (floats.h) does.
void scale_row_vbmi2(const float* z, size_t count, float row, const float* columns,
                     size_t column_stride, const float* zero, int type, void* out);

float dot_vbmi2(const float* a, const float* b, size_t count);

// Rows of a strip.
constexpr size_t kStripRows = 16;

// Values of kStripRows steps of indices, scaled and turned: lane l's lie at out[l · kStripRows]. Step r
// is multiplied by row[r] and lane l by columns[l]; zero[r] is added where `zero` is not null.
void expand_vbmi2(const SearchTables& tables, const uint8_t* indices, const float* row,
                  const float* columns, const float* zero, float* out);

// The first `rows` rows of a strip of columns, that of column j at strip[places[j]], to out[r · cols +
// j], rounded to `type` as narrow (floats.h) does.
void assemble_vbmi2(const float* strip, const uint32_t* places, size_t cols, size_t rows, int type,
                    void* out);

}  // namespace ectcq
