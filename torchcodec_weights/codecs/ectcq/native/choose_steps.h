// The function of a level's steps for the tables, streams and sink of a call.

#pragma once

#include "kernels.h"

namespace ectcq {

// Level has kMostStreams, of a loop, kLeast, the fewest comparisons, and
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
    static_assert(SearchTables::kMost == 6, "one case for each below");
    if constexpr (Level::kLeast <= 3) {
      if (tables.comparisons == 3) return to<3>(sink, count, read)(tables, streams, left, x, out);
    }
    const auto by = tables.comparisons == 4   ? to<4>(sink, count, read)
                    : tables.comparisons == 5 ? to<5>(sink, count, read)
                                              : to<6>(sink, count, read);
    return by(tables, streams, left, x, out);
  }

 private:
  using Steps = size_t (*)(const SearchTables&, Stream* const*, size_t, const Activations&,
                           float* const*);

  template <int kComparisons>
  static Steps to(Sink sink, size_t count, bool read) {
    return sink == Sink::kValues    ? of<kComparisons, Sink::kValues>(count, read)
           : sink == Sink::kSums    ? of<kComparisons, Sink::kSums>(count, read)
           : sink == Sink::kRowSums ? of<kComparisons, Sink::kRowSums>(count, read)
                                    : of<kComparisons, Sink::kIndices>(count, read);
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
