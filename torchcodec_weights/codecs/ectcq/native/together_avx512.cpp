// Steps of 32 lanes in two registers of sixteen states (AVX-512 F). Symbols are found by a binary search
// in registers: see search_tables.h.

#include <immintrin.h>

#include <algorithm>

#include "choose_steps.h"

namespace ectcq {
namespace {

constexpr int kParts = kLanes / 16;

// 2^kBits values by index, in registers of sixteen.
template <int kBits>
struct Lookup {
  static constexpr int kRegisters = kBits <= 4 ? 1 : 1 << (kBits - 4);
  __m512i part[kRegisters];

  __m512i operator()(__m512i index) const {
    if constexpr (kRegisters == 1) {
      return _mm512_permutexvar_epi32(index, part[0]);
    } else {
      __m512i found[kRegisters / 2];
#pragma GCC unroll 4
      for (int k = 0; k < kRegisters / 2; ++k) {
        found[k] = _mm512_permutex2var_epi32(part[2 * k], index, part[2 * k + 1]);
      }
      // A bit of the index above those of the permutation chooses.
#pragma GCC unroll 2
      for (int half = kRegisters / 4, bit = 32; half; half /= 2, bit *= 2) {
        const __mmask16 odd = _mm512_test_epi32_mask(index, _mm512_set1_epi32(bit));
#pragma GCC unroll 2
        for (int k = 0; k < half; ++k) {
          found[k] = _mm512_mask_mov_epi32(found[2 * k], odd, found[2 * k + 1]);
        }
      }
      return found[0];
    }
  }
};

inline __m512i widened(const uint16_t* sixteen) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(sixteen)));
}

inline __m512i joined(const uint16_t* low, const uint16_t* high) {
  return _mm512_or_epi32(widened(low), _mm512_slli_epi32(widened(high), 16));
}

inline void store_narrowed(uint16_t* to, __m512i words) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(words));
}

// Advance the indices of all streams by comparison `kFrom` and those after it.
template <int kFrom, int kComparisons, int kStreams>
inline void search(const SearchTables& tables, const __m512i (&slot)[kStreams][kParts],
                   __m512i (&index)[kStreams][kParts]) {
  if constexpr (kFrom < kComparisons) {
    Lookup<1 + kFrom> threshold;
    for (int k = 0; k < threshold.kRegisters; ++k) {
      threshold.part[k] = widened(tables.thresholds + tables.threshold(kFrom) + 16 * k);
    }
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
#pragma GCC unroll 2
      for (int r = 0; r < kParts; ++r) {
        const __m512i difference = _mm512_sub_epi32(slot[s][r], threshold(index[s][r]));
        index[s][r] = _mm512_add_epi32(_mm512_add_epi32(index[s][r], index[s][r]),
                                       _mm512_srli_epi32(difference, 31));
      }
    }
    search<kFrom + 1, kComparisons>(tables, slot, index);
  }
}

template <int kComparisons, int kStreams, bool kRead, Sink kSink>
size_t steps(const SearchTables& tables, Stream* const* streams, size_t count,
             const Activations& activations, float* const* out) {
  // Entries of 32 bits: frequency, start and what the trellis is changed by.
  Lookup<1 + kComparisons> entries, values;
  for (int k = 0; k < entries.kRegisters; ++k) {
    const __m512i start = _mm512_slli_epi32(widened(tables.start + 16 * k), 12);
    const __m512i flips = _mm512_slli_epi32(widened(tables.flips + 16 * k), 24);
    entries.part[k] =
        _mm512_or_epi32(_mm512_or_epi32(widened(tables.frequency + 16 * k), start), flips);
    values.part[k] = joined(tables.low + 16 * k, tables.high + 16 * k);
  }
  const __m512i one = _mm512_set1_epi32(1), slot_mask = _mm512_set1_epi32(kSlots - 1);
  constexpr bool kRows = kSink == Sink::kRowSums;
  const float* x = activations.x;
  size_t row_step = activations.step;
  __m512 factors[kParts] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, sums[kStreams];
  const auto load_activations = [&factors](const float* from) {
    for (int r = 0; r < kParts; ++r) factors[r] = _mm512_loadu_ps(from + 16 * r);
  };
  if constexpr (kSink == Sink::kSums) load_activations(x);
  __m512i state[kStreams][kParts], trellis[kStreams][kParts];
  const uint8_t* words[kStreams];
  float* to[kStreams];
  for (int s = 0; s < kStreams; ++s) {
    for (int r = 0; r < kParts; ++r) {
      state[s][r] = joined(streams[s]->low + 16 * r, streams[s]->high + 16 * r);
      trellis[s][r] = widened(streams[s]->trellis + 16 * r);
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
    if constexpr (kRows) {
      sure = std::min(sure, activations.row_steps - row_step);
      for (int s = 0; s < kStreams; ++s) sums[s] = _mm512_loadu_ps(to[s]);
    }
    for (size_t t = 0; t < sure; ++t) {
      if constexpr (kRows) load_activations(x + (row_step + t) * kLanes);
      // One stage after the other for all streams, as in decode_vbmi2.cpp.
      __m512i slot[kStreams][kParts], index[kStreams][kParts];
#pragma GCC unroll 4
      for (int s = 0; s < kStreams; ++s) {
#pragma GCC unroll 2
        for (int r = 0; r < kParts; ++r) {
          slot[s][r] = _mm512_and_epi32(state[s][r], slot_mask);
          index[s][r] = _mm512_and_epi32(trellis[s][r], one);
        }
      }
      search<0, kComparisons>(tables, slot, index);
#pragma GCC unroll 4
      for (int s = 0; s < kStreams; ++s) {
        __m512 z[kParts];
#pragma GCC unroll 2
        for (int r = 0; r < kParts; ++r) {
          const __m512i entry = entries(index[s][r]);
          trellis[s][r] =
              _mm512_xor_epi32(_mm512_srli_epi32(trellis[s][r], 1), _mm512_srli_epi32(entry, 24));
          const __m512i frequency = _mm512_and_epi32(entry, slot_mask);
          const __m512i start = _mm512_and_epi32(_mm512_srli_epi32(entry, 12), slot_mask);
          const __m512i product =
              _mm512_mullo_epi32(frequency, _mm512_srli_epi32(state[s][r], kProbabilityBits));
          __m512i next = _mm512_add_epi32(product, _mm512_sub_epi32(slot[s][r], start));
          if constexpr (kRead) {
            const __mmask16 needs = _mm512_cmplt_epu32_mask(next, _mm512_set1_epi32(kLowest));
            const __m512i word = _mm512_maskz_expand_epi32(
                needs, widened(reinterpret_cast<const uint16_t*>(words[s])));
            next = _mm512_mask_or_epi32(next, needs, _mm512_slli_epi32(next, 16), word);
            words[s] += 2 * static_cast<unsigned>(__builtin_popcount(needs));
          }
          state[s][r] = next;
          if constexpr (kSink == Sink::kIndices) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to[s]) + r,
                             _mm512_cvtepi32_epi8(index[s][r]));
          } else {
            z[r] = _mm512_castsi512_ps(values(index[s][r]));
          }
        }
        if constexpr (kRows) {
          sums[s] = _mm512_fmadd_ps(z[1], factors[1], _mm512_fmadd_ps(z[0], factors[0], sums[s]));
        } else if constexpr (kSink == Sink::kSums) {
          const __m512 sum = _mm512_fmadd_ps(z[0], factors[0], _mm512_loadu_ps(to[s]));
          _mm512_storeu_ps(to[s], _mm512_fmadd_ps(z[1], factors[1], sum));
        } else if constexpr (kSink == Sink::kValues) {
          for (int r = 0; r < kParts; ++r) _mm512_storeu_ps(to[s] + 16 * r, z[r]);
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
    for (int r = 0; r < kParts; ++r) {
      store_narrowed(streams[s]->low + 16 * r, state[s][r]);
      store_narrowed(streams[s]->high + 16 * r, _mm512_srli_epi32(state[s][r], 16));
      store_narrowed(streams[s]->trellis + 16 * r, trellis[s][r]);
    }
    streams[s]->words = words[s];
  }
  return done;
}

struct Level {
  static constexpr int kMostStreams = 4, kLeast = 3, kMost = 6;
  template <int kComparisons, int kStreams, bool kRead, Sink kSink>
  static size_t steps(const SearchTables& tables, Stream* const* streams, size_t count,
                      const Activations& x, float* const* out) {
    return ectcq::steps<kComparisons, kStreams, kRead, kSink>(tables, streams, count, x, out);
  }
};

}  // namespace

// All but the steps are bound by memory: eight floats at a time do.
const Kernels kAvx512Kernels = {4,
                                3,
                                6,
                                6,
                                true,
                                ChooseSteps<Level>::steps,
                                accumulate_avx2,
                                scale_row_avx2,
                                dot_avx2,
                                add_products_avx2,
                                expand_avx2,
                                assemble_strip_avx2};

}  // namespace ectcq
