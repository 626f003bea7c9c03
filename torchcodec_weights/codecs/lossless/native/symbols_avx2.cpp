// Steps of 32 lanes in four registers of eight (AVX2).

#include <immintrin.h>

#include "lossless.h"
#include "common/native/rans_avx2.h"

namespace lossless {
namespace {

template <bool kRead>
size_t steps(const uint32_t* slots, uint32_t* lanes, const uint8_t** words, const uint8_t* end,
             size_t count, uint8_t* out) {
  const uint8_t* p = *words;
  const __m256i slot_mask = _mm256_set1_epi32(kSlots - 1);
  // Packing takes halves of registers in turns; this puts fours of bytes into order again.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  __m256i x[4], symbol[4];
  for (int r = 0; r < 4; ++r) {
    x[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes + 8 * r));
  }
  size_t done = 0;
  for (; done < count; ++done) {
    // Each register takes at most 8 words, and loads 8 whether it takes them or not.
    if (kRead && static_cast<size_t>(end - p) < 2 * kLanes) break;
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const __m256i entry = _mm256_i32gather_epi32(reinterpret_cast<const int*>(slots),
                                                   _mm256_and_si256(x[r], slot_mask), 4);
      symbol[r] = _mm256_srli_epi32(entry, 24);
      x[r] = next_states<kRead>(x[r], entry, &p);
    }
    const __m256i packed = _mm256_packus_epi16(_mm256_packus_epi32(symbol[0], symbol[1]),
                                               _mm256_packus_epi32(symbol[2], symbol[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + done * kLanes),
                        _mm256_permutevar8x32_epi32(packed, order));
  }
  for (int r = 0; r < 4; ++r) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes + 8 * r), x[r]);
  }
  *words = p;
  return done;
}

}  // namespace

size_t symbols_avx2(const uint32_t* slots, uint32_t* x, const uint8_t** words, const uint8_t* end,
                    size_t count, bool read, uint8_t* out) {
  return read ? steps<true>(slots, x, words, end, count, out)
              : steps<false>(slots, x, words, end, count, out);
}

}  // namespace lossless
