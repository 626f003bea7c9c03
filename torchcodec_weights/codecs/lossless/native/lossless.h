// Bit-exact floats: declarations that encoder and decoder share. docs/bitstream.md specifies the
// bytes.
//
// A weight of W bits is cut into planes of at most eight bits. The bits but the sign are its
// magnitude; those above the lowest `shift` are the field, the exponent and perhaps the first bits
// of the mantissa, and are numbered as symbols of eight bits:
//
//     symbols    the field, 0 as 0, others less `base`
//     middle     the sign, and the mantissa's bits between field and low planes: `width` bits
//     low        for W = 32 two planes of eight bits, the high one first
//
// A weight whose field has no symbol is stored as an outlier.

#pragma once

#include <cstddef>
#include <cstdint>

#include "common/native/floats.h"
#include "common/native/level.h"
#include "common/native/rans.h"
#include "table.h"

namespace lossless {

using namespace codecs;

constexpr int kMaxPlanes = 4;

enum Mode : uint8_t { kConstant = 0, kPlain = 1, kOwnTable = 2, kSharedTable = 3 };

constexpr size_t kPlaneHead = 5;  // mode and size

// The container's private data, shared by all tiles of a matrix.
struct Shared {
  int type;
  unsigned shift;
  uint32_t base;
  Frequencies frequencies;

  int planes() const { return type == kFloat32 ? 4 : 2; }
  // Bits of a plane's values.
  unsigned width(int plane) const {
    if (plane != 1) return 8;
    return type == kFloat32 ? shift - 15 : shift + 1;
  }
};

// Read the private data; kOk or kBadHeader.
int read_shared(int type, const uint8_t* data, size_t size, Shared* shared);

// Values of plain planes are stored in groups, so that vector instructions can unpack them.
constexpr size_t kGroup = 128;
constexpr size_t groups_of(size_t count) { return (count + kGroup - 1) / kGroup; }
// Bytes of a plain plane.
constexpr size_t plain_size(unsigned width, size_t count) {
  return groups_of(count) * (kGroup / 8) * width;
}

// Decode steps of a stream of symbols; as ectcq's StepsFunction.
using SymbolSteps = size_t (*)(const uint32_t* slots, uint32_t* x, const uint8_t** words,
                               const uint8_t* end, size_t steps, bool read, uint8_t* out);

size_t symbols_scalar(const uint32_t*, uint32_t*, const uint8_t**, const uint8_t*, size_t, bool,
                      uint8_t*);
size_t symbols_avx2(const uint32_t*, uint32_t*, const uint8_t**, const uint8_t*, size_t, bool,
                    uint8_t*);

// Functions on many values at once: assemble.inc, compiled for each instruction set.
struct Assembler {
  // Values of a plain plane of 5, 6 or 7 bits, all of its groups.
  void (*unpack)(const uint8_t* packed, unsigned width, size_t groups, uint8_t* out);
  // Weights of their planes: uint16 or uint32.
  void (*assemble)(const Shared& shared, const uint8_t* const* planes, size_t count, void* out);
};

extern const Assembler kBaseline;
extern const Assembler kForAvx2;

}  // namespace lossless
