// Steps of 32 lanes, halves of their states in two registers (AVX-512 BW, VL, VBMI2). Symbols are found
// by a binary search in registers: see search_tables.h.

#include <immintrin.h>

#include "common/native/floats.h"
#include "search_tables.h"

namespace ectcq {

namespace {

// 2^kBits values by index, in registers of 32. The highest bit of an index of seven bits is
// `highest` too.
template <int kBits>
struct Lookup {
  static constexpr int kRegisters = kBits <= 5 ? 1 : 1 << (kBits - 5);
  __m512i part[kRegisters];

  explicit Lookup(const uint16_t* table) {
    for (int k = 0; k < kRegisters; ++k) part[k] = _mm512_load_si512(table + 32 * k);
  }

  __m512i operator()(__m512i index, __mmask32 highest) const {
    if constexpr (kRegisters == 1) return _mm512_permutexvar_epi16(index, part[0]);
    if constexpr (kRegisters == 2) return _mm512_permutex2var_epi16(part[0], index, part[1]);
    if constexpr (kRegisters == 4) {
      return _mm512_mask_mov_epi16(_mm512_permutex2var_epi16(part[0], index, part[1]), highest,
                                   _mm512_permutex2var_epi16(part[2], index, part[3]));
    }
  }
};

// Comparisons from number `kFrom` on.
template <int kFrom, int kComparisons>
inline void search(const SearchTables& tables, __m512i slot, __m512i* index, __mmask32* last) {
  if constexpr (kFrom < kComparisons) {
    const Lookup<1 + kFrom> threshold(tables.threshold[kFrom]);
    *last = _mm512_cmpge_epu16_mask(slot, threshold(*index, 0));
    *index = _mm512_mask_add_epi16(*index, *last, *index, _mm512_set1_epi16(2 << kFrom));
    search<kFrom + 1, kComparisons>(tables, slot, index, last);
  }
}

template <int kComparisons, int kStreams, bool kRead, bool kProduct>
size_t steps(const SearchTables& tables, Stream* const* streams, size_t count, const float* x,
             float* const* out) {
  constexpr int kBits = 1 + kComparisons;
  constexpr size_t kWidth = kProduct ? 16 : 32;
  const Lookup<kBits> frequencies(tables.frequency), starts(tables.start);
  const Lookup<kBits> low_values(tables.low), high_values(tables.high);
  const __m512i first_even = _mm512_set1_epi16(static_cast<short>(tables.threshold[0][0]));
  const __m512i first_odd = _mm512_set1_epi16(static_cast<short>(tables.threshold[0][1]));
  const __m512i one = _mm512_set1_epi16(1);
  const __m512i slot_mask = _mm512_set1_epi16(kSlots - 1);
  const __m512i feedback = _mm512_set1_epi16(static_cast<short>(tables.feedback));
  const __m512i input = _mm512_set1_epi16(static_cast<short>(tables.input));
  // Where the unpacking of halves takes lanes from.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  __m512 x0 = _mm512_setzero_ps(), x1 = x0;
  if constexpr (kProduct) {
    const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
    x0 = _mm512_shuffle_f32x4(a, b, 0x88);
    x1 = _mm512_shuffle_f32x4(a, b, 0xDD);
  }
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
    for (size_t t = done; t < done + sure; ++t) {
#pragma GCC unroll 4
      for (int s = 0; s < kStreams; ++s) {
        const __mmask32 odd = _mm512_test_epi16_mask(trellis[s], one);
        const __m512i slot = _mm512_and_si512(low[s], slot_mask);
        __mmask32 last =
            _mm512_cmpge_epu16_mask(slot, _mm512_mask_mov_epi16(first_even, odd, first_odd));
        __m512i index = _mm512_and_si512(trellis[s], one);
        index = _mm512_mask_add_epi16(index, last, index, _mm512_set1_epi16(2));
        search<1, kComparisons>(tables, slot, &index, &last);
        const __m512i frequency = frequencies(index, last);
        const __m512i offset = _mm512_sub_epi16(slot, starts(index, last));
        // state / 2^12 has 20 bits: 16 and 4.
        const __m512i ratio = _mm512_shldi_epi16(high[s], low[s], 4);
        const __m512i above = _mm512_srli_epi16(high[s], 12);
        low[s] = _mm512_add_epi16(_mm512_mullo_epi16(frequency, ratio), offset);
        const __mmask32 carry = _mm512_cmplt_epu16_mask(low[s], offset);
        high[s] = _mm512_add_epi16(_mm512_mulhi_epu16(frequency, ratio),
                                   _mm512_mullo_epi16(frequency, above));
        high[s] = _mm512_mask_add_epi16(high[s], carry, high[s], one);
        if constexpr (kRead) {
          const __mmask32 needs = _mm512_testn_epi16_mask(high[s], high[s]);
          high[s] = _mm512_mask_mov_epi16(high[s], needs, low[s]);
          low[s] = _mm512_mask_expand_epi16(low[s], needs, _mm512_loadu_si512(words[s]));
          words[s] += 2 * static_cast<unsigned>(__builtin_popcount(needs));
        }
        trellis[s] = _mm512_srli_epi16(trellis[s], 1);
        // There is no masked exclusive or of 16 bits. One instruction takes both of these.
        trellis[s] = _mm512_ternarylogic_epi32(trellis[s], _mm512_maskz_mov_epi16(odd, feedback),
                                               _mm512_maskz_mov_epi16(last, input), 0x96);
        if constexpr (!kProduct) {
          index = _mm512_permutexvar_epi64(order, index);
          if constexpr (kBits == 7) last = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
        }
        const __m512i a = low_values(index, last), b = high_values(index, last);
        const __m512 z0 = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b));
        const __m512 z1 = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
        if constexpr (kProduct) {
          const __m512 sum = _mm512_fmadd_ps(z0, x0, _mm512_loadu_ps(to[s]));
          _mm512_storeu_ps(to[s], _mm512_fmadd_ps(z1, x1, sum));
        } else {
          _mm512_storeu_ps(to[s], z0);
          _mm512_storeu_ps(to[s] + 16, z1);
        }
        to[s] += kWidth;
      }
    }
    done += sure;
  }
  for (int s = 0; s < kStreams; ++s) {
    _mm512_store_si512(streams[s]->low, low[s]);
    _mm512_store_si512(streams[s]->high, high[s]);
    _mm512_store_si512(streams[s]->trellis, trellis[s]);
    streams[s]->words = words[s];
  }
  return done;
}

template <int kComparisons, bool kProduct>
size_t steps_of(const SearchTables& tables, Stream* const* streams, size_t count, size_t steps_left,
                bool read, const float* x, float* const* out) {
  if (!read) return steps<kComparisons, 1, false, kProduct>(tables, streams, steps_left, x, out);
  if (count == 1)
    return steps<kComparisons, 1, true, kProduct>(tables, streams, steps_left, x, out);
  if (count == 2)
    return steps<kComparisons, 2, true, kProduct>(tables, streams, steps_left, x, out);
  if (count == 3)
    return steps<kComparisons, 3, true, kProduct>(tables, streams, steps_left, x, out);
  return steps<kComparisons, 4, true, kProduct>(tables, streams, steps_left, x, out);
}

template <int kType>
inline void put_scaled(__m512 value, __mmask16 there, uint8_t* out) {
  if constexpr (kType == kFloat32) {
    _mm512_mask_storeu_ps(out, there, value);
  } else if constexpr (kType == kFloat16) {
    _mm256_mask_storeu_epi16(out, there, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  } else {
    // Weights are finite, so NaN needs no care. The chip's own instruction flushes subnormals.
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    _mm256_mask_storeu_epi16(out, there, _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16)));
  }
}

template <int kType>
void scale_row(const float* z, size_t count, float row, const float* columns, size_t column_stride,
               const float* zero, uint8_t* out) {
  const __m512 factor = _mm512_set1_ps(row), offset = _mm512_set1_ps(zero ? *zero : 0.0f);
  __m512 column = _mm512_set1_ps(*columns);
  for (size_t j = 0; j < count; j += 16) {
    const __mmask16 there =
        count - j >= 16 ? __mmask16(0xFFFF) : static_cast<__mmask16>((1u << (count - j)) - 1);
    if (column_stride) column = _mm512_maskz_loadu_ps(there, columns + j);
    __m512 value =
        _mm512_mul_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(there, z + j), factor), column);
    if (zero) value = _mm512_add_ps(value, offset);
    put_scaled<kType>(value, there, out + j * item_size(kType));
  }
}

}  // namespace

size_t steps_vbmi2(const SearchTables& tables, Stream* const* streams, size_t count, size_t steps,
                   bool read, const float* x, float* const* out) {
  const auto by = [&](auto without, auto with) {
    return (x ? with : without)(tables, streams, count, steps, read, x, out);
  };
  static_assert(SearchTables::kLeast == 4 && SearchTables::kMost == 6, "one case for each below");
  if (tables.comparisons == 4) return by(steps_of<4, false>, steps_of<4, true>);
  if (tables.comparisons == 5) return by(steps_of<5, false>, steps_of<5, true>);
  return by(steps_of<6, false>, steps_of<6, true>);
}

void accumulate_vbmi2(const float* z, size_t steps, const float* x, float* sums) {
  const __m512 x0 = _mm512_loadu_ps(x), x1 = _mm512_loadu_ps(x + 16);
  for (size_t t = 0; t < steps; ++t, z += kLanes, sums += 16) {
    const __m512 sum = _mm512_fmadd_ps(_mm512_loadu_ps(z), x0, _mm512_loadu_ps(sums));
    _mm512_storeu_ps(sums, _mm512_fmadd_ps(_mm512_loadu_ps(z + 16), x1, sum));
  }
}

void scale_row_vbmi2(const float* z, size_t count, float row, const float* columns,
                     size_t column_stride, const float* zero, int type, void* out) {
  const auto by = type == kFloat32   ? scale_row<kFloat32>
                  : type == kFloat16 ? scale_row<kFloat16>
                                     : scale_row<kBfloat16>;
  by(z, count, row, columns, column_stride, zero, static_cast<uint8_t*>(out));
}

float dot_vbmi2(const float* a, const float* b, size_t count) {
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

}  // namespace ectcq
