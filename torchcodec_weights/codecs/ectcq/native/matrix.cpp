// Whole matrices: tiles checked, decoded, scaled, their outliers put in place; in several threads.
// The container's layout is specified in docs/bitstream.md; its header is read in Python.

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#if defined(ECTCQ_X86)
#include <immintrin.h>
#endif

#include "stream.h"
#include "threads.h"

namespace ectcq {

enum Type : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

// A container with its header read, as Python lays it out.
struct Matrix {
  const uint8_t* data;
  size_t size;
  size_t tiles;
  const uint64_t* offsets;        // of the payloads
  const uint32_t* payload_sizes;  // in bytes; the outlier section follows
  const uint32_t* outlier_sizes;
  const uint32_t* crcs;  // CRC-32C over both
  size_t rows;
  size_t cols;
  const float* row_scale;  // [i · row_stride], strides 0 or 1
  size_t row_stride;
  const float* col_scale;
  size_t col_stride;
  const float* zero_point;  // [rows], or null
  int type;                 // of the outliers' values
  size_t first;             // the tiles to work on are `first` to `end` − 1
  size_t end;
};

namespace {

// CRC-32C (RFC 3720, appendix B.4).
uint32_t crc32c_table(const uint8_t* p, size_t size) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> t{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int k = 0; k < 8; ++k) c = (c >> 1) ^ (c & 1 ? 0x82F63B78u : 0);
      t[i] = c;
    }
    return t;
  }();
  uint32_t crc = ~0u;
  for (; size; --size) crc = (crc >> 8) ^ table[(crc ^ *p++) & 255];
  return ~crc;
}

#if defined(ECTCQ_X86)
__attribute__((target("sse4.2"))) uint32_t crc32c_sse42(const uint8_t* p, size_t size) {
  uint64_t crc = ~0u;
  for (; size >= 8; size -= 8, p += 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    crc = _mm_crc32_u64(crc, word);
  }
  uint32_t rest = static_cast<uint32_t>(crc);
  for (; size; --size) rest = _mm_crc32_u8(rest, *p++);
  return ~rest;
}
#endif

uint32_t crc32c(const uint8_t* p, size_t size) {
#if defined(ECTCQ_X86)
  if (__builtin_cpu_supports("sse4.2")) return crc32c_sse42(p, size);
#endif
  return crc32c_table(p, size);
}

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

// Round to nearest, ties to even (IEEE 754).
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

// Call put(position, value) for each outlier of a section.
template <typename Put>
int for_outliers(const uint8_t* section, size_t size, int type, size_t weights, Put put) {
  if (size == 0) return kOk;
  if (size < 4) return kBadOutliers;
  uint32_t words;
  std::memcpy(&words, section, 4);
  if ((size - 4) / 2 < words) return kBadOutliers;
  const size_t width = type == kFloat32 ? 4 : 2;
  const uint8_t* values = section + 4 + 2 * static_cast<size_t>(words);
  const uint8_t* end = section + size;
  uint64_t position = 0;
  for (uint32_t i = 0; i < words; ++i) {
    uint16_t word;
    std::memcpy(&word, section + 4 + 2 * static_cast<size_t>(i), 2);
    position += word;
    if (word == 0xFFFF) continue;
    if (position >= weights || static_cast<size_t>(end - values) < width) return kBadOutliers;
    put(static_cast<size_t>(position), stored_value(values, type));
    values += width;
    ++position;
  }
  return values == end ? kOk : kBadOutliers;
}

void scale_rows(const Matrix& m, size_t first, size_t last, float* z) {
  for (size_t i = first; i < last; ++i, z += m.cols) {
    const float scale = m.row_scale[i * m.row_stride];
    if (m.col_stride) {
      for (size_t j = 0; j < m.cols; ++j) z[j] = z[j] * scale * m.col_scale[j];
    } else {
      for (size_t j = 0; j < m.cols; ++j) z[j] = z[j] * scale * m.col_scale[0];
    }
    if (m.zero_point) {
      for (size_t j = 0; j < m.cols; ++j) z[j] += m.zero_point[i];
    }
  }
}

void narrow(const float* z, size_t count, int type, uint16_t* out) {
  if (type == kBfloat16) {
    for (size_t i = 0; i < count; ++i) out[i] = float_to_bfloat16(z[i]);
  } else {
    for (size_t i = 0; i < count; ++i) out[i] = float_to_half(z[i]);
  }
}

#if defined(ECTCQ_X86)
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
  narrow(z + i, count - i, type, out + i);
}

__attribute__((target("avx2,fma"))) float dot_avx2(const float* a, const float* b, size_t n) {
  __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(),
                    _mm256_setzero_ps()};
  size_t i = 0;
  for (; i + 32 <= n; i += 32) {
    for (int k = 0; k < 4; ++k) {
      sums[k] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8 * k), _mm256_loadu_ps(b + i + 8 * k),
                                sums[k]);
    }
  }
  float lanes[8];
  _mm256_storeu_ps(lanes, _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]),
                                        _mm256_add_ps(sums[2], sums[3])));
  float sum = 0;
  for (; i < n; ++i) sum += a[i] * b[i];
  for (const float lane : lanes) sum += lane;
  return sum;
}
#endif

float dot(const float* a, const float* b, size_t n) {
  float sums[16] = {};
  size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (size_t k = 0; k < 16; ++k) sums[k] += a[i + k] * b[i + k];
  }
  float sum = 0;
  for (; i < n; ++i) sum += a[i] * b[i];
  for (const float lane : sums) sum += lane;
  return sum;
}

// Check tile `i` and decode it into `z`, not scaled.
int decode_tile(const Matrix& m, const Tables& tables, int level, size_t i, float* z) {
  const uint64_t offset = m.offsets[i];
  const uint64_t stored = static_cast<uint64_t>(m.payload_sizes[i]) + m.outlier_sizes[i];
  if (offset > m.size || stored > m.size - offset) return kTooShort;
  const uint8_t* payload = m.data + offset;
  if (crc32c(payload, stored) != m.crcs[i]) return kBadChecksum;
  const size_t first = i * m.rows / m.tiles, last = (i + 1) * m.rows / m.tiles;
  return decode_stream(tables, level, payload, m.payload_sizes[i], (last - first) * m.cols, z);
}

// Room for a tile, kept from call to call: fresh memory costs as much as decoding into it.
float* tile_buffer(size_t count) {
  thread_local std::unique_ptr<float[]> buffer;
  thread_local size_t size = 0;
  if (size < count) {
    size = 0;
    buffer.reset(new (std::nothrow) float[count]);
    if (buffer) size = count;
  }
  return buffer.get();
}

// Call work(tile, buffer of a tile's size) for the tiles asked for; the first status that is not kOk ends it.
template <typename Work>
int for_tiles(const Matrix& m, int threads, size_t* failed, Work work) {
  const size_t largest = (m.rows + m.tiles - 1) / m.tiles * m.cols;
  std::atomic<size_t> next{m.first};
  std::atomic<int> status{kOk};
  std::atomic<size_t> where{0};
  in_threads(std::min(static_cast<size_t>(std::max(threads, 1)), m.end - m.first), [&] {
    float* buffer = tile_buffer(largest);
    for (size_t i; status == kOk && (i = next++) < m.end;) {
      const int result = buffer ? work(i, buffer) : kNoMemory;
      if (result != kOk) {
        where = i;
        status = result;
      }
    }
  });
  *failed = where;
  return status;
}

}  // namespace
}  // namespace ectcq

#pragma GCC visibility push(default)
extern "C" {

using namespace ectcq;

// Decode the rows of the tiles asked for into `out`, of `type`. On failure `*failed` is the tile.
int ectcq_decode_matrix(int level, const Tables* tables, const Matrix* matrix, int type, void* out,
                        int threads, size_t* failed) {
  const Matrix& m = *matrix;
#if defined(ECTCQ_X86)
  const auto narrower = level >= kAvx2 ? narrow_avx2 : narrow;
#else
  const auto narrower = narrow;
#endif
  return for_tiles(m, threads, failed, [&](size_t i, float* buffer) {
    const size_t first = i * m.rows / m.tiles, last = (i + 1) * m.rows / m.tiles;
    const size_t count = (last - first) * m.cols;
    const size_t start = (first - m.first * m.rows / m.tiles) * m.cols;
    const bool wide = type == kFloat32;
    float* z = wide ? static_cast<float*>(out) + start : buffer;
    const int status = decode_tile(m, *tables, level, i, z);
    if (status != kOk) return status;
    scale_rows(m, first, last, z);
    const int outliers = for_outliers(
        m.data + m.offsets[i] + m.payload_sizes[i], m.outlier_sizes[i], m.type, count,
        [&](size_t position, float value) { z[position] = value; });
    if (outliers != kOk) return outliers;
    if (!wide) narrower(z, count, type, static_cast<uint16_t*>(out) + start);
    return static_cast<int>(kOk);
  });
}

// y[t · rows + i] = Σ_j W[i][j] · x[t · cols + j], where `scaled` is x with each column multiplied by
// its scale, and without the zero point. No more of W is stored than a tile for each thread.
int ectcq_multiply_matrix(int level, const Tables* tables, const Matrix* matrix,
                          const float* scaled, size_t tokens, float* y, int threads,
                          size_t* failed) {
  const Matrix& m = *matrix;
#if defined(ECTCQ_X86)
  const auto product = level >= kAvx2 ? dot_avx2 : dot;
#else
  const auto product = dot;
#endif
  return for_tiles(m, threads, failed, [&](size_t i, float* z) {
    const int status = decode_tile(m, *tables, level, i, z);
    if (status != kOk) return status;
    const size_t first = i * m.rows / m.tiles, last = (i + 1) * m.rows / m.tiles;
    const int outliers = for_outliers(
        m.data + m.offsets[i] + m.payload_sizes[i], m.outlier_sizes[i], m.type,
        (last - first) * m.cols, [&](size_t position, float value) {
          const size_t row = first + position / m.cols;
          const float scale = m.row_scale[row * m.row_stride] *
                              m.col_scale[position % m.cols * m.col_stride];
          z[position] = (value - (m.zero_point ? m.zero_point[row] : 0.0f)) / scale;
        });
    if (outliers != kOk) return outliers;
    for (size_t r = first; r < last; ++r, z += m.cols) {
      for (size_t t = 0; t < tokens; ++t) {
        y[t * m.rows + r] =
            m.row_scale[r * m.row_stride] * product(z, scaled + t * m.cols, m.cols);
      }
    }
    return static_cast<int>(kOk);
  });
}

}  // extern "C"
#pragma GCC visibility pop
