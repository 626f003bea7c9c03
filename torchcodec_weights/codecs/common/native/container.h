// A container's header, read and checked as container.py does, for processes without Python.
// docs/bitstream.md specifies the bytes.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace codecs {

// The four arrays of a weight.
struct WeightArrays {
  const uint8_t* data;  // qdata, the container
  size_t size;
  const uint8_t* scale;  // codes
  size_t scales;
  const float* zero_point;  // or null
  size_t zero_points;
  const uint8_t* act_pre_scale;  // codes
  size_t act_pre_scales;
};

struct Container {
  static constexpr uint32_t kSortedColumns = 1, kSortedRows = 2;  // flags of `order`

  std::string codec;
  int type;  // floats.h
  size_t rows;
  size_t cols;
  size_t tiles;
  size_t across;
  uint32_t order;
  float row_base;
  float col_base;
  uint32_t vectors_crc;
  size_t header_size;
  const uint8_t* private_data;  // into the container
  size_t private_size;
  std::vector<uint64_t> offsets;  // of the payloads
  std::vector<uint32_t> payload_sizes;
  std::vector<uint32_t> outlier_sizes;
  std::vector<float> units;
  std::vector<uint32_t> crcs;

  // Everything but the tiles. Returns what is wrong, in a message for users; empty if nothing is.
  std::string open(const WeightArrays& weight);
};

// What a weight was prepared from, but for its tiles, to compare with.
class WeightCopy {
 public:
  WeightCopy() = default;
  WeightCopy(const WeightArrays& weight, size_t header_size);

  bool is_of(const WeightArrays& weight) const;

 private:
  size_t size_ = 0;
  std::vector<uint8_t> header_, scale_, act_pre_scale_;
  std::vector<float> zero_point_;
};

// Scales of codes: ± base · 2^(((code & 127) − 127) / 8).
std::vector<float> decode_scale(const uint8_t* codes, size_t count, float base);

// Stable order of columns by the magnitude of their scales, the smallest first.
std::vector<uint32_t> sorted_order(const uint8_t* codes, size_t codes_count, size_t count);

}  // namespace codecs
