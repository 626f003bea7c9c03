// Tiles of a container, checked and processed in several threads. The layout is specified in
// docs/bitstream.md; the header is read in Python.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>

#include "floats.h"
#include "layout.h"
#include "rans.h"
#include "threads.h"

namespace codecs {

// kOk if tiles `first` to `end` − 1 are tiles of the matrix, and so small that no product of sizes
// below overflows. Python checks the same when it reads the header (container.py); it is checked
// again because the memory accesses here rely on it.
int check_sizes(const MatrixView& m);

// Whether a tile lies within the container and its checksum is right.
int check_tile(const MatrixView& m, size_t tile);

// What a status (rans.h) that is not kOk says, for users; null of one that there is not.
const char* status_text(int status);

// A thread's buffer for a tile, kept from call to call, as new memory costs as much time as decoding
// into it. Aligned to 64 bytes; null if there is no memory.
uint8_t* tile_buffer(size_t bytes);

// Call put(position, address of the value) for each outlier of a section of a tile of `weights`.
template <typename Put>
int for_outliers(const uint8_t* section, size_t size, int type, size_t weights, Put put) {
  if (size == 0) return kOk;
  if (size < 4) return kBadOutliers;
  uint32_t words;
  std::memcpy(&words, section, 4);
  if ((size - 4) / 2 < words) return kBadOutliers;
  const size_t width = item_size(type);
  const uint8_t* values = section + 4 + 2 * static_cast<size_t>(words);
  const uint8_t* end = section + size;
  uint64_t position = 0;
  for (uint32_t i = 0; i < words; ++i) {
    uint16_t word;
    std::memcpy(&word, section + 4 + 2 * static_cast<size_t>(i), 2);
    position += word;
    if (word == 0xFFFF) continue;
    if (position >= weights || static_cast<size_t>(end - values) < width) return kBadOutliers;
    put(static_cast<size_t>(position), values);
    values += width;
    ++position;
  }
  return values == end ? kOk : kBadOutliers;
}

// Call work(unit, count, buffer of `bytes` bytes, &failed) for runs of at most `together` of units 0
// to `units` − 1, as equal as can be and as many for each thread; the first status that is not kOk
// ends it. Before, threads call check(i, &failed) for 0 to `checks` − 1, but no run waits for those.
template <typename Check, typename Work>
int for_runs(size_t checks, Check check, size_t units, int threads, size_t together, size_t bytes,
             size_t* failed, Work work) {
  const size_t most = static_cast<size_t>(std::max(threads, 1));
  const size_t least = (units + together - 1) / together;
  const size_t runs = std::min(units, (least + most - 1) / most * most);
  std::atomic<size_t> next_check{0}, next{0};
  std::atomic<int> status{kOk};
  std::atomic<size_t> where{0};
  const auto note = [&](int result, size_t bad) {
    if (result == kOk) return;
    where = bad;
    status = result;
  };
  in_threads(std::min(most, runs), [&] {
    for (size_t i; status == kOk && (i = next_check++) < checks;) {
      size_t bad = i;
      const int result = check(i, &bad);
      note(result, bad);
    }
    uint8_t* buffer = tile_buffer(bytes);
    for (size_t run; status == kOk && (run = next++) < runs;) {
      const size_t unit = run * units / runs, last = (run + 1) * units / runs;
      size_t bad = unit;
      const int result = buffer ? work(unit, last - unit, buffer, &bad) : kNoMemory;
      note(result, bad);
    }
  });
  *failed = where;
  return status;
}

// The same without checks.
template <typename Work>
int for_runs(size_t units, int threads, size_t together, size_t bytes, size_t* failed, Work work) {
  const auto none = [](size_t, size_t*) { return static_cast<int>(kOk); };
  return for_runs(0, none, units, threads, together, bytes, failed, work);
}

// The same for tiles `first` to `end` − 1: work(tile, count, buffer, &failed).
template <typename Work>
int for_runs(const MatrixView& m, int threads, size_t together, size_t bytes, size_t* failed,
             Work work) {
  return for_runs(m.end - m.first, threads, together, bytes, failed,
                  [&](size_t unit, size_t count, uint8_t* buffer, size_t* bad) {
                    *bad = m.first + unit;
                    return work(m.first + unit, count, buffer, bad);
                  });
}

// Call work(tile, buffer of `bytes` bytes) for each tile, as for_runs.
template <typename Work>
int for_tiles(const MatrixView& m, int threads, size_t bytes, size_t* failed, Work work) {
  return for_runs(m, threads, 1, bytes, failed, [&](size_t tile, size_t, uint8_t* buffer, size_t*) {
    return work(tile, buffer);
  });
}

// Weights of the largest tile.
inline size_t largest_tile(const MatrixView& m) {
  return (m.rows + m.tiles - 1) / m.tiles * m.cols;
}

}  // namespace codecs
