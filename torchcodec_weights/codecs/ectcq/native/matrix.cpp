// Whole matrices of ECTCQ: decoded and scaled, or multiplied by.

#if defined(CODECS_X86)
#include <immintrin.h>
#endif

#include "common/native/matrix.h"
#include "stream.h"

namespace ectcq {
namespace {

void scale_rows(const MatrixView& m, size_t first, size_t last, float* z) {
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

#if defined(CODECS_X86)
__attribute__((target("avx2,fma"))) float dot_avx2(const float* a, const float* b, size_t n) {
  __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(),
                    _mm256_setzero_ps()};
  size_t i = 0;
  for (; i + 32 <= n; i += 32) {
    for (int k = 0; k < 4; ++k) {
      sums[k] =
          _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8 * k), _mm256_loadu_ps(b + i + 8 * k), sums[k]);
    }
  }
  float lanes[8];
  _mm256_storeu_ps(lanes,
                   _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
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
int decode_tile(const MatrixView& m, const Tables& tables, int level, size_t i, float* z) {
  const int status = check_tile(m, i);
  if (status != kOk) return status;
  return decode_stream(tables, level, m.payload(i), m.payload_sizes[i], m.weights(i), z);
}

}  // namespace
}  // namespace ectcq

#pragma GCC visibility push(default)
extern "C" {

using namespace ectcq;

// Decode the rows of tiles `first` to `end` − 1 of the matrix into `out`, of `type`. On failure
// `*failed` is the tile.
int ectcq_decode_matrix(int level, const Tables* tables, const MatrixView* matrix, int type,
                        void* out, int threads, size_t* failed) {
  const MatrixView& m = *matrix;
  *failed = m.first;
  const int sizes = check_sizes(m);
  if (sizes != kOk) return sizes;
  const size_t bytes = largest_tile(m) * sizeof(float);
  return for_tiles(m, threads, bytes, failed, [&](size_t i, uint8_t* buffer) {
    const size_t count = m.weights(i);
    const bool wide = type == kFloat32;
    float* z = wide ? static_cast<float*>(out) + m.place(i) : reinterpret_cast<float*>(buffer);
    const int status = decode_tile(m, *tables, level, i, z);
    if (status != kOk) return status;
    scale_rows(m, m.first_row(i), m.first_row(i + 1), z);
    const int outliers = for_outliers(
        m.payload(i) + m.payload_sizes[i], m.outlier_sizes[i], m.type, count,
        [&](size_t position, const uint8_t* value) { z[position] = stored_value(value, m.type); });
    if (outliers != kOk) return outliers;
    if (!wide) narrow(level, z, count, type, static_cast<uint16_t*>(out) + m.place(i));
    return static_cast<int>(kOk);
  });
}

// y[t · rows + i] = Σ_j W[i][j] · x[t · cols + j], where `scaled` is x with each column multiplied by
// its scale, and without the zero point. No more of W is stored than a tile for each thread.
int ectcq_multiply_matrix(int level, const Tables* tables, const MatrixView* matrix,
                          const float* scaled, size_t tokens, float* y, int threads,
                          size_t* failed) {
  const MatrixView& m = *matrix;
  *failed = m.first;
  const int sizes = check_sizes(m);
  if (sizes != kOk) return sizes;
#if defined(CODECS_X86)
  const auto product = level >= kAvx2 ? dot_avx2 : dot;
#else
  const auto product = dot;
#endif
  const size_t bytes = largest_tile(m) * sizeof(float);
  return for_tiles(m, threads, bytes, failed, [&](size_t i, uint8_t* buffer) {
    float* z = reinterpret_cast<float*>(buffer);
    const int status = decode_tile(m, *tables, level, i, z);
    if (status != kOk) return status;
    const size_t first = m.first_row(i), last = m.first_row(i + 1);
    const int outliers =
        for_outliers(m.payload(i) + m.payload_sizes[i], m.outlier_sizes[i], m.type, m.weights(i),
                     [&](size_t position, const uint8_t* value) {
                       const size_t row = first + position / m.cols;
                       const float scale = m.row_scale[row * m.row_stride] *
                                           m.col_scale[position % m.cols * m.col_stride];
                       const float offset = m.zero_point ? m.zero_point[row] : 0.0f;
                       z[position] = (stored_value(value, m.type) - offset) / scale;
                     });
    if (outliers != kOk) return outliers;
    for (size_t r = first; r < last; ++r, z += m.cols) {
      for (size_t t = 0; t < tokens; ++t) {
        y[t * m.rows + r] = m.row_scale[r * m.row_stride] * product(z, scaled + t * m.cols, m.cols);
      }
    }
    return static_cast<int>(kOk);
  });
}

}  // extern "C"
#pragma GCC visibility pop
