#include "floats.h"

#include <cstring>

#if defined(CODECS_X86)
#include <immintrin.h>
#endif

#include "level.h"

namespace codecs {
namespace {

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7FFF;
  if (rest >= 0x7C00) return from_bits(sign | 0x7F800000u | (rest & 0x3FF) << 13);
  if (rest >= 0x0400) return from_bits(sign | ((rest << 13) + (112u << 23)));
  const float small = static_cast<float>(rest) * 0x1p-24f;
  return sign ? -small : small;
}

uint16_t float_to_half(float value) {
  const uint32_t bits = to_bits(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t rest = bits & 0x7FFFFFFF;
  if (rest > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (rest >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);
  if (rest < 0x38800000) {
    // Adding 0.5 leaves a subnormal half in the low bits, rounded by the adder.
    const float aligned = from_bits(rest) + 0.5f;
    return static_cast<uint16_t>(sign | (to_bits(aligned) - 0x3F000000));
  }
  return static_cast<uint16_t>(sign | ((rest - (112u << 23) + 0xFFF + (rest >> 13 & 1)) >> 13));
}

uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

void narrow_plain(const float* z, size_t count, int type, uint16_t* out) {
  if (type == kBfloat16) {
    for (size_t i = 0; i < count; ++i) out[i] = float_to_bfloat16(z[i]);
  } else {
    for (size_t i = 0; i < count; ++i) out[i] = float_to_half(z[i]);
  }
}

#if defined(CODECS_X86)
__attribute__((target("avx2,f16c"))) void narrow_avx2(const float* z, size_t count, int type,
                                                      uint16_t* out) {
  size_t i = 0;
  if (type == kFloat16) {
    for (; i + 8 <= count; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(z + i), _MM_FROUND_TO_NEAREST_INT));
    }
  } else {
    // Weights are finite, so the general case's care for NaN is left out.
    const __m256i half = _mm256_set1_epi32(0x7FFF), one = _mm256_set1_epi32(1);
    for (; i + 16 <= count; i += 16) {
      __m256i word[2];
      for (int k = 0; k < 2; ++k) {
        const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(z + i + 8 * k));
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
        word[k] = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, half), odd), 16);
      }
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(word[0], word[1]), 0xD8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), packed);
    }
  }
  narrow_plain(z + i, count - i, type, out + i);
}
#endif

}  // namespace

float stored_value(const uint8_t* p, int type) {
  if (type == kFloat32) {
    uint32_t bits;
    std::memcpy(&bits, p, 4);
    return from_bits(bits);
  }
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return type == kFloat16 ? half_to_float(bits) : from_bits(static_cast<uint32_t>(bits) << 16);
}

void narrow(int level, const float* z, size_t count, int type, uint16_t* out) {
#if defined(CODECS_X86)
  if (level >= kAvx2) return narrow_avx2(z, count, type, out);
#endif
  (void)level;
  narrow_plain(z, count, type, out);
}

void widen(const uint16_t* in, size_t count, int type, float* out) {
  if (type == kBfloat16) {
    for (size_t i = 0; i < count; ++i) out[i] = from_bits(static_cast<uint32_t>(in[i]) << 16);
  } else {
    for (size_t i = 0; i < count; ++i) out[i] = half_to_float(in[i]);
  }
}

}  // namespace codecs
