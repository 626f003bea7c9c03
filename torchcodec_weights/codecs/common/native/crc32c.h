// CRC-32C (RFC 3720, appendix B.4).

#pragma once

#include <cstddef>
#include <cstdint>

namespace codecs {

uint32_t crc32c(const uint8_t* p, size_t size);

}  // namespace codecs
