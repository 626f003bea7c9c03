// One payload: 32 lanes decoded to values.

#pragma once

#include "ectcq.h"

namespace ectcq {

// Decode the `count` weights of a payload into `out`.
int decode_stream(const Tables& tables, int level, const uint8_t* payload, size_t size,
                  size_t count, float* out);

}  // namespace ectcq
