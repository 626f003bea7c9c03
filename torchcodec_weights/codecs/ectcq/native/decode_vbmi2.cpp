// Steps of 32 lanes, halves of their states in two registers (AVX-512 BW, VL, VBMI2). Symbols are found
// by a binary search in registers: see search_tables.h.

#include <immintrin.h>

#include <algorithm>

#include "common/native/floats.h"
#include "choose_steps.h"

namespace ectcq {

namespace {

// 2^kBits values by index, in registers of 32.
template <int kBits>
struct Lookup {
  static constexpr int kRegisters = kBits <= 5 ? 1 : 1 << (kBits - 5);
  __m512i part[kRegisters];

  explicit Lookup(const uint16_t* table) {
    for (int k = 0; k < kRegisters; ++k) part[k] = _mm512_load_si512(table + 32 * k);
  }

  __m512i operator()(__m512i index) const {
    if constexpr (kRegisters == 1) return _mm512_permutexvar_epi16(index, part[0]);
    if constexpr (kRegisters == 2) return _mm512_permutex2var_epi16(part[0], index, part[1]);
    if constexpr (kRegisters == 4) {
      const __mmask32 highest = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
      return _mm512_mask_mov_epi16(_mm512_permutex2var_epi16(part[0], index, part[1]), highest,
                                   _mm512_permutex2var_epi16(part[2], index, part[3]));
    }
  }
};

// The 32 values at indices, in the order in which unpacking leaves their halves.
template <int kBits>
inline void values_at(const Lookup<kBits>& low, const Lookup<kBits>& high, __m512i index,
                      __m512 (&z)[2]) {
  const __m512i a = low(index), b = high(index);
  z[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b));
  z[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
}

// Multiples of 2^16 times a scale, in the same order.
inline void values_of(__m512i multiple, __m512 scale, __m512 (&z)[2]) {
  const __m512i zero = _mm512_setzero_si512();
  z[0] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_unpacklo_epi16(zero, multiple)), scale);
  z[1] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_unpackhi_epi16(zero, multiple)), scale);
}

// Words by index of larger tables, for all streams: a register is loaded once for them.
template <int kBits, int kStreams>
[[gnu::always_inline]] inline void look_up(const uint16_t* words, const __m512i (&index)[kStreams],
                                           __m512i (&found)[kStreams]) {
  if constexpr (kBits <= 6) {
    const Lookup<kBits> few(words);
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) found[s] = few(index[s]);
  } else {
    look_up<kBits - 1>(words, index, found);
    __m512i others[kStreams];
    look_up<kBits - 1>(words + (1 << (kBits - 1)), index, others);
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      const __mmask32 other = _mm512_test_epi16_mask(index[s], _mm512_set1_epi16(1 << (kBits - 1)));
      found[s] = _mm512_mask_mov_epi16(found[s], other, others[s]);
    }
  }
}

// Where unpacking takes lanes from, so that it leaves them in their order.
inline __m512i unpacked_order() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }

// Advance the indices of all streams by comparison `kFrom` and those after it. Differences' signs are
// shifted in: going through masks takes twice as long, and a step waits for each.
template <int kFrom, int kComparisons, int kStreams>
inline void search(const SearchTables& tables, const __m512i (&slot)[kStreams],
                   __m512i (&index)[kStreams]) {
  if constexpr (kFrom < kComparisons) {
    const Lookup<1 + kFrom> threshold(tables.thresholds + tables.threshold(kFrom));
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      const __m512i difference = _mm512_sub_epi16(slot[s], threshold(index[s]));
      index[s] = _mm512_shldi_epi16(index[s], difference, 1);
    }
    search<kFrom + 1, kComparisons>(tables, slot, index);
  }
}

// The same, with what lies between a slot and the nearest thresholds: `above` that before it, and
// `below` that after it, a negative number. Unsigned, negative numbers are the largest.
template <int kFrom, int kComparisons, int kStreams>
[[gnu::always_inline]] inline void search_between(const SearchTables& tables,
                                                  const __m512i (&slot)[kStreams],
                                                  __m512i (&index)[kStreams],
                                                  __m512i (&above)[kStreams],
                                                  __m512i (&below)[kStreams]) {
  if constexpr (kFrom < kComparisons) {
    __m512i threshold[kStreams];
    look_up<1 + kFrom>(tables.thresholds + tables.threshold(kFrom), index, threshold);
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      const __m512i difference = _mm512_sub_epi16(slot[s], threshold[s]);
      above[s] = _mm512_min_epu16(above[s], difference);
      below[s] = _mm512_max_epu16(below[s], difference);
      index[s] = _mm512_shldi_epi16(index[s], difference, 1);
    }
    search_between<kFrom + 1, kComparisons>(tables, slot, index, above, below);
  }
}

template <int kComparisons, int kStreams, bool kRead, Sink kSink>
size_t steps(const SearchTables& tables, Stream* const* streams, size_t count,
             const Activations& activations, float* const* out) {
  constexpr bool kMany = kComparisons > SearchTables::kFew;
  constexpr int kBits = 1 + (kMany ? SearchTables::kFew : kComparisons);
  const Lookup<kBits> frequencies(tables.frequency), starts(tables.start);
  const Lookup<kBits> low_values(tables.low), high_values(tables.high);
  const Lookup<kMany ? 1 : kBits> flips(kMany ? tables.flips_of_many : tables.flips);
  const __m512 scale = _mm512_set1_ps(tables.scale);
  const __m512i one = _mm512_set1_epi16(1);
  const __m512i slot_mask = _mm512_set1_epi16(kSlots - 1);
  const __m512i order = unpacked_order();
  constexpr bool kRows = kSink == Sink::kRowSums;
  const float* x = activations.x;
  size_t row_step = activations.step;
  __m512 x0 = _mm512_setzero_ps(), x1 = x0, sums[kStreams];
  // In the order in which unpacking leaves lanes.
  const auto load_activations = [&x0, &x1](const float* from) {
    const __m512 a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + 16);
    x0 = _mm512_shuffle_f32x4(a, b, 0x88);
    x1 = _mm512_shuffle_f32x4(a, b, 0xDD);
  };
  if constexpr (kSink == Sink::kSums) load_activations(x);
  __m512i low[kStreams], high[kStreams], trellis[kStreams];
  const uint8_t* words[kStreams];
  float* to[kStreams];
  for (int s = 0; s < kStreams; ++s) {
    low[s] = _mm512_load_si512(streams[s]->low);
    high[s] = _mm512_load_si512(streams[s]->high);
    trellis[s] = _mm512_load_si512(streams[s]->trellis);
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
    if constexpr (kRows) {
      sure = std::min(sure, activations.row_steps - row_step);
      for (int s = 0; s < kStreams; ++s) sums[s] = _mm512_loadu_ps(to[s]);
    }
    for (size_t t = 0; t < sure; ++t) {
      if constexpr (kRows) load_activations(x + (row_step + t) * kLanes);
      // One stage after the other for all streams, as their order here is nearly that in which
      // instructions reach the processor's queues, which do not hold a whole step of four.
      __m512i slot[kStreams], indices[kStreams];
      [[maybe_unused]] __m512i above[kStreams], below[kStreams], multiples[kStreams];
#pragma GCC unroll 4
      for (int s = 0; s < kStreams; ++s) {
        slot[s] = _mm512_and_si512(low[s], slot_mask);
        indices[s] = _mm512_and_si512(trellis[s], one);
        above[s] = slot[s];
        below[s] = _mm512_sub_epi16(slot[s], _mm512_set1_epi16(kSlots));
      }
      if constexpr (kMany) {
        search_between<0, kComparisons>(tables, slot, indices, above, below);
        look_up<1 + kComparisons>(tables.multiple, indices, multiples);
      } else {
        search<0, kComparisons>(tables, slot, indices);
      }
#pragma GCC unroll 4
      for (int s = 0; s < kStreams; ++s) {
        __m512i index = indices[s], frequency, offset;
        if constexpr (kMany) {
          const __m512i odd = _mm512_and_si512(trellis[s], one);
          index = _mm512_or_si512(_mm512_add_epi16(odd, odd), _mm512_and_si512(index, one));
          frequency = _mm512_sub_epi16(above[s], below[s]);
          offset = above[s];
        } else {
          frequency = frequencies(index);
          offset = _mm512_sub_epi16(slot[s], starts(index));
        }
        trellis[s] = _mm512_xor_si512(_mm512_srli_epi16(trellis[s], 1), flips(index));
        // state / 2^12 has 20 bits: 16 and 4.
        const __m512i ratio = _mm512_shldi_epi16(high[s], low[s], 4);
        const __m512i highest = _mm512_srli_epi16(high[s], 12);
        const __m512i product = _mm512_mullo_epi16(frequency, ratio);
        low[s] = _mm512_add_epi16(product, offset);
        // Its highest bit is the sum's carry.
        const __m512i carry = _mm512_ternarylogic_epi32(product, offset, low[s], 0xD4);
        high[s] = _mm512_add_epi16(_mm512_mulhi_epu16(frequency, ratio),
                                   _mm512_mullo_epi16(frequency, highest));
        high[s] = _mm512_add_epi16(high[s], _mm512_srli_epi16(carry, 15));
        if constexpr (kRead) {
          const __mmask32 needs = _mm512_testn_epi16_mask(high[s], high[s]);
          high[s] = _mm512_mask_mov_epi16(high[s], needs, low[s]);
          low[s] = _mm512_mask_expand_epi16(low[s], needs, _mm512_loadu_si512(words[s]));
          words[s] += 2 * static_cast<unsigned>(__builtin_popcount(needs));
        }
        if constexpr (kSink == Sink::kIndices) {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to[s]), _mm512_cvtepi16_epi8(index));
        } else {
          __m512i& found = kMany ? multiples[s] : index;
          if constexpr (kSink == Sink::kValues) found = _mm512_permutexvar_epi64(order, found);
          __m512 z[2];
          if constexpr (kMany) {
            values_of(found, scale, z);
          } else {
            values_at(low_values, high_values, found, z);
          }
          if constexpr (kRows) {
            sums[s] = _mm512_fmadd_ps(z[1], x1, _mm512_fmadd_ps(z[0], x0, sums[s]));
          } else if constexpr (kSink == Sink::kSums) {
            const __m512 sum = _mm512_fmadd_ps(z[0], x0, _mm512_loadu_ps(to[s]));
            _mm512_storeu_ps(to[s], _mm512_fmadd_ps(z[1], x1, sum));
          } else {
            _mm512_storeu_ps(to[s], z[0]);
            _mm512_storeu_ps(to[s] + 16, z[1]);
          }
        }
        if constexpr (!kRows) to[s] += width_of(kSink);
      }
    }
    done += sure;
    if constexpr (kRows) {
      row_step += sure;
      const bool whole = row_step == activations.row_steps;
      for (int s = 0; s < kStreams; ++s) {
        _mm512_storeu_ps(to[s], sums[s]);
        if (whole) to[s] += kSums;
      }
      if (whole) row_step = 0;
    }
  }
  for (int s = 0; s < kStreams; ++s) {
    _mm512_store_si512(streams[s]->low, low[s]);
    _mm512_store_si512(streams[s]->high, high[s]);
    _mm512_store_si512(streams[s]->trellis, trellis[s]);
    streams[s]->words = words[s];
  }
  return done;
}

struct Level {
  static constexpr int kMostStreams = 4, kLeast = 4, kMost = 8;
  template <int kComparisons, int kStreams, bool kRead, Sink kSink>
  static size_t steps(const SearchTables& tables, Stream* const* streams, size_t count,
                      const Activations& x, float* const* out) {
    return ectcq::steps<kComparisons, kStreams, kRead, kSink>(tables, streams, count, x, out);
  }
};

inline void transpose(__m512 (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  const auto pairs = [](__m512 a, __m512 b, bool second) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_castpd_ps(second ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
  };
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = pairs(t[i], t[i + 2], false);
    r[i + 1] = pairs(t[i], t[i + 2], true);
    r[i + 2] = pairs(t[i + 1], t[i + 3], false);
    r[i + 3] = pairs(t[i + 1], t[i + 3], true);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xDD);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xDD);
  }
}

template <int kBits>
void expand(const SearchTables& tables, const uint8_t* indices, const float* row,
            const float* columns, const float* zero, float* out) {
  const Lookup<kBits> low(tables.low), high(tables.high);
  const __m512i order = unpacked_order();
  const __m512 column[2] = {_mm512_loadu_ps(columns), _mm512_loadu_ps(columns + 16)};
  alignas(64) float scaled[kStripRows][kLanes];
  for (size_t r = 0; r < kStripRows; ++r) {
    const __m512i index = _mm512_cvtepu8_epi16(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices + r * kLanes)));
    __m512 z[2];
    values_at(low, high, _mm512_permutexvar_epi64(order, index), z);
    for (int k = 0; k < 2; ++k) {
      z[k] = _mm512_mul_ps(_mm512_mul_ps(z[k], _mm512_set1_ps(row[r])), column[k]);
      if (zero) z[k] = _mm512_add_ps(z[k], _mm512_set1_ps(zero[r]));
      _mm512_store_ps(scaled[r] + 16 * k, z[k]);
    }
  }
  for (size_t k = 0; k < 2; ++k) {
    __m512 block[16];
#pragma GCC unroll 16
    for (size_t r = 0; r < 16; ++r) block[r] = _mm512_load_ps(scaled[r] + 16 * k);
    transpose(block);
#pragma GCC unroll 16
    for (size_t l = 0; l < 16; ++l) {
      _mm512_storeu_ps(out + (16 * k + l) * kStripRows, block[l]);
    }
  }
}

// Values whose upper halves are those rounded to bfloat16. Weights are finite, so NaN needs no care. The
// chip's own instruction flushes subnormals.
inline __m512i rounded_above(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
}

// Rounded to kFloat16 or kBfloat16.
template <int kType>
inline __m256i rounded(__m512 value) {
  if constexpr (kType == kFloat16) {
    return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
  } else {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_above(value), 16));
  }
}

// 32 values; with kPast to memory past the caches, at a multiple of 64.
template <int kType, bool kPast>
inline void put_rounded(__m512 first, __m512 second, uint8_t* out) {
  const auto put = [](__m512i bits, uint8_t* to) {
    if constexpr (kPast) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits);
    } else {
      _mm512_storeu_si512(to, bits);
    }
  };
  if constexpr (kType == kFloat32) {
    put(_mm512_castps_si512(first), out);
    put(_mm512_castps_si512(second), out + 64);
  } else if constexpr (kType == kFloat16) {
    const __m512i both = _mm512_castsi256_si512(rounded<kType>(first));
    put(_mm512_inserti64x4(both, rounded<kType>(second), 1), out);
  } else {
    alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                        23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                        45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    put(_mm512_permutex2var_epi16(rounded_above(first), _mm512_load_si512(kUpper),
                                  rounded_above(second)),
        out);
  }
}

template <int kType>
inline void put_rounded(__m512 value, __mmask16 there, uint8_t* out) {
  if constexpr (kType == kFloat32) {
    _mm512_mask_storeu_ps(out, there, value);
  } else {
    _mm256_mask_storeu_epi16(out, there, rounded<kType>(value));
  }
}

template <int kType, bool kPast>
void scale_row(const float* z, size_t count, float row, const float* columns, size_t column_stride,
               const float* zero, uint8_t* out) {
  const __m512 factor = _mm512_set1_ps(row), offset = _mm512_set1_ps(zero ? *zero : 0.0f);
  const auto scaled = [&](size_t j, __mmask16 there) {
    const __m512 column =
        column_stride ? _mm512_maskz_loadu_ps(there, columns + j) : _mm512_set1_ps(*columns);
    const __m512 value =
        _mm512_mul_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(there, z + j), factor), column);
    return zero ? _mm512_add_ps(value, offset) : value;
  };
  constexpr __mmask16 kAll = 0xFFFF;
  size_t j = 0;
  for (; j + 32 <= count; j += 32) {
    put_rounded<kType, kPast>(scaled(j, kAll), scaled(j + 16, kAll), out + j * item_size(kType));
  }
  for (; j < count; j += 16) {
    const __mmask16 there =
        count - j >= 16 ? kAll : static_cast<__mmask16>((1u << (count - j)) - 1);
    put_rounded<kType>(scaled(j, there), there, out + j * item_size(kType));
  }
}

template <int kType>
void assemble(const float* strip, const uint32_t* places, size_t cols, size_t rows, uint8_t* out) {
  size_t j = 0;
  if constexpr (kType != kFloat32) {
    // Whole cache lines: the rows' lines may all be in one set, which does not keep sixteen halves.
    for (; rows == kStripRows && j + 32 <= cols; j += 32) {
      __m512 first[16], second[16];
      for (size_t k = 0; k < 16; ++k) first[k] = _mm512_loadu_ps(strip + places[j + k]);
      transpose(first);
      for (size_t k = 0; k < 16; ++k) second[k] = _mm512_loadu_ps(strip + places[j + 16 + k]);
      transpose(second);
      for (size_t r = 0; r < 16; ++r) {
        put_rounded<kType, false>(first[r], second[r], out + (r * cols + j) * item_size(kType));
      }
    }
  }
  for (; j < cols; j += 16) {
    const size_t width = cols - j < 16 ? cols - j : 16;
    const __mmask16 there = static_cast<__mmask16>((1u << width) - 1);
    __m512 block[16];
    if (width == 16) {
#pragma GCC unroll 16
      for (size_t k = 0; k < 16; ++k) block[k] = _mm512_loadu_ps(strip + places[j + k]);
    } else {
      for (size_t k = 0; k < 16; ++k) {
        block[k] = _mm512_loadu_ps(strip + places[j + (k < width ? k : 0)]);
      }
    }
    transpose(block);
    uint8_t* to = out + j * item_size(kType);
    if (rows == 16) {
#pragma GCC unroll 16
      for (size_t r = 0; r < 16; ++r) {
        put_rounded<kType>(block[r], there, to + r * cols * item_size(kType));
      }
    } else {
      for (size_t r = 0; r < rows; ++r) {
        put_rounded<kType>(block[r], there, to + r * cols * item_size(kType));
      }
    }
  }
}

void expand_any(const SearchTables& tables, const uint8_t* indices, const float* row,
                const float* columns, const float* zero, float* out) {
  const auto by = tables.comparisons == 4   ? expand<5>
                  : tables.comparisons == 5 ? expand<6>
                                            : expand<7>;
  by(tables, indices, row, columns, zero, out);
}

void assemble_to(const float* strip, const uint32_t* places, size_t cols, size_t rows, int type,
                 void* out) {
  const auto by = type == kFloat32   ? assemble<kFloat32>
                  : type == kFloat16 ? assemble<kFloat16>
                                     : assemble<kBfloat16>;
  by(strip, places, cols, rows, static_cast<uint8_t*>(out));
}

void accumulate(const float* z, size_t steps, const float* x, float* sums) {
  const __m512 x0 = _mm512_loadu_ps(x), x1 = _mm512_loadu_ps(x + 16);
  for (size_t t = 0; t < steps; ++t, z += kLanes, sums += 16) {
    const __m512 sum = _mm512_fmadd_ps(_mm512_loadu_ps(z), x0, _mm512_loadu_ps(sums));
    _mm512_storeu_ps(sums, _mm512_fmadd_ps(_mm512_loadu_ps(z + 16), x1, sum));
  }
}

template <bool kPast>
void scale_row_by(const float* z, size_t count, float row, const float* columns,
                  size_t column_stride, const float* zero, int type, uint8_t* out) {
  const auto by = type == kFloat32   ? scale_row<kFloat32, kPast>
                  : type == kFloat16 ? scale_row<kFloat16, kPast>
                                     : scale_row<kBfloat16, kPast>;
  by(z, count, row, columns, column_stride, zero, out);
}

void scale_row_to(const float* z, size_t count, float row, const float* columns,
                  size_t column_stride, const float* zero, int type, bool past, void* out) {
  const auto by =
      past && reinterpret_cast<uintptr_t>(out) % 64 == 0 ? scale_row_by<true> : scale_row_by<false>;
  by(z, count, row, columns, column_stride, zero, type, static_cast<uint8_t*>(out));
}

float dot(const float* a, const float* b, size_t count) {
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                    _mm512_setzero_ps()};
  size_t i = 0;
  for (; i + 64 <= count; i += 64) {
#pragma GCC unroll 4
    for (size_t k = 0; k < 4; ++k) {
      sums[k] = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16 * k), _mm512_loadu_ps(b + i + 16 * k),
                                sums[k]);
    }
  }
  for (; i < count; i += 16) {
    const __mmask16 there =
        count - i >= 16 ? __mmask16(0xFFFF) : static_cast<__mmask16>((1u << (count - i)) - 1);
    sums[0] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(there, a + i),
                              _mm512_maskz_loadu_ps(there, b + i), sums[0]);
  }
  return _mm512_reduce_add_ps(
      _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

}  // namespace

const Kernels kVbmi2Kernels = {4,          4,
                               6,          8,
                               false,      ChooseSteps<Level>::steps,
                               accumulate, scale_row_to,
                               dot,        add_products_avx2,
                               expand_any, assemble_to};

}  // namespace ectcq
