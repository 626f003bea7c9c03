// The function of a level's steps for the tables, streams and sink of a call.

#pragma once

#include "kernels.h"

namespace ectcq {

// Level has kMostStreams, of a loop, kLeast and kMost, the fewest and most comparisons, and
//
//     template <int kComparisons, int kStreams, bool kRead, Sink kSink>
//     static size_t steps(tables, streams, count of steps, x, out)
//
// and is a type of its own file, as each file is compiled for another instruction set.
template <typename Level>
class ChooseSteps {
 public:
  // Kernels::steps.
  static size_t steps(const SearchTables& tables, Stream* const* streams, size_t count, size_t left,
                      bool read, Sink sink, const Activations& x, float* const* out) {
    return to<Level::kLeast>(tables.comparisons, sink, count, read)(tables, streams, left, x, out);
  }

 private:
  using Steps = size_t (*)(const SearchTables&, Stream* const*, size_t, const Activations&,
                           float* const*);

  template <int kComparisons>
  static Steps to(int comparisons, Sink sink, size_t count, bool read) {
    if constexpr (kComparisons < Level::kMost) {
      if (comparisons > kComparisons) {
        return to<kComparisons + 1>(comparisons, sink, count, read);
      }
    }
    if constexpr (kComparisons > SearchTables::kFew) {
      return sink == Sink::kValues ? of<kComparisons, Sink::kValues>(count, read)
                                   : of<kComparisons, Sink::kRowSums>(count, read);
    } else {
      return sink == Sink::kValues    ? of<kComparisons, Sink::kValues>(count, read)
             : sink == Sink::kSums    ? of<kComparisons, Sink::kSums>(count, read)
             : sink == Sink::kRowSums ? of<kComparisons, Sink::kRowSums>(count, read)
                                      : of<kComparisons, Sink::kIndices>(count, read);
    }
  }

  template <int kComparisons, Sink kSink>
  static Steps of(size_t count, bool read) {
    if (!read) return Level::template steps<kComparisons, 1, false, kSink>;
    if (count == 1) return Level::template steps<kComparisons, 1, true, kSink>;
    if constexpr (Level::kMostStreams == 2) {
      return Level::template steps<kComparisons, 2, true, kSink>;
    } else {
      if (count == 2) return Level::template steps<kComparisons, 2, true, kSink>;
      if (count == 3) return Level::template steps<kComparisons, 3, true, kSink>;
      return Level::template steps<kComparisons, 4, true, kSink>;
    }
  }
};

}  // namespace ectcq
