// What decodes several streams in one loop, by level of instruction set.

#pragma once

#include "search_tables.h"

namespace ectcq {

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

// What becomes of a step: its 32 values are stored, or multiplied by activations and added to 16 sums,
// which are of this step alone or of all steps of a row, or the indices that the search ended at are
// stored, a byte each.
enum class Sink { kValues, kSums, kRowSums, kIndices };

constexpr size_t kSums = kLanes / 2;

// What a step takes at its sink, in floats; at kRowSums a row.
constexpr size_t width_of(Sink sink) {
  return sink == Sink::kValues ? kLanes : sink == Sink::kIndices ? kLanes / 4 : kSums;
}

// What steps are multiplied by: all by the same 32 activations, or at kRowSums step t of a row by
// those at x[t · kLanes].
struct Activations {
  const float* x;
  size_t row_steps;  // at kRowSums: of a row
  size_t step;       // and of these the next
};

// Rows of a strip.
constexpr size_t kStripRows = 16;

// What a level (level.h) has to decode several streams in one loop.
struct Kernels {
  size_t streams;    // at most kTogether
  int least, most;   // comparisons: tables of more symbols are read slot by slot
  int most_by_rows;  // the same for row-major streams. Among columns, a class that is not searched
                     // keeps a whole matrix from being decoded to indices.
  bool bytes;        // some of the kernels read SearchTables::bytes

  // Decode `steps` steps of each of 1 to `streams` streams as long as a whole step's words are sure to
  // be there; returns the number of steps done. Without `read`, which is of one stream, no words are
  // read. Stream s has its sink at out[s], [steps or rows][width_of(sink)]. Sums grow:
  // out[s][t][0] + … + out[s][t][15] by Σ_l value of lane l · activation of lane l.
  size_t (*steps)(const SearchTables& tables, Stream* const* streams, size_t count, size_t steps,
                  bool read, Sink sink, const Activations& x, float* const* out);

  // Sums as those of `steps` at kSums, of values that are decoded already.
  void (*accumulate)(const float* z, size_t steps, const float* x, float* sums);

  // Weights of a row, or a part of it: out[j] = z[j] · row · columns[j · column_stride], plus *zero
  // where it is not null, rounded to `type` as narrow (floats.h) does. With `past`, which is for more
  // than the caches hold, a level may write to memory without reading it first; a fence must follow.
  void (*scale_row)(const float* z, size_t count, float row, const float* columns,
                    size_t column_stride, const float* zero, int type, bool past, void* out);

  float (*dot)(const float* a, const float* b, size_t count);

  // y[r] += Σ_l z[r][l] · x[l]
  void (*add_products)(const float* z, size_t rows, const float* x, float* y);

  // Values of kStripRows steps of indices, scaled and turned: lane l's lie at out[l · kStripRows].
  // Step r is multiplied by row[r] and lane l by columns[l]; zero[r] is added where `zero` is not null.
  void (*expand)(const SearchTables& tables, const uint8_t* indices, const float* row,
                 const float* columns, const float* zero, float* out);

  // The first `rows` rows of a strip of columns, that of column j at strip[places[j]], to out[r · cols +
  // j], rounded to `type` as narrow (floats.h) does.
  void (*assemble)(const float* strip, const uint32_t* places, size_t cols, size_t rows, int type,
                   void* out);
};

#if defined(CODECS_X86)
extern const Kernels kAvx2Kernels, kAvx512Kernels, kVbmi2Kernels;

// Those of kAvx2Kernels that others have too.
void accumulate_avx2(const float* z, size_t steps, const float* x, float* sums);
void scale_row_avx2(const float* z, size_t count, float row, const float* columns,
                    size_t column_stride, const float* zero, int type, bool past, void* out);
float dot_avx2(const float* a, const float* b, size_t count);
void add_products_avx2(const float* z, size_t rows, const float* x, float* y);
void expand_avx2(const SearchTables& tables, const uint8_t* indices, const float* row,
                 const float* columns, const float* zero, float* out);
void assemble_strip_avx2(const float* strip, const uint32_t* places, size_t cols, size_t rows,
                         int type, void* out);
#elif defined(CODECS_NEON)
extern const Kernels kNeonKernels;
#endif

// Null where a level has none.
const Kernels* kernels_at(int level);

}  // namespace ectcq
