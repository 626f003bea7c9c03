#include "search_tables.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

namespace ectcq {

bool SearchTables::fill(const ColumnClass& of, uint32_t feedback, uint32_t input) {
  if (feedback > UINT16_MAX || input > UINT16_MAX) return false;
  uint32_t begin[2], most = 0;
  for (int q = 0; q < 2; ++q) {
    uint32_t first = 0, last = kSymbols;
    while (first < kSymbols && !of.frequency[q][first]) ++first;
    while (last > first && !of.frequency[q][last - 1]) --last;
    begin[q] = first & ~1u;  // so that parities stay
    most = std::max(most, last - begin[q]);
  }
  comparisons = kLeast;
  while (comparisons <= kMost && most > 1u << comparisons) ++comparisons;
  if (comparisons > kMost) return false;
  const uint32_t count = 1u << comparisons;
  for (uint32_t q = 0; q < 2; ++q) {
    uint32_t sums[(1 << kMost) + 1] = {};
    for (uint32_t k = 0; k < count; ++k) {
      const uint32_t symbol = begin[q] + k;
      const uint32_t own = symbol < kSymbols ? of.frequency[q][symbol] : 0;
      const uint32_t index = q << comparisons | (~k & (count - 1));
      frequency[index] = static_cast<uint16_t>(own);
      start[index] = static_cast<uint16_t>(sums[k]);
      sums[k + 1] = sums[k] + own;
      uint32_t bits = 0;
      if (own) std::memcpy(&bits, &of.values[q][symbol], 4);
      flips[index] = static_cast<uint16_t>((q ? feedback : 0) ^ (k & 1 ? input : 0));
      low[index] = static_cast<uint16_t>(bits);
      high[index] = static_cast<uint16_t>(bits >> 16);
    }
    for (int j = 0; j < comparisons; ++j) {
      for (uint32_t before = 0; before < 1u << j; ++before) {
        const uint32_t index = q << j | (~before & ((1u << j) - 1));
        threshold[j][index] =
            static_cast<uint16_t>(sums[(2 * before + 1) << (comparisons - 1 - j)]);
      }
    }
  }
  return true;
}

bool SearchTables::fill(const Tables& of) {
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
  return fill(*found, of.feedback, of.input);
}

}  // namespace ectcq
