// The C interface to decoding: one payload, or the tiles of a matrix to a given dtype.

#include "common/native/matrix.h"

#include <memory>

#include "decode.h"

namespace lossless {
namespace {

// Stored weights to another type.
void convert(int level, const uint8_t* stored, int from, size_t count, float* between, int to,
             void* out) {
  const float* values = reinterpret_cast<const float*>(stored);
  if (from != kFloat32) {
    float* wide = to == kFloat32 ? static_cast<float*>(out) : between;
    widen(reinterpret_cast<const uint16_t*>(stored), count, from, wide);
    values = wide;
  }
  if (to != kFloat32) narrow(level, values, count, to, static_cast<uint16_t*>(out));
}

}  // namespace
}  // namespace lossless

#pragma GCC visibility push(default)
extern "C" {

using namespace lossless;

// Decode the `count` weights of one payload, bits of `type`.
int lossless_decode(int level, int type, const uint8_t* data, size_t size, const uint8_t* payload,
                    size_t payload_size, size_t count, void* out) {
  const auto decoder = std::make_unique<Decoder>();
  const int status = open_decoder(type, data, size, decoder.get());
  if (status != kOk) return status;
  uint8_t* buffer = tile_buffer(planes_size(count));
  if (!buffer) return kNoMemory;
  return decode_payload(*decoder, level, payload, payload_size, count, buffer, out);
}

// Decode the rows of tiles `first` to `end` − 1 of the matrix into `out`, of `type`. `data` is the
// private data. On failure `*failed` is the tile.
int lossless_decode_matrix(int level, const uint8_t* data, size_t size, const MatrixView* matrix,
                           int type, void* out, int threads, size_t* failed) {
  const MatrixView& m = *matrix;
  *failed = m.first;
  const int sizes = check_sizes(m);
  if (sizes != kOk) return sizes;
  const auto decoder = std::make_unique<Decoder>();
  const int opened = open_decoder(m.type, data, size, decoder.get());
  if (opened != kOk) return opened;
  const size_t largest = largest_tile(m);
  const size_t planes = planes_size(largest), floats = groups_of(largest) * kGroup * sizeof(float);
  // Planes; then, where they are of another type, the stored weights and the floats between.
  const size_t bytes = planes + (type == m.type ? 0 : 2 * floats);
  return for_tiles(m, threads, bytes, failed, [&](size_t i, uint8_t* buffer) {
    const int checked = check_tile(m, i);
    if (checked != kOk) return checked;
    const size_t count = m.weights(i), width = item_size(m.type);
    uint8_t* to = static_cast<uint8_t*>(out) + m.place(i) * item_size(type);
    uint8_t* stored = type == m.type ? to : buffer + planes;
    const int status =
        decode_payload(*decoder, level, m.payload(i), m.payload_sizes[i], count, buffer, stored);
    if (status != kOk) return status;
    const int outliers = for_outliers(m.payload(i) + m.payload_sizes[i], m.outlier_sizes[i], m.type,
                                      count, [&](size_t position, const uint8_t* value) {
                                        std::memcpy(stored + position * width, value, width);
                                      });
    if (outliers != kOk) return outliers;
    if (type != m.type) {
      float* between = reinterpret_cast<float*>(buffer + planes + floats);
      convert(level, stored, m.type, count, between, type, to);
    }
    return static_cast<int>(kOk);
  });
}

}  // extern "C"
#pragma GCC visibility pop
