// Decoding a stream of 32 lanes from its first byte to its last, for symbols of any kind.

#pragma once

#include <cstring>

#include "rans.h"

namespace codecs {

// Advance by `steps` steps that read words; the functions are those of decode_lanes. Returns kOk or
// kTooShort.
template <typename Value, typename Fast, typename Scalar>
int read_steps(const uint8_t** words, const uint8_t* end, size_t steps, Value* out, Fast fast,
               Scalar scalar) {
  for (size_t t = fast(words, end, steps, true, out); t < steps; ++t) {
    uint8_t padded[2 * kLanes] = {};
    const size_t left = static_cast<size_t>(end - *words);
    const size_t taken = left < sizeof(padded) ? left : sizeof(padded);
    std::memcpy(padded, *words, taken);
    const uint8_t* p = padded;
    scalar(&p, padded + sizeof(padded), 1, true, out + t * kLanes);
    const size_t used = static_cast<size_t>(p - padded);
    if (used > taken) return kTooShort;
    *words += used;
  }
  return kOk;
}

// Decode a stream of `count` symbols into `out`. `x` gets the first states of the lanes. The two
// functions advance it by up to `steps` steps and return the number of steps done:
//
//     fast(&words, end, steps, read, out)     ends early where a whole step's words may not be there
//     scalar(&words, end, steps, read, out)   the same, lane by lane
template <typename Value, typename Fast, typename Scalar>
int decode_lanes(const uint8_t* stream, size_t size, size_t count, uint32_t (&x)[kLanes],
                 Value* out, Fast fast, Scalar scalar) {
  if (size < kHead) return kTooShort;
  uint32_t tail;
  std::memcpy(&tail, stream, 4);
  std::memcpy(x, stream + 4, sizeof(x));
  const uint8_t* words = stream + kHead;
  const uint8_t* end = stream + size;
  const size_t whole = count / kLanes;
  const size_t steps = (count + kLanes - 1) / kLanes;
  if (tail > steps) return kBadHeader;
  const size_t reading = steps - tail;
  Value last[kLanes];  // the last step may reach beyond the symbols
  const size_t first = reading < whole ? reading : whole;
  int status = read_steps(&words, end, first, out, fast, scalar);
  if (status != kOk) return status;
  if (first < whole) fast(&words, end, whole - first, false, out + first * kLanes);
  if (whole < steps) {
    if (reading == steps) {
      status = read_steps(&words, end, 1, last, fast, scalar);
      if (status != kOk) return status;
    } else {
      fast(&words, end, 1, false, last);
    }
    std::memcpy(out + whole * kLanes, last, (count - whole * kLanes) * sizeof(Value));
  }
  return words == end ? kOk : kTooLong;
}

}  // namespace codecs
