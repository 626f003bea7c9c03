// Steps of 32 lanes, halves of their states in four registers of words each (NEON, AArch64). Symbols are
// found by a binary search in registers: see search_tables.h. Tables are read by `tbl`, byte by byte.

#include <arm_neon.h>

#include <algorithm>
#include <cstring>

#include "common/native/floats.h"
#include "choose_steps.h"
#include "word_places.h"

namespace ectcq {
namespace {

// Sixteen bytes of a table of 2^kBits.
template <int kBits>
inline uint8x16_t lookup(const uint8_t* table, uint8x16_t index) {
  if constexpr (kBits <= 4) {
    return vqtbl1q_u8(vld1q_u8(table), index);
  } else if constexpr (kBits == 5) {
    return vqtbl2q_u8(vld1q_u8_x2(table), index);
  } else {
    const uint8x16_t found = vqtbl4q_u8(vld1q_u8_x4(table), index);
    if constexpr (kBits == 6) return found;
    // Those beyond the first part are zero in it, and have their place in the second.
    const uint8x16_t beyond = vsubq_u8(index, vdupq_n_u8(64));
    return vqtbx4q_u8(found, vld1q_u8_x4(table + 64), beyond);
  }
}

// Words of sixteen lanes, from their bytes.
struct Words {
  uint16x8_t of[2];
};

inline Words words_of(uint8x16_t low, uint8x16_t high) {
  return {{vreinterpretq_u16_u8(vzip1q_u8(low, high)), vreinterpretq_u16_u8(vzip2q_u8(low, high))}};
}

inline uint8x16_t low_bytes(uint16x8_t first, uint16x8_t second) {
  return vuzp1q_u8(vreinterpretq_u8_u16(first), vreinterpretq_u8_u16(second));
}

// Comparison kFrom and those after it, of the indices of sixteen lanes. `said` is what the last
// comparison said, 0 or all ones.
template <int kFrom, int kComparisons>
inline void search(const SearchTables::Bytes& bytes, const uint16x8_t (&slot)[2], uint8x16_t& index,
                   uint8x16_t& said) {
  if constexpr (kFrom < kComparisons) {
    uint8x16_t low, high;
    if constexpr (kFrom < SearchTables::kShort) {
      const uint8x16_t both = vld1q_u8(bytes.first[kFrom]);
      low = vqtbl1q_u8(both, index);
      high = vqtbl1q_u8(both, vaddq_u8(index, vdupq_n_u8(2 << kFrom)));
    } else {
      const auto& entries = bytes.threshold[kFrom - SearchTables::kShort];
      low = lookup<1 + kFrom>(entries[0], index);
      high = lookup<1 + kFrom>(entries[1], index);
    }
    const Words threshold = words_of(low, high);
    said = low_bytes(vcgtq_u16(threshold.of[0], slot[0]), vcgtq_u16(threshold.of[1], slot[1]));
    index = vsubq_u8(vaddq_u8(index, index), said);
    search<kFrom + 1, kComparisons>(bytes, slot, index, said);
  }
}

// Sixteen values in four registers.
template <int kBits>
inline void values_at(const SearchTables::Bytes& bytes, uint8x16_t index, float32x4_t (&z)[4]) {
  uint8x16_t byte[4];
  for (int k = 0; k < 4; ++k) byte[k] = lookup<kBits>(bytes.value[k], index);
  const Words low = words_of(byte[0], byte[1]), high = words_of(byte[2], byte[3]);
  for (int r = 0; r < 2; ++r) {
    z[2 * r] = vreinterpretq_f32_u16(vzip1q_u16(low.of[r], high.of[r]));
    z[2 * r + 1] = vreinterpretq_f32_u16(vzip2q_u16(low.of[r], high.of[r]));
  }
}

// Of eight lanes, those whose states are below 2^16 each take a word, in their order.
inline void read_words(uint16x8_t& low, uint16x8_t& high, const uint8_t*& words) {
  const uint16x8_t bit = {1, 2, 4, 8, 16, 32, 64, 128};
  const uint16x8_t needs = vceqzq_u16(high);
  const unsigned mask = vaddvq_u16(vandq_u16(needs, bit));
  const uint8x16_t next = vqtbl1q_u8(vld1q_u8(words), vld1q_u8(kWordPlaces.of[mask]));
  high = vorrq_u16(high, vandq_u16(low, needs));
  low = vbslq_u16(needs, vreinterpretq_u16_u8(next), low);
  words += 2 * static_cast<size_t>(__builtin_popcount(mask));
}

constexpr int kParts = kLanes / 8;

// One step of a stream.
template <int kComparisons, bool kRead, Sink kSink>
inline void step(const SearchTables::Bytes& bytes, uint16x8_t (&low)[kParts],
                 uint16x8_t (&high)[kParts], uint8x16_t (&trellis)[2], const uint8_t*& words,
                 const float* x, float* to) {
  constexpr int kBits = 1 + kComparisons;
  const uint16x8_t slot_mask = vdupq_n_u16(kSlots - 1);
  for (int half = 0; half < 2; ++half) {
    uint16x8_t* own_low = low + 2 * half;
    uint16x8_t* own_high = high + 2 * half;
    const uint16x8_t slot[2] = {vandq_u16(own_low[0], slot_mask), vandq_u16(own_low[1], slot_mask)};
    const uint8x16_t q = vandq_u8(trellis[half], vdupq_n_u8(1));
    uint8x16_t index = q, said;
    search<0, kComparisons>(bytes, slot, index, said);
    // The symbol's parity is the contrary of the last comparison.
    const uint8x16_t odd = vceqq_u8(q, vdupq_n_u8(1));
    trellis[half] =
        veorq_u8(veorq_u8(vshrq_n_u8(trellis[half], 1), vandq_u8(odd, vld1q_u8(bytes.feedback))),
                 vbicq_u8(vld1q_u8(bytes.input), said));
    const Words frequency = words_of(lookup<kBits>(bytes.frequency[0], index),
                                     lookup<kBits>(bytes.frequency[1], index));
    const Words start =
        words_of(lookup<kBits>(bytes.start[0], index), lookup<kBits>(bytes.start[1], index));
    for (int r = 0; r < 2; ++r) {
      // frequency · (state / 2^12) = 16 · frequency · high + frequency · (low / 2^12)
      const uint16x8_t rest =
          vmlaq_u16(vsubq_u16(slot[r], start.of[r]), vshrq_n_u16(frequency.of[r], 4),
                    vshrq_n_u16(own_low[r], kProbabilityBits));
      const uint32x4_t a = vaddw_u16(
          vmull_u16(vget_low_u16(frequency.of[r]), vget_low_u16(own_high[r])), vget_low_u16(rest));
      const uint32x4_t b = vaddw_high_u16(vmull_high_u16(frequency.of[r], own_high[r]), rest);
      own_low[r] = vuzp1q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
      own_high[r] = vuzp2q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
      if constexpr (kRead) read_words(own_low[r], own_high[r], words);
    }
    if constexpr (kSink == Sink::kIndices) {
      vst1q_u8(reinterpret_cast<uint8_t*>(to) + 16 * half, index);
    } else {
      float32x4_t z[4];
      values_at<kBits>(bytes, index, z);
      for (int k = 0; k < 4; ++k) {
        if constexpr (kSink == Sink::kSums || kSink == Sink::kRowSums) {
          vst1q_f32(to + 4 * k,
                    vfmaq_f32(vld1q_f32(to + 4 * k), z[k], vld1q_f32(x + 16 * half + 4 * k)));
        } else {
          vst1q_f32(to + 16 * half + 4 * k, z[k]);
        }
      }
    }
  }
}

template <int kComparisons, int kStreams, bool kRead, Sink kSink>
size_t steps(const SearchTables& tables, Stream* const* streams, size_t count,
             const Activations& activations, float* const* out) {
  constexpr bool kRows = kSink == Sink::kRowSums;
  const float* x = activations.x;
  size_t row_step = activations.step;
  float* to[kStreams];
  uint16x8_t low[kStreams][kParts], high[kStreams][kParts];
  uint8x16_t trellis[kStreams][2];
  const uint8_t* words[kStreams];
  for (int s = 0; s < kStreams; ++s) {
    const uint16_t* own = streams[s]->trellis;
    for (int r = 0; r < kParts; ++r) {
      low[s][r] = vld1q_u16(streams[s]->low + 8 * r);
      high[s][r] = vld1q_u16(streams[s]->high + 8 * r);
    }
    for (int h = 0; h < 2; ++h) {
      trellis[s][h] = low_bytes(vld1q_u16(own + 16 * h), vld1q_u16(own + 16 * h + 8));
    }
    words[s] = streams[s]->words;
    to[s] = out[s];
  }
  size_t done = 0;
  while (done < count) {
    size_t sure = count - done;
    if constexpr (kRead) {
      for (int s = 0; s < kStreams; ++s) {
        const size_t whole = static_cast<size_t>(streams[s]->end - words[s]) / (2 * kLanes);
        sure = whole < sure ? whole : sure;
      }
      if (!sure) break;
    }
    if constexpr (kRows) sure = std::min(sure, activations.row_steps - row_step);
    for (size_t t = 0; t < sure; ++t) {
      for (int s = 0; s < kStreams; ++s) {
        step<kComparisons, kRead, kSink>(tables.bytes, low[s], high[s], trellis[s], words[s],
                                         kRows ? x + (row_step + t) * kLanes : x, to[s]);
        if constexpr (!kRows) to[s] += width_of(kSink);
      }
    }
    done += sure;
    if constexpr (kRows) {
      row_step += sure;
      if (row_step == activations.row_steps) {
        for (int s = 0; s < kStreams; ++s) to[s] += kSums;
        row_step = 0;
      }
    }
  }
  for (int s = 0; s < kStreams; ++s) {
    for (int r = 0; r < kParts; ++r) {
      vst1q_u16(streams[s]->low + 8 * r, low[s][r]);
      vst1q_u16(streams[s]->high + 8 * r, high[s][r]);
    }
    for (int h = 0; h < 2; ++h) {
      vst1q_u16(streams[s]->trellis + 16 * h, vmovl_u8(vget_low_u8(trellis[s][h])));
      vst1q_u16(streams[s]->trellis + 16 * h + 8, vmovl_high_u8(trellis[s][h]));
    }
    streams[s]->words = words[s];
  }
  return done;
}

struct Level {
  static constexpr int kMostStreams = 2, kLeast = 3, kMost = 6;
  template <int kComparisons, int kStreams, bool kRead, Sink kSink>
  static size_t steps(const SearchTables& tables, Stream* const* streams, size_t count,
                      const Activations& x, float* const* out) {
    return ectcq::steps<kComparisons, kStreams, kRead, kSink>(tables, streams, count, x, out);
  }
};

void accumulate(const float* z, size_t steps, const float* x, float* sums) {
  for (size_t t = 0; t < steps; ++t, z += kLanes, sums += 16) {
    for (int l = 0; l < 16; l += 4) {
      const float32x4_t sum = vfmaq_f32(vld1q_f32(sums + l), vld1q_f32(z + l), vld1q_f32(x + l));
      vst1q_f32(sums + l, vfmaq_f32(sum, vld1q_f32(z + 16 + l), vld1q_f32(x + 16 + l)));
    }
  }
}

void scale_row(const float* z, size_t count, float row, const float* columns, size_t column_stride,
               const float* zero, int type, bool, void* out) {
  constexpr size_t kPart = 64;
  float part[kPart];
  for (size_t j = 0; j < count; j += kPart) {
    const size_t n = count - j < kPart ? count - j : kPart;
    float* to = type == kFloat32 ? static_cast<float*>(out) + j : part;
    for (size_t k = 0; k < n; ++k) to[k] = z[j + k] * row * columns[(j + k) * column_stride];
    if (zero) {
      for (size_t k = 0; k < n; ++k) to[k] += *zero;
    }
    if (type != kFloat32) narrow(kNeon, part, n, type, static_cast<uint16_t*>(out) + j);
  }
}

float dot(const float* a, const float* b, size_t count) {
  float32x4_t sums[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
  size_t i = 0;
  for (; i + 16 <= count; i += 16) {
    for (size_t k = 0; k < 4; ++k) {
      sums[k] = vfmaq_f32(sums[k], vld1q_f32(a + i + 4 * k), vld1q_f32(b + i + 4 * k));
    }
  }
  float sum = vaddvq_f32(vaddq_f32(vaddq_f32(sums[0], sums[1]), vaddq_f32(sums[2], sums[3])));
  for (; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

void add_products(const float* z, size_t rows, const float* x, float* y) {
  for (size_t r = 0; r < rows; ++r, z += kLanes) y[r] += dot(z, x, kLanes);
}

}  // namespace

// Two streams, as four have more state than 32 registers hold. Not timed on a processor so far.
const Kernels kNeonKernels = {2,          3,
                              6,          6,
                              true,       ChooseSteps<Level>::steps,
                              accumulate, scale_row,
                              dot,        add_products,
                              nullptr,    nullptr};

}  // namespace ectcq
