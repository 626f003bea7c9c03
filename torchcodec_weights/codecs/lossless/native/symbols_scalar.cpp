// Steps of 32 lanes in plain C++: the reference for the vector versions.

#include "lossless.h"
#include "common/native/rans_scalar.h"

namespace lossless {
namespace {

template <bool kRead>
size_t steps(const uint32_t* slots, uint32_t* x, const uint8_t** words, const uint8_t* end,
             size_t count, uint8_t* out) {
  size_t done = 0;
  for (; done < count; ++done) {
    if (kRead && static_cast<size_t>(end - *words) < 2 * kLanes) break;
    for (int l = 0; l < kLanes; ++l) {
      const uint32_t entry = slots[x[l] & (kSlots - 1)];
      out[done * kLanes + l] = static_cast<uint8_t>(entry >> 24);
      x[l] = next_state<kRead>(x[l], entry, words);
    }
  }
  return done;
}

}  // namespace

size_t symbols_scalar(const uint32_t* slots, uint32_t* x, const uint8_t** words, const uint8_t* end,
                      size_t count, bool read, uint8_t* out) {
  return read ? steps<true>(slots, x, words, end, count, out)
              : steps<false>(slots, x, words, end, count, out);
}

}  // namespace lossless
