// Steps of 32 lanes in two registers of sixteen (AVX-512 F).

#include <immintrin.h>

#include <type_traits>

#include "common/native/rans_avx512.h"
#include "ectcq.h"

namespace ectcq {

namespace {

// Values by index: from memory, or from registers of sixteen.
template <int kRegisters>
inline __m512 values_at(const float* values, __m512i index) {
  if constexpr (kRegisters == 0) {
    return _mm512_i32gather_ps(index, values, 4);
  } else {
    __m512 found =
        _mm512_permutex2var_ps(_mm512_loadu_ps(values), index, _mm512_loadu_ps(values + 16));
    if constexpr (kRegisters == 4) {
      const __m512 more =
          _mm512_permutex2var_ps(_mm512_loadu_ps(values + 32), index, _mm512_loadu_ps(values + 48));
      found = _mm512_mask_mov_ps(found, _mm512_test_epi32_mask(index, _mm512_set1_epi32(32)), more);
    }
    return found;
  }
}

template <bool kRead, int kRegisters>
size_t steps(const Tables& tables, Lanes& lanes, const uint8_t** words, const uint8_t* end,
             size_t count, float* out) {
  const uint8_t* p = *words;
  const __m512i slot_mask = _mm512_set1_epi32(kSlots - 1);
  const __m512i one = _mm512_set1_epi32(1);
  const __m512i feedback = _mm512_set1_epi32(static_cast<int>(tables.feedback));
  const __m512i input = _mm512_set1_epi32(static_cast<int>(tables.input));
  __m512i x[2], trellis[2];
  for (int r = 0; r < 2; ++r) {
    x[r] = _mm512_load_si512(lanes.x + 16 * r);
    trellis[r] = _mm512_load_si512(lanes.trellis + 16 * r);
  }
  size_t done = 0;
  for (; done < count; ++done) {
    if (kRead && static_cast<size_t>(end - p) < 2 * kLanes) break;
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      const __mmask16 odd = _mm512_test_epi32_mask(trellis[r], one);
      const __m512i slot =
          _mm512_mask_add_epi32(_mm512_and_epi32(x[r], slot_mask), odd,
                                _mm512_and_epi32(x[r], slot_mask), _mm512_set1_epi32(kSlots));
      const __m512i entry = _mm512_i32gather_epi32(slot, tables.slots, 4);
      const __m512i symbol = _mm512_srli_epi32(entry, 24);
      const __m512i value_index =
          kRegisters ? symbol : _mm512_mask_add_epi32(symbol, odd, symbol, _mm512_set1_epi32(256));
      _mm512_storeu_ps(out + done * kLanes + 16 * r,
                       values_at<kRegisters>(tables.values, value_index));
      const __mmask16 parity = _mm512_test_epi32_mask(symbol, one);
      __m512i next = _mm512_srli_epi32(trellis[r], 1);
      next = _mm512_mask_xor_epi32(next, odd, next, feedback);
      trellis[r] = _mm512_mask_xor_epi32(next, parity, next, input);
      x[r] = next_states<kRead>(x[r], entry, &p);
    }
  }
  for (int r = 0; r < 2; ++r) {
    _mm512_store_si512(lanes.x + 16 * r, x[r]);
    _mm512_store_si512(lanes.trellis + 16 * r, trellis[r]);
  }
  *words = p;
  return done;
}

}  // namespace

size_t steps_avx512(const Tables& tables, Lanes& lanes, const uint8_t** words, const uint8_t* end,
                    size_t count, bool read, float* out) {
  return read ? steps<true, 0>(tables, lanes, words, end, count, out)
              : steps<false, 0>(tables, lanes, words, end, count, out);
}

StepsFunction few_values_avx512(size_t values) {
  const auto of = [](auto registers) -> StepsFunction {
    return [](const Tables& tables, Lanes& lanes, const uint8_t** words, const uint8_t* end,
              size_t count, bool read, float* out) {
      constexpr int kRegisters = decltype(registers)::value;
      return read ? steps<true, kRegisters>(tables, lanes, words, end, count, out)
                  : steps<false, kRegisters>(tables, lanes, words, end, count, out);
    };
  };
  if (values <= 32) return of(std::integral_constant<int, 2>{});
  if (values <= 64) return of(std::integral_constant<int, 4>{});
  return nullptr;
}

}  // namespace ectcq
