// One step of eight lanes of rANS in AVX2. For files that are compiled with it.

#pragma once

#include <immintrin.h>

#include "rans.h"

namespace codecs {
namespace {

// For each mask of lanes that need a word: which of the next words each lane takes.
struct Places {
  alignas(32) uint32_t index[256][8];
  constexpr Places() : index{} {
    for (int mask = 0; mask < 256; ++mask) {
      uint32_t next = 0;
      for (int l = 0; l < 8; ++l) {
        index[mask][l] = next;
        if (mask >> l & 1) ++next;
      }
    }
  }
};
constexpr Places kPlaces;

// The states after symbols with these slot entries; reads the words that they need. 16 bytes must
// be there to load, whether they are taken or not.
template <bool kRead>
inline __m256i next_states(__m256i x, __m256i entry, const uint8_t** words) {
  const __m256i low = _mm256_set1_epi32(kSlots - 1);
  const __m256i frequency = _mm256_and_si256(entry, low);
  const __m256i offset = _mm256_and_si256(_mm256_srli_epi32(entry, 12), low);
  x = _mm256_add_epi32(_mm256_mullo_epi32(frequency, _mm256_srli_epi32(x, kProbabilityBits)),
                       offset);
  if (kRead) {
    const __m256i needs = _mm256_cmpeq_epi32(_mm256_srli_epi32(x, 16), _mm256_setzero_si256());
    const unsigned mask = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(needs)));
    const __m256i next =
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(*words)));
    const __m256i place = _mm256_load_si256(reinterpret_cast<const __m256i*>(kPlaces.index[mask]));
    const __m256i word = _mm256_permutevar8x32_epi32(next, place);
    x = _mm256_blendv_epi8(x, _mm256_or_si256(_mm256_slli_epi32(x, 16), word), needs);
    *words += 2 * static_cast<unsigned>(__builtin_popcount(mask));
  }
  return x;
}

}  // namespace
}  // namespace codecs
