// Steps of 32 lanes in four registers of eight (AVX2).

#include <immintrin.h>

#include <type_traits>

#include "common/native/rans_avx2.h"
#include "ectcq.h"

namespace ectcq {

namespace {

// Values by index: from memory, or, as gathers are slow, from registers of eight.
template <int kRegisters>
inline __m256 values_at(const float* values, __m256i index) {
  if constexpr (kRegisters == 0) {
    return _mm256_i32gather_ps(values, index, 4);
  } else {
    __m256 found[kRegisters];
#pragma GCC unroll 8
    for (int k = 0; k < kRegisters; ++k) {
      found[k] = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values + 8 * k), index);
    }
    // A bit of the index above those of the permutation, moved to the sign, chooses.
#pragma GCC unroll 3
    for (int half = kRegisters / 2, shift = 31 - 3; half; half /= 2, --shift) {
      const __m256 odd = _mm256_castsi256_ps(_mm256_slli_epi32(index, shift));
#pragma GCC unroll 4
      for (int k = 0; k < half; ++k) {
        found[k] = _mm256_blendv_ps(found[2 * k], found[2 * k + 1], odd);
      }
    }
    return found[0];
  }
}

// A gather, by single loads: a Zen 5 takes 4 % less time for a weight than with its instruction.
inline __m256i entries_at(const int* slots, __m256i slot) {
  const auto entry = [slots](uint64_t two, int which) {
    return slots[static_cast<uint32_t>(two >> 32 * which)];
  };
  const auto half = [entry](uint64_t first, uint64_t second) {
    __m128i four = _mm_cvtsi32_si128(entry(first, 0));
    four = _mm_insert_epi32(four, entry(first, 1), 1);
    four = _mm_insert_epi32(four, entry(second, 0), 2);
    return _mm_insert_epi32(four, entry(second, 1), 3);
  };
  const auto high = half(static_cast<uint64_t>(_mm256_extract_epi64(slot, 2)),
                         static_cast<uint64_t>(_mm256_extract_epi64(slot, 3)));
  const auto low = half(static_cast<uint64_t>(_mm256_extract_epi64(slot, 0)),
                        static_cast<uint64_t>(_mm256_extract_epi64(slot, 1)));
  return _mm256_set_m128i(high, low);
}

template <bool kRead, int kRegisters>
size_t steps(const Tables& tables, Lanes& lanes, const uint8_t** words, const uint8_t* end,
             size_t count, float* out) {
  const uint8_t* p = *words;
  const __m256i slot_mask = _mm256_set1_epi32(kSlots - 1);
  const __m256i one = _mm256_set1_epi32(1);
  const __m256i zero = _mm256_setzero_si256();
  const __m256i feedback = _mm256_set1_epi32(static_cast<int>(tables.feedback));
  const __m256i input = _mm256_set1_epi32(static_cast<int>(tables.input));
  const int* slots = reinterpret_cast<const int*>(tables.slots);
  __m256i x[4], trellis[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    x[r] = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes.x + 8 * r));
    trellis[r] = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes.trellis + 8 * r));
  }
  size_t done = 0;
  for (; done < count; ++done) {
    // Each register takes at most 8 words, and loads 8 whether it takes them or not.
    if (kRead && static_cast<size_t>(end - p) < 2 * kLanes) break;
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const __m256i q = _mm256_and_si256(trellis[r], one);
      const __m256i slot = _mm256_or_si256(_mm256_and_si256(x[r], slot_mask),
                                           _mm256_slli_epi32(q, kProbabilityBits));
      const __m256i entry =
          kRegisters ? entries_at(slots, slot) : _mm256_i32gather_epi32(slots, slot, 4);
      const __m256i symbol = _mm256_srli_epi32(entry, 24);
      const __m256i value_index =
          kRegisters ? symbol : _mm256_or_si256(symbol, _mm256_slli_epi32(q, 8));
      _mm256_storeu_ps(out + done * kLanes + 8 * r,
                       values_at<kRegisters>(tables.values, value_index));
      const __m256i parity = _mm256_and_si256(symbol, one);
      trellis[r] = _mm256_xor_si256(
          _mm256_srli_epi32(trellis[r], 1),
          _mm256_xor_si256(_mm256_and_si256(_mm256_sub_epi32(zero, q), feedback),
                           _mm256_and_si256(_mm256_sub_epi32(zero, parity), input)));
      x[r] = next_states<kRead>(x[r], entry, &p);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes.x + 8 * r), x[r]);
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes.trellis + 8 * r), trellis[r]);
  }
  *words = p;
  return done;
}

}  // namespace

size_t steps_avx2(const Tables& tables, Lanes& lanes, const uint8_t** words, const uint8_t* end,
                  size_t count, bool read, float* out) {
  return read ? steps<true, 0>(tables, lanes, words, end, count, out)
              : steps<false, 0>(tables, lanes, words, end, count, out);
}

StepsFunction few_values_avx2(size_t values) {
  const auto of = [](auto registers) -> StepsFunction {
    return [](const Tables& tables, Lanes& lanes, const uint8_t** words, const uint8_t* end,
              size_t count, bool read, float* out) {
      constexpr int kRegisters = decltype(registers)::value;
      return read ? steps<true, kRegisters>(tables, lanes, words, end, count, out)
                  : steps<false, kRegisters>(tables, lanes, words, end, count, out);
    };
  };
  if (values <= 16) return of(std::integral_constant<int, 2>{});
  if (values <= 32) return of(std::integral_constant<int, 4>{});
  if (values <= 64) return of(std::integral_constant<int, 8>{});
  return nullptr;
}

}  // namespace ectcq
