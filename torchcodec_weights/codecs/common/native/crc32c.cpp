#include "crc32c.h"

#include <array>
#include <cstring>

#if defined(CODECS_X86)
#include <immintrin.h>
#endif

namespace codecs {
namespace {

uint32_t crc32c_table(const uint8_t* p, size_t size) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> t{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int k = 0; k < 8; ++k) c = (c >> 1) ^ (c & 1 ? 0x82F63B78u : 0);
      t[i] = c;
    }
    return t;
  }();
  uint32_t crc = ~0u;
  for (; size; --size) crc = (crc >> 8) ^ table[(crc ^ *p++) & 255];
  return ~crc;
}

#if defined(CODECS_X86)
// Of each of the three parts of a block. An instruction waits for the one before it, and three take
// no longer than one.
constexpr size_t kPart = 512;

// How far ahead memory is read: what a product checks first is not in a cache, of a large model.
constexpr size_t kAhead = 12 * kPart;

// What kPart bytes of zero make of a remainder: a linear map, by the remainder's bytes.
using Shift = std::array<std::array<uint32_t, 256>, 4>;

__attribute__((target("sse4.2"))) uint64_t advance(uint64_t crc, const uint8_t* p) {
  uint64_t word;
  std::memcpy(&word, p, 8);
  return _mm_crc32_u64(crc, word);
}

__attribute__((target("sse4.2"))) Shift shift_of_part() {
  Shift shift;
  for (uint32_t byte = 0; byte < 4; ++byte) {
    for (uint32_t value = 0; value < 256; ++value) {
      uint64_t crc = value << 8 * byte;
      for (size_t i = 0; i < kPart; i += 8) crc = _mm_crc32_u64(crc, 0);
      shift[byte][value] = static_cast<uint32_t>(crc);
    }
  }
  return shift;
}

uint64_t shifted(const Shift& shift, uint64_t crc) {
  return shift[0][crc & 255] ^ shift[1][crc >> 8 & 255] ^ shift[2][crc >> 16 & 255] ^
         shift[3][crc >> 24 & 255];
}

__attribute__((target("sse4.2"))) uint32_t crc32c_sse42(const uint8_t* p, size_t size) {
  static const Shift shift = shift_of_part();
  uint64_t crc = ~0u;
  for (; size >= 3 * kPart; size -= 3 * kPart, p += 3 * kPart) {
    uint64_t second = 0, third = 0;
    for (size_t line = 0; line < kPart; line += 64) {
      for (size_t k = 0; k < 3; ++k) __builtin_prefetch(p + kAhead + k * kPart + line);
      for (size_t i = line; i < line + 64; i += 8) {
        crc = advance(crc, p + i);
        second = advance(second, p + kPart + i);
        third = advance(third, p + 2 * kPart + i);
      }
    }
    crc = shifted(shift, shifted(shift, crc) ^ second) ^ third;
  }
  for (; size >= 8; size -= 8, p += 8) crc = advance(crc, p);
  uint32_t rest = static_cast<uint32_t>(crc);
  for (; size; --size) rest = _mm_crc32_u8(rest, *p++);
  return ~rest;
}
#endif

}  // namespace

uint32_t crc32c(const uint8_t* p, size_t size) {
#if defined(CODECS_X86)
  if (__builtin_cpu_supports("sse4.2")) return crc32c_sse42(p, size);
#endif
  return crc32c_table(p, size);
}

}  // namespace codecs
