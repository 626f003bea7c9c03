// Weights to a payload: cut into planes, each coded in the way that takes the fewest bytes.

#include <cstring>
#include <vector>

#include "lossless.h"
#include "common/native/encode_stream.h"

namespace lossless {
namespace {

// Least bits per weight that an entropy-coded plane must save against a plain one, as decoding it
// takes many times as long.
constexpr double kWorthwhile = 1.0 / 64;

// Bytes of a stream besides its symbols' bits: the head, less what the tail saves.
constexpr double kStreamCost = 80;

struct Plane {
  std::vector<uint8_t> values;
  uint64_t counts[kSymbols] = {};
};

uint8_t* pack_part(const uint8_t* values, unsigned at, unsigned bits, uint8_t* out) {
  const unsigned bytes = kGroup / 8 * bits;
  const unsigned mask = (1u << bits) - 1;
  std::memset(out, 0, bytes);
  for (unsigned k = 0; k < 8; k += bits, values += bytes) {
    for (unsigned i = 0; i < bytes; ++i) {
      out[i] = static_cast<uint8_t>(out[i] | (values[i] >> at & mask) << k);
    }
  }
  return out + bytes;
}

uint8_t* pack(const Plane& plane, unsigned width, size_t groups, uint8_t* out) {
  for (size_t g = 0; g < groups; ++g) {
    unsigned at = 0;
    for (unsigned bits = 8; bits; bits /= 2) {
      if (!(width & bits)) continue;
      out = pack_part(plane.values.data() + g * kGroup, at, bits, out);
      at += bits;
    }
  }
  return out;
}

uint8_t* encode_symbols(const Frequencies& frequencies, const Plane& plane, size_t count,
                        uint8_t* out) {
  Range ranges[kSymbols];
  uint32_t start = 0;
  for (int s = 0; s < kSymbols; ++s) {
    ranges[s] = {frequencies.of[s], start};
    start += frequencies.of[s];
  }
  const uint8_t* values = plane.values.data();
  return out + encode_lanes((count + kLanes - 1) / kLanes, out,
                            [&](size_t t, size_t l) { return ranges[values[t * kLanes + l]]; });
}

uint8_t* encode_plane(const Shared& shared, int k, const Plane& plane, size_t count, uint8_t* out) {
  uint8_t* data = out + kPlaneHead;
  uint8_t* end = data;
  const unsigned width = shared.width(k);
  const size_t groups = groups_of(count);
  uint64_t among = 0;
  for (const uint64_t c : plane.counts) among += c > 0;
  if (among == 1) {
    *out = kConstant;
    *end++ = plane.values[0];
  } else {
    const Frequencies own = frequencies_of(plane.counts);
    uint8_t table[kTableBound];
    const size_t table_size = write_table(own, table);
    const double own_cost =
        coded_bits(own, plane.counts) + 8 * (kStreamCost + static_cast<double>(table_size));
    const double shared_cost =
        k == 0 ? coded_bits(shared.frequencies, plane.counts) + 8 * kStreamCost : own_cost;
    const double coded = own_cost < shared_cost ? own_cost : shared_cost;
    const double plain = 8 * static_cast<double>(plain_size(width, count));
    if (coded + kWorthwhile * static_cast<double>(count) >= plain) {
      *out = kPlain;
      end = pack(plane, width, groups, data);
    } else if (k == 0 && shared_cost <= own_cost) {
      *out = kSharedTable;
      end = encode_symbols(shared.frequencies, plane, count, data);
    } else {
      *out = kOwnTable;
      std::memcpy(data, table, table_size);
      end = encode_symbols(own, plane, count, data + table_size);
    }
  }
  const uint32_t size = static_cast<uint32_t>(end - data);
  std::memcpy(out + 1, &size, 4);
  return end;
}

// Cut weights of type Bits into planes; returns how many are outliers, whose places go to `outliers`.
template <typename Bits>
size_t cut(const Shared& shared, const Bits* weights, size_t count, Plane* planes,
           uint32_t* outliers) {
  constexpr unsigned kSign = 8 * sizeof(Bits) - 1;
  constexpr int kLow = sizeof(Bits) == 4 ? 2 : 0;  // low planes
  const unsigned below_sign = shared.width(1) - 1;
  uint32_t usual = 0;  // the symbol in an outlier's place
  for (uint32_t s = 0; s < kSymbols; ++s) {
    if (shared.frequencies.of[s] > shared.frequencies.of[usual]) usual = s;
  }
  size_t found = 0;
  for (size_t i = 0; i < count; ++i) {
    const uint32_t bits = weights[i];
    const uint32_t sign = bits >> kSign, magnitude = bits & ((1u << kSign) - 1);
    const uint32_t field = magnitude >> shared.shift;
    uint32_t symbol = field ? field - shared.base : 0;
    if (symbol >= kSymbols || (field && !symbol) || !shared.frequencies.of[symbol]) {
      outliers[found++] = static_cast<uint32_t>(i);
      symbol = usual;
    }
    const uint32_t rest = magnitude >> (8 * kLow) & ((1u << below_sign) - 1);
    planes[0].values[i] = static_cast<uint8_t>(symbol);
    planes[1].values[i] = static_cast<uint8_t>(sign << below_sign | rest);
    for (int k = 0; k < kLow; ++k) {
      planes[2 + k].values[i] = static_cast<uint8_t>(magnitude >> (8 * (kLow - 1 - k)));
    }
  }
  return found;
}

}  // namespace
}  // namespace lossless

#pragma GCC visibility push(default)
extern "C" {

using namespace lossless;

// Count the magnitudes of weights by their highest bits, the field of the smallest shift there is:
// counts[2048] for kFloat32 and kBfloat16, counts[256] for kFloat16. Adds to what is there.
void lossless_count(int type, const void* weights, size_t count, uint64_t* counts) {
  if (type == kFloat32) {
    const uint32_t* bits = static_cast<const uint32_t*>(weights);
    for (size_t i = 0; i < count; ++i) ++counts[bits[i] >> 20 & 0x7FF];
  } else {
    const uint16_t* bits = static_cast<const uint16_t*>(weights);
    const unsigned shift = type == kFloat16 ? 7 : 4;
    for (size_t i = 0; i < count; ++i) ++counts[(bits[i] & 0x7FFF) >> shift];
  }
}

// Write the table for the counts of 256 symbols as it is stored, at most 513 bytes; returns its size.
// `*bits` is the length of these symbols coded with it.
size_t lossless_table(const uint64_t* counts, uint8_t* out, double* bits) {
  const Frequencies frequencies = frequencies_of(counts);
  *bits = coded_bits(frequencies, counts);
  return write_table(frequencies, out);
}

// Bytes that a payload of `count` weights can take at most.
size_t lossless_bound(size_t count) {
  return kMaxPlanes * (kPlaneHead + kTableBound + stream_bound(count + kGroup));
}

// Encode `count` weights into `payload`, of lossless_bound(count) bytes of capacity. Returns its
// size in bytes, or 0 where the private data is malformed. Positions of outliers go to `outliers`,
// of capacity `count`, their number to `*found`.
size_t lossless_encode(int type, const uint8_t* data, size_t size, const void* weights,
                       size_t count, uint8_t* payload, uint32_t* outliers, size_t* found) {
  Shared shared;
  if (read_shared(type, data, size, &shared) != kOk) return 0;
  Plane planes[kMaxPlanes];
  const size_t padded = groups_of(count) * kGroup;
  for (int k = 0; k < shared.planes(); ++k) planes[k].values.resize(padded);
  *found = type == kFloat32
               ? cut(shared, static_cast<const uint32_t*>(weights), count, planes, outliers)
               : cut(shared, static_cast<const uint16_t*>(weights), count, planes, outliers);
  uint8_t* end = payload;
  for (int k = 0; k < shared.planes(); ++k) {
    Plane& plane = planes[k];
    std::memset(plane.values.data() + count, plane.values[0], padded - count);
    for (size_t i = 0; i < count; ++i) ++plane.counts[plane.values[i]];
    end = encode_plane(shared, k, plane, count, end);
  }
  return static_cast<size_t>(end - payload);
}

}  // extern "C"
#pragma GCC visibility pop
