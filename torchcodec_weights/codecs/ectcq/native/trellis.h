// The trellises of ECTCQ: Ungerboeck's codes for amplitude modulation ("Channel coding with
// multilevel/phase signals", IEEE Trans. Inf. Theory 28, 1982, table I). Python reads this table
// through ectcq_trellis.

#pragma once

#include <cstdint>

namespace ectcq {

struct Trellis {
  int32_t states;
  uint32_t h0;  // parity-check polynomials
  uint32_t h1;
};

constexpr Trellis kTrellises[] = {{8, 013, 04}, {64, 0103, 024}, {256, 0515, 0362}};

}  // namespace ectcq
