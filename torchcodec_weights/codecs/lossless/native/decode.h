// Decoding one payload: its planes are decoded and combined to weights.

#pragma once

#include "lossless.h"

namespace lossless {

// Bytes of the buffer that decoding a payload of `count` weights needs.
constexpr size_t planes_size(size_t count) { return kMaxPlanes * groups_of(count) * kGroup; }

// A matrix's private data, ready to decode with.
struct Decoder {
  Shared shared;
  uint32_t slots[kSlots];
};

int open_decoder(int type, const uint8_t* data, size_t size, Decoder* decoder);

// Decode the `count` weights of a payload into `out`, bits of the stored type. `buffer` has
// planes_size(count) bytes.
int decode_payload(const Decoder& decoder, int level, const uint8_t* payload, size_t size,
                   size_t count, uint8_t* buffer, void* out);

}  // namespace lossless
