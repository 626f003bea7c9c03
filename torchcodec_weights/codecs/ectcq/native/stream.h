// One payload: 32 lanes decoded to values.

#pragma once

#include "ectcq.h"

namespace ectcq {

// Decode the `count` weights of a payload into `out`, symbols found by their slots.
int decode_by_slots(const Tables& tables, StepsFunction steps, const uint8_t* payload, size_t size,
                    size_t count, float* out);

// The same by the best of a level.
int decode_stream(const Tables& tables, int level, const uint8_t* payload, size_t size,
                  size_t count, float* out);

}  // namespace ectcq
