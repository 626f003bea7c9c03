// ECTCQ: entropy-coded trellis-coded quantization. Declarations that its decoders share.
//
// The bitstream is specified in docs/bitstream.md. One stream holds the levels of up to a few ten
// thousand weights in 32 interleaved lanes of rANS (rans.h), each with a trellis state of its own.

#pragma once

#include <cstddef>
#include <cstdint>

#include "common/native/layout.h"
#include "common/native/level.h"
#include "common/native/rans.h"

namespace ectcq {

using namespace codecs;

// State of a stream between its steps.
struct Lanes {
  alignas(64) uint32_t x[kLanes];
  alignas(64) uint32_t trellis[kLanes];
};

// Decode `steps` steps as long as a whole step's words are sure to be there. Returns the number of
// steps done; `*words` is advanced. `read` says whether words are read at all.
using StepsFunction = size_t (*)(const Tables& tables, Lanes& lanes, const uint8_t** words,
                                 const uint8_t* end, size_t steps, bool read, float* out);

size_t steps_scalar(const Tables&, Lanes&, const uint8_t**, const uint8_t*, size_t, bool, float*);
size_t steps_vector(const Tables&, Lanes&, const uint8_t**, const uint8_t*, size_t, bool, float*);
size_t steps_avx2(const Tables&, Lanes&, const uint8_t**, const uint8_t*, size_t, bool, float*);
size_t steps_avx512(const Tables&, Lanes&, const uint8_t**, const uint8_t*, size_t, bool, float*);

// That of a level (level.h).
StepsFunction steps_function(int level);

// The same for tables of few values, null where they are too many. Slots have the index of a value in
// place of the symbol, of the same parity, and the values lie at the indices, again from kSymbols on.
StepsFunction few_values_avx2(size_t values);
StepsFunction few_values_avx512(size_t values);

}  // namespace ectcq
