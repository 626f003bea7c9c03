#include "search_tables.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>

#include "kernels.h"

namespace ectcq {

namespace {

void split(const uint16_t* words, int count, uint8_t* low, uint8_t* high) {
  for (int i = 0; i < count; ++i) {
    low[i] = static_cast<uint8_t>(words[i]);
    high[i] = static_cast<uint8_t>(words[i] >> 8);
  }
}

}  // namespace

// The multiples of unit / 128 that values are; what a lane computes must be the value, to the bit.
bool SearchTables::fill_many(const ColumnClass& of, const uint32_t* begin, uint32_t feedback,
                             uint32_t input, float unit) {
  scale = unit * 0x1p-23f;
  const uint32_t count = 1u << comparisons;
  for (uint32_t q = 0; q < 2; ++q) {
    for (uint32_t k = 0; k < count; ++k) {
      const uint32_t symbol = begin[q] + k;
      const bool there = symbol < kSymbols && of.frequency[q][symbol];
      const float value = there ? of.values[q][symbol] : 0.0f;
      const float found = std::nearbyint(value / unit * 128);
      if (!(std::abs(found) <= INT16_MAX) || found * 0x1p16f * scale != value) return false;
      multiple[q << comparisons | (~k & (count - 1))] =
          static_cast<uint16_t>(static_cast<int16_t>(found));
    }
    for (uint32_t k = 0; k < 2; ++k) {
      flips_of_many[2 * q + (~k & 1)] =
          static_cast<uint16_t>((q ? feedback : 0) ^ (k & 1 ? input : 0));
    }
  }
  return true;
}

bool SearchTables::fill(const Kernels& by, int at_most, const ColumnClass& of, uint32_t feedback,
                        uint32_t input, float unit) {
  if (feedback > UINT8_MAX || input > UINT8_MAX) return false;
  uint32_t begin[2], most = 0;
  for (int q = 0; q < 2; ++q) {
    uint32_t first = 0, last = kSymbols;
    while (first < kSymbols && !of.frequency[q][first]) ++first;
    while (last > first && !of.frequency[q][last - 1]) --last;
    begin[q] = first & ~1u;  // so that parities stay
    most = std::max(most, last - begin[q]);
  }
  comparisons = by.least;
  while (comparisons <= at_most && most > 1u << comparisons) ++comparisons;
  if (comparisons > at_most) return false;
  const uint32_t count = 1u << comparisons;
  for (uint32_t q = 0; q < 2; ++q) {
    uint32_t sums[(1 << kMost) + 1] = {};
    for (uint32_t k = 0; k < count; ++k) {
      const uint32_t symbol = begin[q] + k;
      const uint32_t own = symbol < kSymbols ? of.frequency[q][symbol] : 0;
      const uint32_t index = q << comparisons | (~k & (count - 1));
      sums[k + 1] = sums[k] + own;
      if (comparisons > kFew) continue;
      frequency[index] = static_cast<uint16_t>(own);
      start[index] = static_cast<uint16_t>(sums[k]);
      uint32_t bits = 0;
      if (own) std::memcpy(&bits, &of.values[q][symbol], 4);
      flips[index] = static_cast<uint16_t>((q ? feedback : 0) ^ (k & 1 ? input : 0));
      low[index] = static_cast<uint16_t>(bits);
      high[index] = static_cast<uint16_t>(bits >> 16);
    }
    for (int j = 0; j < comparisons; ++j) {
      for (uint32_t before = 0; before < 1u << j; ++before) {
        const uint32_t index = q << j | (~before & ((1u << j) - 1));
        thresholds[threshold(j) + static_cast<int>(index)] =
            static_cast<uint16_t>(sums[(2 * before + 1) << (comparisons - 1 - j)]);
      }
    }
  }
  if (comparisons > kFew) return fill_many(of, begin, feedback, input, unit);
  if (!by.bytes) return true;
  const int entries = 2 << comparisons;
  for (int j = 0; j < kShort; ++j)
    split(thresholds + threshold(j), 2 << j, bytes.first[j], bytes.first[j] + (2 << j));
  for (int j = kShort; j < comparisons; ++j) {
    split(thresholds + threshold(j), 2 << j, bytes.threshold[j - kShort][0],
          bytes.threshold[j - kShort][1]);
  }
  for (int i = 0; i < entries; ++i) {
    const uint32_t shifted = 16u * frequency[i];
    bytes.frequency[0][i] = static_cast<uint8_t>(shifted);
    bytes.frequency[1][i] = static_cast<uint8_t>(shifted >> 8);
  }
  split(start, entries, bytes.start[0], bytes.start[1]);
  split(low, entries, bytes.value[0], bytes.value[1]);
  split(high, entries, bytes.value[2], bytes.value[3]);
  std::memset(bytes.feedback, static_cast<int>(feedback), sizeof(bytes.feedback));
  std::memset(bytes.input, static_cast<int>(input), sizeof(bytes.input));
  return true;
}

bool SearchTables::fill(const Kernels& by, const ColumnClass& of, uint32_t feedback,
                        uint32_t input) {
  return fill(by, by.most, of, feedback, input, 0);
}

bool SearchTables::fill(const Kernels& by, const Tables& of) {
  const std::unique_ptr<ColumnClass> found(new (std::nothrow) ColumnClass());
  if (!found) return false;
  for (uint32_t q = 0; q < 2; ++q) {
    uint32_t begin = 0;
    for (uint32_t next = 0; begin < kSlots; begin += next) {
      const uint32_t entry = of.slots[q * kSlots + begin];
      const uint32_t symbol = entry >> 24;
      next = entry & (kSlots - 1);
      if (!next || next > kSlots - begin ||
          (begin && symbol <= of.slots[q * kSlots + begin - 1] >> 24))
        return false;
      for (uint32_t k = 0; k < next; ++k) {
        if (of.slots[q * kSlots + begin + k] != slot_entry(next, k, symbol)) return false;
      }
      found->frequency[q][symbol] = static_cast<uint16_t>(next);
      found->values[q][symbol] = of.values[q * kSymbols + symbol];
    }
  }
  return fill(by, by.most_by_rows, *found, of.feedback, of.input, of.unit);
}

}  // namespace ectcq
