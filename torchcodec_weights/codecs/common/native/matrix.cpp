#include "matrix.h"

#include "buffer.h"
#include "crc32c.h"

namespace codecs {

int check_sizes(const MatrixView& m) {
  constexpr uint64_t kMaxSide = UINT32_MAX, kMaxTile = INT32_MAX;
  const bool grid = m.tiles >= 1 && m.tiles <= m.rows && m.first < m.end && m.end <= m.tiles;
  if (!grid || m.rows > kMaxSide || m.cols < 1 || m.cols > kMaxSide) return kBadHeader;
  // Sides are below 2^32, so this product is below 2^64.
  const uint64_t rows = (m.rows + m.tiles - 1) / m.tiles;
  return rows * m.cols <= kMaxTile && m.rows * m.cols <= UINT64_MAX / 64 ? kOk : kBadHeader;
}

int check_tile(const MatrixView& m, size_t tile) {
  const uint64_t offset = m.offsets[tile];
  const uint64_t stored = static_cast<uint64_t>(m.payload_sizes[tile]) + m.outlier_sizes[tile];
  if (offset > m.size || stored > m.size - offset) return kTooShort;
  return crc32c(m.data + offset, stored) == m.crcs[tile] ? kOk : kBadChecksum;
}

const char* status_text(int status) {
  switch (status) {
    case kTooShort: return "stream ends before its weights do";
    case kTooLong: return "stream has bytes left over";
    case kBadHeader: return "sizes or tables of a stream do not fit";
    case kBadChecksum: return "checksum (CRC-32C) does not match";
    case kBadOutliers: return "outlier section is malformed";
    case kNoMemory: return "no memory for a tile";
    default: return nullptr;
  }
}

uint8_t* tile_buffer(size_t bytes) {
  thread_local Buffer buffer;
  return buffer.reserve(bytes);
}

}  // namespace codecs

#pragma GCC visibility push(default)
extern "C" const char* codecs_status_text(int status) { return codecs::status_text(status); }
#pragma GCC visibility pop
