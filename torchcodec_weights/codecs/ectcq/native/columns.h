// The stream by columns: groups of 32 columns one after the other, each down the rows of a tile.

#pragma once

#include <cstring>

#include "common/native/stream.h"
#include "ectcq.h"
#include "kernels.h"

namespace ectcq {

constexpr size_t groups_of(size_t cols) { return (cols + kLanes - 1) / kLanes; }

// Tables of a class of columns, and what decodes by them.
struct ClassTables {
  Tables tables;  // not filled where the class is searched
  StepsFunction steps;
  bool searched;  // in registers: see search_tables.h
  SearchTables search;
};

struct Classes {
  ClassTables* tables;
  const uint8_t* of_group;  // [groups_of(cols)]
  bool searched;            // all of them

  // kOk, or kBadHeader where the classes of a matrix of so many columns do not fit together, or
  // kNoMemory. The tables are the calling thread's, until its next call.
  int fill(int level, const ColumnClass* classes, size_t count, int32_t states,
           const uint8_t* groups, size_t cols);
};

// Rows of a group that are decoded at a time. They stay in the first-level cache.
constexpr size_t kChunk = 64;

// Decode a payload of rows · cols weights. For each chunk of n rows of a group from row `first` on,
//
//     target(group, first)             → where to, [n][32]
//     done(group, first, n, weights)
template <typename Target, typename Done>
int decode_groups(const Classes& classes, const uint8_t* payload, size_t size, size_t rows,
                  size_t cols, Target target, Done done) {
  if (size < kHead) return kTooShort;
  const size_t groups = groups_of(cols);
  Lanes lanes;
  uint32_t tail;
  std::memcpy(&tail, payload, 4);
  std::memcpy(lanes.x, payload + 4, sizeof(lanes.x));
  if (tail > groups * rows) return kBadHeader;
  size_t reading = groups * rows - tail;
  const uint8_t* words = payload + kHead;
  const uint8_t* end = payload + size;
  for (size_t g = 0; g < groups; ++g) {
    const ClassTables& own = classes.tables[classes.of_group[g]];
    const Tables& tables = own.tables;
    const auto by = [&](StepsFunction steps_of) {
      return [&tables, &lanes, steps_of](const uint8_t** from, const uint8_t* limit, size_t steps,
                                         bool read, float* to) {
        return steps_of(tables, lanes, from, limit, steps, read, to);
      };
    };
    const auto fast = by(own.steps), scalar = by(steps_scalar);
    std::memset(lanes.trellis, 0, sizeof(lanes.trellis));
    for (size_t first = 0; first < rows; first += kChunk) {
      const size_t count = rows - first < kChunk ? rows - first : kChunk;
      const size_t read = count < reading ? count : reading;
      reading -= read;
      float* out = target(g, first);
      const int status = read_steps(&words, end, read, out, fast, scalar);
      if (status != kOk) return status;
      if (read < count) fast(&words, end, count - read, false, out + read * kLanes);
      done(g, first, count, out);
    }
  }
  return words == end ? kOk : kTooLong;
}

}  // namespace ectcq
