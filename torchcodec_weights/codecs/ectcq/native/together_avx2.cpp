// Steps of 32 lanes, halves of their states in two registers of words each (AVX2). Symbols are found by
// a binary search in registers: see search_tables.h. Tables are read by a byte shuffle, byte by byte.

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "common/native/floats.h"
#include "choose_steps.h"
#include "word_places.h"

namespace ectcq {

namespace {

inline __m128i load_half(const void* from) {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}

inline __m256i load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

inline void store(void* to, __m256i value) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), value);
}

inline __m256i table(const uint8_t* sixteen) {
  return _mm256_broadcastsi128_si256(load_half(sixteen));
}

// Indices of kBits bits, a byte each, as what a shuffle of each sixteen entries of a table takes: a
// byte whose highest bit is set gives zero.
template <int kBits>
struct Places16 {
  static constexpr int kParts = kBits <= 4 ? 1 : 1 << (kBits - 4);
  __m256i part[kParts];

  explicit Places16(__m256i index) {
    const __m256i others = _mm256_set1_epi8(0x70);
    if constexpr (kParts == 1) {
      part[0] = index;
    } else if constexpr (kParts == 2) {
      part[0] = _mm256_add_epi8(index, others);
      part[1] = _mm256_sub_epi8(index, _mm256_set1_epi8(16));
    } else {
#pragma GCC unroll 8
      for (int k = 0; k < kParts; ++k) {
        const auto own = _mm256_set1_epi8(static_cast<char>(16 * k));
        part[k] = _mm256_add_epi8(k ? _mm256_xor_si256(index, own) : index, others);
      }
    }
  }

  __m256i operator()(const uint8_t* entries) const {
    __m256i found = _mm256_shuffle_epi8(table(entries), part[0]);
#pragma GCC unroll 8
    for (int k = 1; k < kParts; ++k) {
      found = _mm256_or_si256(found, _mm256_shuffle_epi8(table(entries + 16 * k), part[k]));
    }
    return found;
  }
};

// Comparison kFrom and those after it, of indices a byte each in the order in which packing leaves
// lanes. `said` is what the last comparison said, 0 or −1 for each lane.
template <int kFrom, int kComparisons, int kStreams>
inline void search(const SearchTables& tables, const __m256i (&slot)[kStreams][2],
                   __m256i (&index)[kStreams], __m256i (&said)[kStreams]) {
  if constexpr (kFrom < kComparisons) {
    const auto& entries = tables.bytes.threshold[kFrom - SearchTables::kShort];
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      const Places16<1 + kFrom> at(index[s]);
      const __m256i low = at(entries[0]), high = at(entries[1]);
      said[s] = _mm256_packs_epi16(_mm256_cmpgt_epi16(_mm256_unpacklo_epi8(low, high), slot[s][0]),
                                   _mm256_cmpgt_epi16(_mm256_unpackhi_epi8(low, high), slot[s][1]));
      index[s] = _mm256_sub_epi8(_mm256_add_epi8(index[s], index[s]), said[s]);
    }
    search<kFrom + 1, kComparisons>(tables, slot, index, said);
  }
}

// What becomes of the values at indices, in the order in which packing leaves lanes.
template <int kBits>
inline void values_at(const SearchTables& tables, const Places16<kBits>& at, __m256 (&z)[4]) {
  __m256i byte[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) byte[k] = at(tables.bytes.value[k]);
  const __m256i low[2] = {_mm256_unpacklo_epi8(byte[0], byte[1]),
                          _mm256_unpackhi_epi8(byte[0], byte[1])};
  const __m256i high[2] = {_mm256_unpacklo_epi8(byte[2], byte[3]),
                           _mm256_unpackhi_epi8(byte[2], byte[3])};
#pragma GCC unroll 2
  for (int r = 0; r < 2; ++r) {
    z[2 * r] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low[r], high[r]));
    z[2 * r + 1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low[r], high[r]));
  }
}

// Sixteen floats in their order to that of values_at, and back.
inline void cross(__m256& a, __m256& b) {
  const __m256 c = _mm256_permute2f128_ps(a, b, 0x20);
  b = _mm256_permute2f128_ps(a, b, 0x31);
  a = c;
}

// Lanes whose states are below 2^16 each take a word, in their order.
inline void read_words(__m256i (&low)[2], __m256i (&high)[2], const uint8_t*& words) {
  const __m256i zero = _mm256_setzero_si256();
  const __m256i needs[2] = {_mm256_cmpeq_epi16(high[0], zero), _mm256_cmpeq_epi16(high[1], zero)};
  // Lanes 0 to 7, 16 to 23, 8 to 15, 24 to 31.
  const auto mask =
      static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_packs_epi16(needs[0], needs[1])));
  const uint32_t mask0 = mask & 255, mask1 = mask >> 16 & 255;
  const uint32_t mask2 = mask >> 8 & 255, mask3 = mask >> 24;
  const auto taken = [](uint32_t lanes) {
    return 2 * static_cast<size_t>(__builtin_popcount(lanes));
  };
  const size_t first = taken(mask0);
  const size_t half = taken(mask & 0xFF00FF);
  const size_t third = half + taken(mask2);
  const __m256i next[2] = {_mm256_inserti128_si256(_mm256_castsi128_si256(load_half(words)),
                                                   load_half(words + first), 1),
                           _mm256_inserti128_si256(_mm256_castsi128_si256(load_half(words + half)),
                                                   load_half(words + third), 1)};
  const __m256i order[2] = {
      _mm256_inserti128_si256(_mm256_castsi128_si256(load_half(kWordPlaces.of[mask0])),
                              load_half(kWordPlaces.of[mask1]), 1),
      _mm256_inserti128_si256(_mm256_castsi128_si256(load_half(kWordPlaces.of[mask2])),
                              load_half(kWordPlaces.of[mask3]), 1)};
#pragma GCC unroll 2
  for (int r = 0; r < 2; ++r) {
    high[r] = _mm256_or_si256(high[r], _mm256_and_si256(low[r], needs[r]));
    low[r] = _mm256_or_si256(_mm256_andnot_si256(needs[r], low[r]),
                             _mm256_shuffle_epi8(next[r], order[r]));
  }
  words += taken(mask);
}

// One stage after the other for all streams, as their order here is nearly that in which instructions
// reach the processor's queues, which do not hold a whole step of two. Called, it would keep its state
// in memory.
template <int kComparisons, int kStreams, bool kRead, Sink kSink>
__attribute__((always_inline)) inline void step(const SearchTables& tables,
                                                __m256i (&low)[kStreams][2],
                                                __m256i (&high)[kStreams][2],
                                                __m256i (&trellis)[kStreams],
                                                const uint8_t* (&words)[kStreams],
                                                const __m256 (&x)[4], float* (&to)[kStreams]) {
  const auto& bytes = tables.bytes;
  const __m256i slot_mask = _mm256_set1_epi16(kSlots - 1);
  __m256i slot[kStreams][2], at[kStreams][2], q[kStreams];
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s) {
    q[s] = _mm256_and_si256(trellis[s], _mm256_set1_epi8(1));
    const __m256i second = _mm256_add_epi8(q[s], _mm256_set1_epi8(2));
    at[s][0] = _mm256_unpacklo_epi8(q[s], second);
    at[s][1] = _mm256_unpackhi_epi8(q[s], second);
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) slot[s][r] = _mm256_and_si256(low[s][r], slot_mask);
  }
  __m256i last[kStreams];
#pragma GCC unroll 3
  for (int j = 0; j < SearchTables::kShort; ++j) {
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      __m256i said[2];
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        said[r] =
            _mm256_cmpgt_epi16(_mm256_shuffle_epi8(table(bytes.first[j]), at[s][r]), slot[s][r]);
        at[s][r] = _mm256_sub_epi8(_mm256_add_epi8(at[s][r], at[s][r]), said[r]);
      }
      if (j + 1 == kComparisons) last[s] = _mm256_packs_epi16(said[0], said[1]);
    }
  }
  const __m256i byte = _mm256_set1_epi16(0xFF);
  __m256i index[kStreams];
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s) {
    index[s] =
        _mm256_packus_epi16(_mm256_and_si256(at[s][0], byte), _mm256_and_si256(at[s][1], byte));
  }
  search<SearchTables::kShort, kComparisons>(tables, slot, index, last);
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s) {
    const Places16<1 + kComparisons> place(index[s]);
    const __m256i f0 = place(bytes.frequency[0]), f1 = place(bytes.frequency[1]);
    const __m256i s0 = place(bytes.start[0]), s1 = place(bytes.start[1]);
    const __m256i frequency[2] = {_mm256_unpacklo_epi8(f0, f1), _mm256_unpackhi_epi8(f0, f1)};
    const __m256i start[2] = {_mm256_unpacklo_epi8(s0, s1), _mm256_unpackhi_epi8(s0, s1)};
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      // frequency · (state / 2^12) = 16 · frequency · high + frequency · (low / 2^12): with the offset
      // added the second has sixteen bits, as the first has in each of its halves.
      const __m256i above =
          _mm256_mulhi_epu16(frequency[r], _mm256_xor_si256(low[s][r], slot[s][r]));
      const __m256i rest = _mm256_add_epi16(above, _mm256_sub_epi16(slot[s][r], start[r]));
      low[s][r] = _mm256_add_epi16(_mm256_mullo_epi16(frequency[r], high[s][r]), rest);
      const __m256i carry =
          _mm256_min_epu16(_mm256_subs_epu16(rest, low[s][r]), _mm256_set1_epi16(1));
      high[s][r] = _mm256_add_epi16(_mm256_mulhi_epu16(frequency[r], high[s][r]), carry);
    }
  }
  if constexpr (kRead) {
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) read_words(low[s], high[s], words[s]);
  }
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s) {
    // The symbol's parity is the contrary of the last comparison.
    const __m256i halved =
        _mm256_and_si256(_mm256_srli_epi16(trellis[s], 1), _mm256_set1_epi8(0x7F));
    const __m256i odd = _mm256_cmpeq_epi8(q[s], _mm256_set1_epi8(1));
    trellis[s] =
        _mm256_xor_si256(_mm256_xor_si256(halved, _mm256_and_si256(odd, table(bytes.feedback))),
                         _mm256_andnot_si256(last[s], table(bytes.input)));
    if constexpr (kSink == Sink::kIndices) {
      store(to[s], _mm256_permute4x64_epi64(index[s], 0xD8));
    } else {
      __m256 z[4];
      values_at(tables, Places16<1 + kComparisons>(index[s]), z);
      if constexpr (kSink == Sink::kSums || kSink == Sink::kRowSums) {
#pragma GCC unroll 2
        for (int r = 0; r < 2; ++r) {
          const __m256 sum = _mm256_fmadd_ps(z[r], x[r], _mm256_loadu_ps(to[s] + 8 * r));
          _mm256_storeu_ps(to[s] + 8 * r, _mm256_fmadd_ps(z[2 + r], x[2 + r], sum));
        }
      } else {
        cross(z[0], z[1]);
        cross(z[2], z[3]);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) _mm256_storeu_ps(to[s] + 8 * k, z[k]);
      }
    }
    if constexpr (kSink != Sink::kRowSums) to[s] += width_of(kSink);
  }
}

template <int kComparisons, int kStreams, bool kRead, Sink kSink>
size_t steps(const SearchTables& tables, Stream* const* streams, size_t count,
             const Activations& activations, float* const* out) {
  constexpr bool kRows = kSink == Sink::kRowSums;
  const float* x = activations.x;
  size_t row_step = activations.step;
  __m256 factors[4] = {};
  const auto load_activations = [&factors](const float* from) {
    for (int k = 0; k < 4; ++k) factors[k] = _mm256_loadu_ps(from + 8 * k);
    cross(factors[0], factors[1]);
    cross(factors[2], factors[3]);
  };
  if constexpr (kSink == Sink::kSums) load_activations(x);
  __m256i low[kStreams][2], high[kStreams][2], trellis[kStreams];
  const uint8_t* words[kStreams];
  float* to[kStreams];
  for (int s = 0; s < kStreams; ++s) {
    for (int r = 0; r < 2; ++r) {
      low[s][r] = load(streams[s]->low + 16 * r);
      high[s][r] = load(streams[s]->high + 16 * r);
    }
    trellis[s] = _mm256_packus_epi16(load(streams[s]->trellis), load(streams[s]->trellis + 16));
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
      if constexpr (kRows) load_activations(x + (row_step + t) * kLanes);
      step<kComparisons, kStreams, kRead, kSink>(tables, low, high, trellis, words, factors, to);
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
  const __m256i zero = _mm256_setzero_si256();
  for (int s = 0; s < kStreams; ++s) {
    for (int r = 0; r < 2; ++r) {
      store(streams[s]->low + 16 * r, low[s][r]);
      store(streams[s]->high + 16 * r, high[s][r]);
    }
    store(streams[s]->trellis, _mm256_unpacklo_epi8(trellis[s], zero));
    store(streams[s]->trellis + 16, _mm256_unpackhi_epi8(trellis[s], zero));
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

// Eight floats rounded to kFloat16 or kBfloat16.
template <int kType>
inline __m128i rounded(__m256 value) {
  if constexpr (kType == kFloat16) {
    return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
  } else {
    // Weights are finite, so NaN needs no care.
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i words = _mm256_srli_epi32(sum, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
}

template <int kType>
inline void put(__m256 value, uint8_t* out) {
  if constexpr (kType == kFloat32) {
    _mm256_storeu_ps(reinterpret_cast<float*>(out), value);
  } else {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), rounded<kType>(value));
  }
}

template <int kType>
void scale_row(const float* z, size_t count, float row, const float* columns, size_t column_stride,
               const float* zero, uint8_t* out) {
  const __m256 factor = _mm256_set1_ps(row), offset = _mm256_set1_ps(zero ? *zero : 0.0f);
  const auto scaled = [&](const float* from, const float* column) {
    const __m256 value =
        _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(from), factor),
                      column_stride ? _mm256_loadu_ps(column) : _mm256_broadcast_ss(columns));
    return zero ? _mm256_add_ps(value, offset) : value;
  };
  size_t j = 0;
  for (; j + 8 <= count; j += 8) {
    put<kType>(scaled(z + j, columns + j), out + j * item_size(kType));
  }
  if (j == count) return;
  float rest[8] = {}, column[8] = {};
  std::memcpy(rest, z + j, (count - j) * sizeof(float));
  if (column_stride) std::memcpy(column, columns + j, (count - j) * sizeof(float));
  uint8_t last[8 * sizeof(float)];
  put<kType>(scaled(rest, column), last);
  std::memcpy(out + j * item_size(kType), last, (count - j) * item_size(kType));
}

// Four registers' halves: element i of register k to element k of register i.
inline void transpose_halves(__m256 (&v)[4]) {
  const __m256 a = _mm256_unpacklo_ps(v[0], v[1]), b = _mm256_unpackhi_ps(v[0], v[1]);
  const __m256 c = _mm256_unpacklo_ps(v[2], v[3]), d = _mm256_unpackhi_ps(v[2], v[3]);
  v[0] = _mm256_shuffle_ps(a, c, 0x44);
  v[1] = _mm256_shuffle_ps(a, c, 0xEE);
  v[2] = _mm256_shuffle_ps(b, d, 0x44);
  v[3] = _mm256_shuffle_ps(b, d, 0xEE);
}

template <int kBits>
void expand(const SearchTables& tables, const uint8_t* indices, const float* row,
            const float* columns, const float* zero, float* out) {
  __m256 column[4];
  for (int k = 0; k < 4; ++k) column[k] = _mm256_loadu_ps(columns + 8 * k);
  cross(column[0], column[1]);
  cross(column[2], column[3]);
  alignas(32) float scaled[kStripRows][kLanes];
  for (size_t r = 0; r < kStripRows; ++r) {
    const __m256i index = _mm256_permute4x64_epi64(load(indices + r * kLanes), 0xD8);
    __m256 z[4];
    values_at(tables, Places16<kBits>(index), z);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      z[k] = _mm256_mul_ps(_mm256_mul_ps(z[k], _mm256_set1_ps(row[r])), column[k]);
      if (zero) z[k] = _mm256_add_ps(z[k], _mm256_set1_ps(zero[r]));
      _mm256_store_ps(scaled[r] + 8 * k, z[k]);
    }
  }
  for (size_t k = 0; k < 4; ++k) {
    // Register k has four lanes from this on in its first half, and those eight further in its second.
    float* to = out + (16 * (k / 2) + 4 * (k % 2)) * kStripRows;
    for (size_t r = 0; r < kStripRows; r += 8) {
      __m256 first[4], second[4];
#pragma GCC unroll 4
      for (size_t i = 0; i < 4; ++i) first[i] = _mm256_load_ps(scaled[r + i] + 8 * k);
#pragma GCC unroll 4
      for (size_t i = 0; i < 4; ++i) second[i] = _mm256_load_ps(scaled[r + 4 + i] + 8 * k);
      transpose_halves(first);
      transpose_halves(second);
#pragma GCC unroll 4
      for (size_t i = 0; i < 4; ++i) {
        cross(first[i], second[i]);
        _mm256_storeu_ps(to + i * kStripRows + r, first[i]);
        _mm256_storeu_ps(to + (i + 8) * kStripRows + r, second[i]);
      }
    }
  }
}

// Eight rows of eight columns, the first of them, of a strip from row `row` on.
inline void rows_of(const float* strip, const uint32_t* places, size_t columns, size_t row,
                    __m256 (&v)[8]) {
  __m256 first[4], second[4];
  const auto at = [&](size_t k, size_t from) {
    return _mm_loadu_ps(strip + places[k < columns ? k : 0] + row + from);
  };
  const auto both = [&](size_t k, size_t from) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(at(k, from)), at(k + 4, from), 1);
  };
#pragma GCC unroll 4
  for (size_t k = 0; k < 4; ++k) {
    first[k] = both(k, 0);
    second[k] = both(k, 4);
  }
  transpose_halves(first);
  transpose_halves(second);
#pragma GCC unroll 4
  for (size_t k = 0; k < 4; ++k) {
    v[k] = first[k];
    v[4 + k] = second[k];
  }
}

template <int kType>
void assemble(const float* strip, const uint32_t* places, size_t cols, size_t rows, uint8_t* out) {
  constexpr size_t kItem = item_size(kType);
  for (size_t row = 0; row < rows; row += 8) {
    const size_t height = rows - row < 8 ? rows - row : 8;
    uint8_t* to = out + row * cols * kItem;
    size_t j = 0;
    for (; j + 16 <= cols && height == 8; j += 16) {
      __m256 a[8], b[8];
      rows_of(strip, places + j, 8, row, a);
      rows_of(strip, places + j + 8, 8, row, b);
#pragma GCC unroll 8
      for (size_t r = 0; r < 8; ++r) {
        put<kType>(a[r], to + (r * cols + j) * kItem);
        put<kType>(b[r], to + (r * cols + j + 8) * kItem);
      }
    }
    for (; j < cols; j += 8) {
      const size_t width = cols - j < 8 ? cols - j : 8;
      __m256 v[8];
      rows_of(strip, places + j, width, row, v);
      for (size_t r = 0; r < height; ++r) {
        uint8_t part[8 * kItem];
        put<kType>(v[r], part);
        std::memcpy(to + (r * cols + j) * kItem, part, width * kItem);
      }
    }
  }
}

}  // namespace

void accumulate_avx2(const float* z, size_t steps, const float* x, float* sums) {
  __m256 factors[4];
  for (int k = 0; k < 4; ++k) factors[k] = _mm256_loadu_ps(x + 8 * k);
  for (size_t t = 0; t < steps; ++t, z += kLanes, sums += 16) {
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      const __m256 sum =
          _mm256_fmadd_ps(_mm256_loadu_ps(z + 8 * r), factors[r], _mm256_loadu_ps(sums + 8 * r));
      _mm256_storeu_ps(sums + 8 * r,
                       _mm256_fmadd_ps(_mm256_loadu_ps(z + 16 + 8 * r), factors[2 + r], sum));
    }
  }
}

void scale_row_avx2(const float* z, size_t count, float row, const float* columns,
                    size_t column_stride, const float* zero, int type, bool, void* out) {
  const auto by = type == kFloat32   ? scale_row<kFloat32>
                  : type == kFloat16 ? scale_row<kFloat16>
                                     : scale_row<kBfloat16>;
  by(z, count, row, columns, column_stride, zero, static_cast<uint8_t*>(out));
}

float dot_avx2(const float* a, const float* b, size_t count) {
  __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(),
                    _mm256_setzero_ps()};
  size_t i = 0;
  for (; i + 32 <= count; i += 32) {
#pragma GCC unroll 4
    for (size_t k = 0; k < 4; ++k) {
      sums[k] =
          _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8 * k), _mm256_loadu_ps(b + i + 8 * k), sums[k]);
    }
  }
  float lanes[8];
  _mm256_storeu_ps(lanes,
                   _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
  float sum = 0;
  for (; i < count; ++i) sum += a[i] * b[i];
  for (const float lane : lanes) sum += lane;
  return sum;
}

void expand_avx2(const SearchTables& tables, const uint8_t* indices, const float* row,
                 const float* columns, const float* zero, float* out) {
  const auto by = tables.comparisons == 3   ? expand<4>
                  : tables.comparisons == 4 ? expand<5>
                  : tables.comparisons == 5 ? expand<6>
                                            : expand<7>;
  by(tables, indices, row, columns, zero, out);
}

void assemble_strip_avx2(const float* strip, const uint32_t* places, size_t cols, size_t rows,
                         int type, void* out) {
  const auto by = type == kFloat32   ? assemble<kFloat32>
                  : type == kFloat16 ? assemble<kFloat16>
                                     : assemble<kBfloat16>;
  by(strip, places, cols, rows, static_cast<uint8_t*>(out));
}

void add_products_avx2(const float* z, size_t rows, const float* x, float* y) {
  const __m256 x0 = _mm256_loadu_ps(x), x1 = _mm256_loadu_ps(x + 8);
  const __m256 x2 = _mm256_loadu_ps(x + 16), x3 = _mm256_loadu_ps(x + 24);
  size_t r = 0;
  for (; r + 8 <= rows; r += 8, z += 8 * kLanes) {
    __m256 s[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const float* row = z + i * kLanes;
      s[i] = _mm256_mul_ps(_mm256_loadu_ps(row), x0);
      s[i] = _mm256_fmadd_ps(_mm256_loadu_ps(row + 8), x1, s[i]);
      s[i] = _mm256_fmadd_ps(_mm256_loadu_ps(row + 16), x2, s[i]);
      s[i] = _mm256_fmadd_ps(_mm256_loadu_ps(row + 24), x3, s[i]);
    }
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(s[4], s[5]), _mm256_hadd_ps(s[6], s[7]));
    const __m256 sums =
        _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    _mm256_storeu_ps(y + r, _mm256_add_ps(_mm256_loadu_ps(y + r), sums));
  }
  for (; r < rows; ++r, z += kLanes) y[r] += dot_avx2(z, x, kLanes);
}

const Kernels kAvx2Kernels = {4,
                              3,
                              6,
                              5,
                              true,
                              ChooseSteps<Level>::steps,
                              accumulate_avx2,
                              scale_row_avx2,
                              dot_avx2,
                              add_products_avx2,
                              expand_avx2,
                              assemble_strip_avx2};

}  // namespace ectcq
