// One step of sixteen lanes of rANS in AVX-512 F. For files that are compiled with it.

#pragma once

#include <immintrin.h>

#include "rans.h"

namespace codecs {
namespace {

// The states after symbols with these slot entries; reads the words that they need. 32 bytes must
// be there to load, whether they are taken or not.
template <bool kRead>
inline __m512i next_states(__m512i x, __m512i entry, const uint8_t** words) {
  const __m512i low = _mm512_set1_epi32(kSlots - 1);
  const __m512i frequency = _mm512_and_epi32(entry, low);
  const __m512i offset = _mm512_and_epi32(_mm512_srli_epi32(entry, 12), low);
  x = _mm512_add_epi32(_mm512_mullo_epi32(frequency, _mm512_srli_epi32(x, kProbabilityBits)),
                       offset);
  if (kRead) {
    const __mmask16 needs = _mm512_cmplt_epu32_mask(x, _mm512_set1_epi32(kLowest));
    const __m512i next =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(*words)));
    const __m512i word = _mm512_maskz_expand_epi32(needs, next);
    x = _mm512_mask_or_epi32(x, needs, _mm512_slli_epi32(x, 16), word);
    *words += 2 * static_cast<unsigned>(__builtin_popcount(needs));
  }
  return x;
}

}  // namespace
}  // namespace codecs
