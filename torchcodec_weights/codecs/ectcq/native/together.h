// Streams of several tiles decoded in one loop: one is bound by the latency of its steps, as each
// lane's next state follows from its last. For levels that have Kernels.

#pragma once

#include <algorithm>

#include "columns.h"
#include "common/native/matrix.h"
#include "search_tables.h"

namespace ectcq {

// Most tiles that a thread decodes together: as many as there are streams in a loop.
inline size_t tiles_together(const Kernels& by, const MatrixView& m) {
  return std::min<size_t>(by.streams, m.end - m.first);
}

// Steps of a row-major stream of so many weights.
constexpr size_t steps_of(size_t weights) { return (weights + kLanes - 1) / kLanes; }

// A payload of `steps` steps from its first byte on. Returns kOk, kTooShort or kBadHeader.
int begin_stream(Stream& stream, const uint8_t* payload, size_t size, size_t steps);

// What steps are done by: a search, or where that is null, slots.
struct StepTables {
  const Kernels* by;
  const Tables* slots;
  StepsFunction steps;
  const SearchTables* search;
};

// Advance stream s of `count` by steps[s] steps, without a search at most kChunk and not to kRowSums,
// as Kernels says. Returns kOk or kTooShort; `*bad` is the stream then.
int advance(const StepTables& own, Stream* streams, size_t count, const size_t* steps, Sink sink,
            const Activations& x, float* const* out, size_t* bad);

// One value, rounded to `type`.
inline void put_value(float value, int level, int type, uint8_t* to) {
  if (type == kFloat32) {
    std::memcpy(to, &value, sizeof(value));
  } else {
    narrow(level, &value, 1, type, reinterpret_cast<uint16_t*>(to));
  }
}

// Check tiles `tile` to `tile` + count − 1; on failure `*bad` is the tile.
inline int check_tiles(const MatrixView& m, size_t tile, size_t count, size_t* bad) {
  for (size_t i = tile; i < tile + count; ++i) {
    *bad = i;
    const int checked = check_tile(m, i);
    if (checked != kOk) return checked;
  }
  return kOk;
}

// A payload of a tile of so many rows.
struct Coded {
  const uint8_t* payload;
  size_t size, rows;

  Coded() = default;
  Coded(const uint8_t* bytes, size_t count, size_t height)
      : payload(bytes), size(count), rows(height) {}
  Coded(const MatrixView& m, size_t tile)
      : payload(m.payload(tile)),
        size(m.payload_sizes[tile]),
        rows(m.first_row(tile + 1) - m.first_row(tile)) {}
};

// Decode `count` streams by columns, with x in coded order where there are sums. For each chunk of n
// rows of stream s, of a group and from row `first` on, where n may be 0,
//
//     sink(group, first)
//     target(s, group, first)           → where the sink of the chunk is
//     done(s, group, first, n, there)
//
// Returns a status, and in `*bad` its stream.
template <typename SinkOf, typename Target, typename Done>
int decode_groups_together(const Kernels& by, const Classes& classes, const Coded* coded,
                           size_t count, size_t cols, const float* x, size_t* bad, SinkOf sink,
                           Target target, Done done) {
  Stream streams[kTogether];
  size_t most = 0;
  const size_t groups = groups_of(cols);
  for (size_t s = 0; s < count; ++s) {
    *bad = s;
    const Coded& own = coded[s];
    most = std::max(most, own.rows);
    const int begun = begin_stream(streams[s], own.payload, own.size, groups * own.rows);
    if (begun != kOk) return begun;
  }
  for (size_t g = 0; g < groups; ++g) {
    for (size_t s = 0; s < count; ++s) std::memset(streams[s].trellis, 0, sizeof(streams->trellis));
    for (size_t first = 0; first < most; first += kChunk) {
      size_t n[kTogether];
      float* there[kTogether];
      const Sink kind = sink(g, first);
      for (size_t s = 0; s < count; ++s) {
        n[s] = std::min(kChunk, coded[s].rows - std::min(first, coded[s].rows));
        there[s] = target(s, g, first);
      }
      const ClassTables& tables = classes.tables[classes.of_group[g]];
      const StepTables own{&by, &tables.tables, tables.steps,
                           tables.searched ? &tables.search : nullptr};
      const Activations factors = {x ? x + g * kLanes : nullptr, 1, 0};
      const int status = advance(own, streams, count, n, kind, factors, there, bad);
      if (status != kOk) return status;
      for (size_t s = 0; s < count; ++s) done(s, g, first, n[s], there[s]);
    }
  }
  for (size_t s = 0; s < count; ++s) {
    *bad = s;
    if (streams[s].words != streams[s].end) return kTooLong;
  }
  return kOk;
}

// Decode `count` row-major streams by weights[s] weights, up to word until[s]. Calls done(s, first, n,
// z) for each chunk of n weights of stream s from weight `first` on, where n may be 0. Stream s has its
// chunks, of kChunk · kLanes floats, at chunks + s · kChunk · kLanes. Returns a status, and in `*bad`
// its stream.
template <typename Done>
int decode_rows_together(const StepTables& own, Stream* streams, size_t count,
                         const size_t* weights, const uint8_t* const* until, float* chunks,
                         size_t* bad, Done done) {
  size_t steps[kTogether], most = 0;
  float* there[kTogether];
  for (size_t s = 0; s < count; ++s) {
    steps[s] = steps_of(weights[s]);
    most = std::max(most, steps[s]);
    there[s] = chunks + s * kChunk * kLanes;
  }
  for (size_t first = 0; first < most; first += kChunk) {
    size_t n[kTogether];
    for (size_t s = 0; s < count; ++s) {
      n[s] = std::min(kChunk, steps[s] - std::min(first, steps[s]));
    }
    const int status = advance(own, streams, count, n, Sink::kValues, {}, there, bad);
    if (status != kOk) return status;
    for (size_t s = 0; s < count; ++s) {
      const size_t begin = std::min(first * kLanes, weights[s]);
      done(s, begin, std::min(n[s] * kLanes, weights[s] - begin), there[s]);
    }
  }
  for (size_t s = 0; s < count; ++s) {
    *bad = s;
    if (streams[s].words != until[s]) return kTooLong;
  }
  return kOk;
}

// As decode_rows_together, of rows of `cols` weights, a multiple of kLanes, which are multiplied by x
// as they are decoded. Calls done(s, r, n, sums) for n rows of stream s from row r on, where n may be
// 0; a row's product is the sum of kSums sums.
template <typename Done>
int multiply_rows_together(const StepTables& own, Stream* streams, size_t count,
                           const size_t* weights, const uint8_t* const* until, size_t cols,
                           const float* x, float* chunks, size_t* bad, Done done) {
  constexpr size_t kRows = kChunk * kLanes / kSums;  // whose sums fill a chunk
  const Activations factors = {x, cols / kLanes, 0};
  size_t most = 0;
  float* there[kTogether];
  for (size_t s = 0; s < count; ++s) {
    most = std::max(most, weights[s] / cols);
    there[s] = chunks + s * kChunk * kLanes;
  }
  for (size_t first = 0; first < most; first += kRows) {
    size_t n[kTogether], steps[kTogether];
    for (size_t s = 0; s < count; ++s) {
      const size_t rows = weights[s] / cols;
      n[s] = std::min(kRows, rows - std::min(first, rows));
      steps[s] = n[s] * factors.row_steps;
      std::fill_n(there[s], n[s] * kSums, 0.0f);
    }
    const int status = advance(own, streams, count, steps, Sink::kRowSums, factors, there, bad);
    if (status != kOk) return status;
    for (size_t s = 0; s < count; ++s) done(s, first, n[s], there[s]);
  }
  for (size_t s = 0; s < count; ++s) {
    *bad = s;
    if (streams[s].words != until[s]) return kTooLong;
  }
  return kOk;
}

// The sum of kSums sums.
inline float sum_of(const float* sums) {
  float parts[kSums / 2];
  for (size_t k = 0; k < kSums / 2; ++k) parts[k] = sums[k] + sums[k + kSums / 2];
  for (size_t half = kSums / 4; half; half /= 2) {
    for (size_t k = 0; k < half; ++k) parts[k] += parts[k + half];
  }
  return parts[0];
}

}  // namespace ectcq
