// The dtypes of weights, and the way from one to another.

#pragma once

#include <cstddef>
#include <cstdint>

namespace codecs {

enum Type : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

constexpr size_t item_size(int type) { return type == kFloat32 ? 4 : 2; }

// The value of the float of `type` at `p`.
float stored_value(const uint8_t* p, int type);

// Floats to kFloat16 or kBfloat16, rounded to nearest, ties to even (IEEE 754); by the instructions
// of a level (level.h).
void narrow(int level, const float* z, size_t count, int type, uint16_t* out);

// kFloat16 or kBfloat16 to floats.
void widen(const uint16_t* in, size_t count, int type, float* out);

}  // namespace codecs
