// The encoder's side: its trellis search.

#pragma once

#include <cstddef>
#include <cstdint>

#include "common/native/layout.h"

namespace ectcq {

// Find the path of least cost for one lane: weights z[0], z[stride], …, `steps` of them. Writes the
// symbol and union quantizer of each at the same places, as symbol | quantizer << 8. `decisions`
// has a capacity of steps · states bytes.
using SearchFunction = void (*)(const Model& model, const float* z, size_t stride, size_t steps,
                                uint8_t* decisions, uint16_t* path);

// The search of the trellis with so many states; null if trellis.h has none.
SearchFunction search_baseline(int32_t states);
SearchFunction search_avx2(int32_t states);

// That of a level (level.h).
SearchFunction search_function(int level, int32_t states);

}  // namespace ectcq
