// Interleaved rANS: declarations shared by all streams (Giesen, "Interleaved entropy coders", arXiv
// 1402.3392). docs/bitstream.md specifies the bytes.
//
// A stream holds symbols in 32 lanes: lane l holds symbols l, l + 32, l + 64, …. Each lane has a
// state of its own; all lanes read 16-bit words from one sequence, in the order of the lanes within
// a step of 32 symbols.
//
// The invariant: between steps a lane's state x lies in [2^16, 2^32). Decoding a symbol of frequency
// f out of 4096 divides it by about 4096 / f; where that leaves it below 2^16, the next word is
// shifted in. In the last `tail` steps no words are read: the encoder starts there with small
// states, so that the bits of a first state carry symbols too.

#pragma once

#include <cstddef>
#include <cstdint>

namespace codecs {

constexpr int kLanes = 32;
constexpr int kProbabilityBits = 12;
constexpr uint32_t kSlots = 1u << kProbabilityBits;
constexpr uint32_t kLowest = 1u << 16;

constexpr size_t kHead = 4 + 4 * kLanes;  // of a stream: steps of the tail, first states

enum Status : int {
  kOk = 0,
  kTooShort = 1,   // the stream ends before its weights do
  kTooLong = 2,    // bytes are left over
  kBadHeader = 3,  // the sizes in a payload do not fit
  kBadChecksum = 4,
  kBadOutliers = 5,
  kNoMemory = 6,
};

// A slot of a table: frequency | (slot − start) << 12 | symbol << 24.
constexpr uint32_t slot_entry(uint32_t frequency, uint32_t offset, uint32_t symbol) {
  return frequency | offset << kProbabilityBits | symbol << 24;
}

}  // namespace codecs
