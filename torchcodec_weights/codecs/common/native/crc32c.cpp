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
__attribute__((target("sse4.2"))) uint32_t crc32c_sse42(const uint8_t* p, size_t size) {
  uint64_t crc = ~0u;
  for (; size >= 8; size -= 8, p += 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    crc = _mm_crc32_u64(crc, word);
  }
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
