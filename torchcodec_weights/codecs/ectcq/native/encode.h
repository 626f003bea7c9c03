// The encoder's side: what it knows of a matrix, and its trellis search.

#pragma once

#include <cstddef>
#include <cstdint>

namespace ectcq {

constexpr int kSymbols = 256;
constexpr int kMaxStates = 256;

// A matrix's entropy model, and what the search makes of it.
struct Model {
  uint32_t frequency[2][kSymbols];  // by union quantizer and symbol; 0 where there is no such symbol
  uint32_t start[2][kSymbols];      // sum of the frequencies of smaller symbols
  // Cost of a symbol for a weight z, less z²: line[0] − z · line[1], with line[0] = value² + λ · bits
  // and line[1] = 2 · value.
  float line[2][kSymbols][2];
  // Best symbol by class (union quantizer, parity) and cell of z.
  const uint8_t* best;  // [4][cells]
  int32_t cells;
  float first_cell;     // z where the first cell begins
  float cells_per_unit;
  int32_t states;       // 8, 64 or 256
};

// Find the path of least cost for one lane: weights z[0], z[stride], …, `steps` of them. Writes the
// symbol and union quantizer of each at the same places, as symbol | quantizer << 8. `decisions`
// has room for steps · states bytes.
using SearchFunction = void (*)(const Model& model, const float* z, size_t stride, size_t steps,
                                uint8_t* decisions, uint16_t* path);

void search_baseline(const Model&, const float*, size_t, size_t, uint8_t*, uint16_t*);
void search_avx2(const Model&, const float*, size_t, size_t, uint8_t*, uint16_t*);

}  // namespace ectcq
