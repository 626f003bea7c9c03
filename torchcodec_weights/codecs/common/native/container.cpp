#include "container.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "crc32c.h"
#include "floats.h"

namespace codecs {
namespace {

constexpr size_t kFixed = 52;  // bytes of the header in all versions
constexpr size_t kTile = 16;   // of an entry of the tile table
constexpr size_t kCrc = 4;
constexpr uint32_t kNewest = 3;  // version
constexpr uint64_t kMaxWeights = uint64_t{1} << 40, kMaxTile = INT32_MAX;

// Limits on files, as policy.py has them and for the same reasons.
constexpr uint64_t kMaxExpansion = 1 << 14, kFreeWeights = 1 << 24;

template <typename T>
T read(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

uint64_t max_expansion() {
  const char* text = std::getenv("TORCHCODEC_WEIGHTS_MAX_EXPANSION");
  const uint64_t set = text ? std::strtoull(text, nullptr, 10) : 0;
  return set ? set : kMaxExpansion;
}

}  // namespace

std::string Container::open(const WeightArrays& weight) {
  const uint8_t* p = weight.data;
  if (weight.size < kFixed) return "container is shorter than its fixed header";
  if (std::memcmp(p, "TCWB", 4) != 0) return "not a codec weight: does not start with 'TCWB'";
  const uint32_t version = read<uint16_t>(p + 4);
  if (version > kNewest) return "container format is newer than 3: upgrade torchcodec_weights";
  const size_t name_size = p[7];
  header_size = read<uint32_t>(p + 8);
  private_size = read<uint32_t>(p + 12);
  const uint64_t total = read<uint64_t>(p + 16);
  rows = read<uint32_t>(p + 24);
  cols = read<uint32_t>(p + 28);
  tiles = read<uint32_t>(p + 32);
  const size_t name = kFixed + (version > 1 ? 4 : 0) + (version > 2 ? 4 : 0);
  const uint64_t expected = uint64_t{name} + name_size + private_size + kTile * tiles + kCrc;
  if (header_size != expected || header_size > weight.size) {
    return "container header is corrupt or cut short: its sizes do not agree";
  }
  if (crc32c(p, header_size - kCrc) != read<uint32_t>(p + header_size - kCrc)) {
    return "container header is corrupt: its CRC-32C does not match";
  }
  type = p[6];
  vectors_crc = read<uint32_t>(p + 36);
  row_base = read<float>(p + 40);
  col_base = read<float>(p + 44);
  across = version > 1 ? read<uint32_t>(p + kFixed) : 1;
  order = version > 2 ? read<uint32_t>(p + kFixed + 4) : 0;
  const bool whole = across > 0 && tiles % across == 0;
  const size_t down = whole ? tiles / across : 0;
  const bool tiled = down >= 1 && down <= rows && across <= cols;
  const bool ordered = order <= kSortedColumns + kSortedRows && (order == 0 || across == 1);
  if (version < 1 || type > kBfloat16 || !tiled || !ordered) {
    return "container header holds values that its format does not allow";
  }
  const uint64_t tile = ((rows + down - 1) / down) * ((cols + across - 1) / across);
  if (uint64_t{rows} * cols > kMaxWeights || tile > kMaxTile) {
    return "container holds more weights than are allowed in all or in a tile";
  }
  if (!std::isfinite(row_base) || !std::isfinite(col_base)) return "container has infinite scales";
  codec.assign(reinterpret_cast<const char*>(p + name), name_size);
  private_data = p + name + name_size;
  const uint8_t* entry = private_data + private_size;
  uint64_t place = header_size, present = 0;
  offsets.clear(), payload_sizes.clear(), outlier_sizes.clear(), units.clear(), crcs.clear();
  for (size_t i = 0; i < tiles; ++i, entry += kTile) {
    offsets.push_back(place);
    payload_sizes.push_back(read<uint32_t>(entry));
    outlier_sizes.push_back(read<uint32_t>(entry + 4));
    units.push_back(read<float>(entry + 8));
    crcs.push_back(read<uint32_t>(entry + 12));
    if (!std::isfinite(units.back()))
      return "container's tile table holds a unit that is not finite";
    place += uint64_t{payload_sizes.back()} + outlier_sizes.back();
    present += payload_sizes.back() != 0;
  }
  if (place != total) return "container's tile table does not add up to its size";
  if (total != weight.size) return "container is not as long as its header says";
  const auto fits = [](size_t count, size_t most) { return count == 1 || count == most; };
  if (!fits(weight.scales, rows) || !fits(weight.act_pre_scales, cols) ||
      (weight.zero_point && weight.zero_points != rows)) {
    return "scale, zero_point or act_pre_scale does not fit the matrix";
  }
  std::vector<uint8_t> vectors(weight.scale, weight.scale + weight.scales);
  if (weight.zero_point) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(weight.zero_point);
    vectors.insert(vectors.end(), bytes, bytes + 4 * weight.zero_points);
  }
  vectors.insert(vectors.end(), weight.act_pre_scale, weight.act_pre_scale + weight.act_pre_scales);
  if (crc32c(vectors.data(), vectors.size()) != vectors_crc) {
    return "scale, zero_point or act_pre_scale is corrupt or of another matrix";
  }
  const uint64_t weights = std::min(uint64_t{rows} * cols, present * tile);
  const uint64_t stored = total + vectors.size(), most = max_expansion();
  if (weights > kFreeWeights && (weights - 1) / most >= stored) {
    return "container holds more weights for its bytes than any encoder writes; "
           "TORCHCODEC_WEIGHTS_MAX_EXPANSION sets the limit";
  }
  return {};
}

WeightCopy::WeightCopy(const WeightArrays& weight, size_t header_size)
    : size_(weight.size),
      header_(weight.data, weight.data + header_size),
      scale_(weight.scale, weight.scale + weight.scales),
      act_pre_scale_(weight.act_pre_scale, weight.act_pre_scale + weight.act_pre_scales),
      zero_point_(weight.zero_point, weight.zero_point + weight.zero_points) {}

bool WeightCopy::is_of(const WeightArrays& weight) const {
  const auto same = [](const auto& ours, const auto* theirs, size_t count) {
    return ours.size() == count &&
           (count == 0 || std::memcmp(ours.data(), theirs, count * sizeof(ours[0])) == 0);
  };
  return weight.size == size_ && same(header_, weight.data, header_.size()) &&
         same(scale_, weight.scale, weight.scales) &&
         same(act_pre_scale_, weight.act_pre_scale, weight.act_pre_scales) &&
         same(zero_point_, weight.zero_point, weight.zero_points);
}

std::vector<float> decode_scale(const uint8_t* codes, size_t count, float base) {
  // 2^(i / 8), rounded to the nearest: the powers between are exact multiples.
  constexpr double kEighths[] = {0x1p+0,
                                 0x1.172b83c7d517bp+0,
                                 0x1.306fe0a31b715p+0,
                                 0x1.4bfdad5362a27p+0,
                                 0x1.6a09e667f3bcdp+0,
                                 0x1.8ace5422aa0dbp+0,
                                 0x1.ae89f995ad3adp+0,
                                 0x1.d5818dcfba487p+0};
  float table[256];
  for (int code = 0; code < 128; ++code) {
    const double power = std::ldexp(kEighths[(code + 1) % 8], (code + 1) / 8 - 16);
    table[code] = static_cast<float>(power * static_cast<double>(base));
    table[code + 128] = -table[code];
  }
  std::vector<float> scales(count);
  for (size_t i = 0; i < count; ++i) scales[i] = table[codes[i]];
  return scales;
}

std::vector<uint32_t> sorted_order(const uint8_t* codes, size_t codes_count, size_t count) {
  std::vector<uint32_t> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (codes_count == count) {
    std::stable_sort(order.begin(), order.end(), [codes](uint32_t a, uint32_t b) {
      return (codes[a] & 127) < (codes[b] & 127);
    });
  }
  return order;
}

}  // namespace codecs
