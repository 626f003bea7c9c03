#include "table.h"

#include <cmath>

namespace lossless {

Frequencies frequencies_of(const uint64_t* counts) {
  Frequencies result{};
  uint32_t (&f)[kSymbols] = result.of;
  uint64_t total = 0;
  for (int s = 0; s < kSymbols; ++s) total += counts[s];
  int32_t left = kSlots;
  int most = 0;
  for (int s = 0; s < kSymbols; ++s) {
    if (!counts[s]) continue;
    if (counts[s] > counts[most] || !counts[most]) most = s;
    const double share = static_cast<double>(counts[s]) / static_cast<double>(total) * kSlots;
    f[s] = share < 1 ? 1 : static_cast<uint32_t>(share + 0.5);
    left -= static_cast<int32_t>(f[s]);
  }
  // What rounding left over goes where it saves the most bits, or costs the fewest: a step of
  // frequency f is worth count · log2((f ± 1) / f), about count / f.
  for (; left != 0; left += left < 0 ? 1 : -1) {
    int best = -1;
    double value = 0;
    for (int s = 0; s < kSymbols; ++s) {
      if (!f[s] || (left < 0 && f[s] == 1)) continue;
      const double here = static_cast<double>(counts[s]) / (f[s] - (left < 0 ? 0.5 : -0.5));
      if (best < 0 || (left < 0 ? here < value : here > value)) best = s, value = here;
    }
    f[best] += left < 0 ? -1u : 1u;
  }
  if (f[most] == kSlots) {
    f[most] -= 1;
    f[most ^ 1] = 1;  // never used
  }
  return result;
}

double coded_bits(const Frequencies& frequencies, const uint64_t* counts) {
  double bits = 0;
  for (int s = 0; s < kSymbols; ++s) {
    if (counts[s]) {
      bits += static_cast<double>(counts[s]) * (kProbabilityBits - std::log2(frequencies.of[s]));
    }
  }
  return bits;
}

size_t write_table(const Frequencies& frequencies, uint8_t* out) {
  int last = kSymbols - 1;
  while (!frequencies.of[last]) --last;
  uint8_t* p = out;
  *p++ = static_cast<uint8_t>(last);
  for (int s = 0; s <= last; ++s) {
    const uint32_t f = frequencies.of[s];
    if (f == 0) {
      int more = 0;
      while (!frequencies.of[s + 1]) ++s, ++more;
      *p++ = 0;
      *p++ = static_cast<uint8_t>(more);
    } else if (f < 128) {
      *p++ = static_cast<uint8_t>(f);
    } else {
      *p++ = static_cast<uint8_t>(128 | f >> 8);
      *p++ = static_cast<uint8_t>(f);
    }
  }
  return static_cast<size_t>(p - out);
}

int read_table(const uint8_t** p, const uint8_t* end, Frequencies* frequencies) {
  *frequencies = {};
  const auto next = [&]() -> int { return *p < end ? *(*p)++ : -1; };
  const int last = next();
  uint32_t total = 0;
  for (int s = 0; s <= last; ++s) {
    const int first = next();
    if (first < 0) return kBadHeader;
    if (first > 0 && first < 128) {
      frequencies->of[s] = static_cast<uint32_t>(first);
    } else {
      const int second = next();
      if (second < 0 || first > 128 + 15) return kBadHeader;
      if (first == 0) {
        s += second;
      } else {
        frequencies->of[s] = static_cast<uint32_t>((first & 15) << 8 | second);
      }
    }
    if (s <= last) total += frequencies->of[s];
  }
  return total == kSlots ? kOk : kBadHeader;
}

void fill_slots(const Frequencies& frequencies, uint32_t* slots) {
  for (uint32_t s = 0; s < kSymbols; ++s) {
    const uint32_t f = frequencies.of[s];
    for (uint32_t k = 0; k < f; ++k) *slots++ = slot_entry(f, k, s);
  }
}

}  // namespace lossless
