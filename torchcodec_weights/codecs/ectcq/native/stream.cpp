#include "stream.h"

#include <cstring>

namespace ectcq {
namespace {

StepsFunction steps_function(int level) {
#if defined(ECTCQ_X86)
  if (level == kAvx512) return steps_avx512;
  if (level == kAvx2) return steps_avx2;
#endif
  return level == kScalar ? steps_scalar : steps_vector;
}

// One step at the end of a stream, where a whole step's words may not be there.
int careful_step(const Tables& tables, Lanes& lanes, const uint8_t** words, const uint8_t* end,
                 float* out) {
  uint8_t padded[2 * kLanes] = {};
  const size_t left = static_cast<size_t>(end - *words);
  const size_t taken = left < sizeof(padded) ? left : sizeof(padded);
  std::memcpy(padded, *words, taken);
  const uint8_t* p = padded;
  steps_scalar(tables, lanes, &p, padded + sizeof(padded), 1, true, out);
  const size_t used = static_cast<size_t>(p - padded);
  if (used > taken) return kTooShort;
  *words += used;
  return kOk;
}

}  // namespace

int decode_stream(const Tables& tables, int level, const uint8_t* payload, size_t size,
                  size_t count, float* out) {
  if (size < kHead) return kTooShort;
  uint32_t tail;
  std::memcpy(&tail, payload, 4);
  Lanes lanes;
  std::memcpy(lanes.x, payload + 4, sizeof(lanes.x));
  std::memset(lanes.trellis, 0, sizeof(lanes.trellis));
  const uint8_t* words = payload + kHead;
  const uint8_t* end = payload + size;
  const StepsFunction steps_of = steps_function(level);
  const size_t whole = count / kLanes;
  const size_t steps = (count + kLanes - 1) / kLanes;
  if (tail > steps) return kBadHeader;
  const size_t reading = steps - tail;
  float last[kLanes];  // the last step may reach beyond the weights
  size_t t = steps_of(tables, lanes, &words, end, reading < whole ? reading : whole, true, out);
  for (; t < reading; ++t) {
    float* to = t < whole ? out + t * kLanes : last;
    const int status = careful_step(tables, lanes, &words, end, to);
    if (status != kOk) return status;
  }
  if (t < whole) {
    steps_of(tables, lanes, &words, end, whole - t, false, out + t * kLanes);
    t = whole;
  }
  if (t < steps) steps_of(tables, lanes, &words, end, 1, false, last);
  if (whole < steps) {
    std::memcpy(out + whole * kLanes, last, (count - whole * kLanes) * sizeof(float));
  }
  return words == end ? kOk : kTooLong;
}

}  // namespace ectcq
