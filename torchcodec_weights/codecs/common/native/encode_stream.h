// The encoder of stream.h's streams.

#pragma once

#include <cstring>
#include <vector>

#include "rans.h"

namespace codecs {

// Bytes that a stream of `count` symbols can take at most.
constexpr size_t stream_bound(size_t count) { return kHead + 2 * (count + kLanes); }

// A symbol's frequency out of 4096, and the sum of the frequencies of all smaller symbols.
struct Range {
  uint32_t frequency;
  uint32_t start;
};

// Encode `steps` steps of 32 symbols into `out`, of `stream_bound` bytes of capacity; returns
// the size in bytes. `range_of(t, l)` is the Range of the symbol of step t in lane l.
template <typename RangeOf>
size_t encode_lanes(size_t steps, uint8_t* out, RangeOf range_of) {
  // State x after a symbol.
  const auto coded = [](auto x, Range range) {
    return (x / range.frequency << kProbabilityBits) + range.start + x % range.frequency;
  };
  // The longest tail that fits into every lane's state, and the least first state that ends in
  // the range where words are read.
  uint64_t x[kLanes];
  for (size_t l = 0; l < kLanes; ++l) x[l] = kLowest;
  size_t tail = 0;
  for (size_t longer = 1; longer <= steps && longer < 256; ++longer) {
    uint64_t ends[kLanes];
    bool fits = true;
    for (size_t l = 0; fits && l < kLanes; ++l) {
      for (uint64_t begin = 1;; begin *= 2) {
        ends[l] = begin;
        for (size_t t = steps; t-- > steps - longer;) {
          ends[l] = coded(ends[l], range_of(t, l));
          if (ends[l] >> 32) break;
        }
        if (ends[l] >= kLowest) break;
      }
      fits = ends[l] >> 32 == 0;
    }
    if (!fits) break;
    std::memcpy(x, ends, sizeof(x));
    tail = longer;
  }
  std::vector<uint16_t> words((steps - tail) * kLanes);
  size_t count = 0;
  for (size_t t = steps - tail; t-- > 0;) {
    for (size_t l = kLanes; l-- > 0;) {
      const Range range = range_of(t, l);
      uint32_t state = static_cast<uint32_t>(x[l]);
      // Written whether it is kept or not, which saves a branch that is hard to predict.
      const bool full = state >> 20 >= range.frequency;
      words[count] = static_cast<uint16_t>(state);
      count += full;
      state >>= full ? 16 : 0;
      x[l] = coded(state, range);
    }
  }
  const uint32_t head = static_cast<uint32_t>(tail);
  std::memcpy(out, &head, 4);
  for (size_t l = 0; l < kLanes; ++l) {
    const uint32_t state = static_cast<uint32_t>(x[l]);
    std::memcpy(out + 4 + 4 * l, &state, 4);
  }
  uint8_t* end = out + kHead;
  for (size_t k = count; k-- > 0; end += 2) std::memcpy(end, &words[k], 2);
  return static_cast<size_t>(end - out);
}

}  // namespace codecs
