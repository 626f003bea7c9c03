// ECTCQ: entropy-coded trellis-coded quantization. What Python calls, and what the parts share.
//
// The bitstream is specified in docs/bitstream.md. One stream holds the levels of up to a few ten
// thousand weights in 32 interleaved lanes: lane l holds weights l, l + 32, l + 64, …. Each lane has
// a trellis state and an rANS state of its own; all lanes read 16-bit words from one sequence, in
// the order of the lanes within a step of 32 weights.
//
// The invariant of rANS: between steps a lane's state x lies in [2^16, 2^32). Decoding a symbol of
// frequency f out of 4096 divides it by about 4096 / f; where that leaves it below 2^16, the next
// word is shifted in. In the last `tail` steps no words are read: the encoder starts there with small
// states, so that what a first state would waste carries levels instead.

#pragma once

#include <cstddef>
#include <cstdint>

namespace ectcq {

constexpr int kLanes = 32;
constexpr int kProbabilityBits = 12;
constexpr uint32_t kSlots = 1u << kProbabilityBits;
constexpr uint32_t kLowest = 1u << 16;

enum Status : int {
  kOk = 0,
  kTooShort = 1,   // the stream ends before its weights do
  kTooLong = 2,    // bytes are left over
  kBadHeader = 3,  // the sizes in a payload do not fit
  kBadChecksum = 4,
  kBadOutliers = 5,
  kNoMemory = 6,
};

constexpr size_t kHead = 4 + 4 * kLanes;  // of a payload: steps of the tail, first states

// What decoding needs of a matrix's entropy model.
struct Tables {
  // By union quantizer and slot: frequency | (slot − start) << 12 | symbol << 24.
  uint32_t slots[2 * kSlots];
  // By union quantizer and symbol: the value.
  float values[512];
  // Trellis: next = (state >> 1) ^ (state & 1 ? feedback : 0) ^ (symbol & 1 ? input : 0).
  uint32_t feedback;
  uint32_t input;
};

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

}  // namespace ectcq
