// Matrices of int8 levels: multiplied by, or decoded row by row, in several threads.

#include "int8.h"

#include <algorithm>
#include <atomic>

#include "buffer.h"
#include "floats.h"
#include "level.h"
#include "matrix.h"
#include "threads.h"

namespace codecs {
namespace {

const Int8Kernels& kernels(int level) {
#if defined(CODECS_X86)
  if (level >= kAvx512) return kInt8Avx512;
  if (level >= kAvx2) return kInt8Avx2;
#endif
  (void)level;
  return kInt8Baseline;
}

// Products that a thread computes at least, as waking it takes microseconds.
constexpr size_t kLeast = size_t{1} << 16;
// Levels that a thread takes at a time; they stay in its first cache for all tokens.
constexpr size_t kPart = size_t{1} << 14;
// Rows of a part are a multiple of this where there are as many.
constexpr size_t kRowStep = 8;

// Call work(first, end, buffer of `bytes` bytes for each row) for parts of `rows` rows of `cols`
// weights, each of which takes `times` operations.
template <typename Work>
int for_parts(size_t rows, size_t cols, size_t times, int threads, size_t bytes, Work work) {
  const size_t wanted = std::max<size_t>(1, kPart / std::max<size_t>(1, cols));
  const size_t step = (wanted + kRowStep - 1) / kRowStep * kRowStep;
  const size_t parts = (rows + step - 1) / step;
  const size_t useful = std::max<size_t>(1, rows * cols * times / kLeast);
  const size_t most = std::min({static_cast<size_t>(std::max(threads, 1)), parts, useful});
  std::atomic<size_t> next{0};
  std::atomic<int> status{kOk};
  in_threads(most, [&] {
    uint8_t* buffer = tile_buffer(std::min(step, rows) * bytes);
    if (!buffer) status = kNoMemory;
    for (size_t part; status == kOk && (part = next++) < parts;) {
      work(part * step, std::min(part * step + step, rows), buffer);
    }
  });
  return status;
}

}  // namespace
}  // namespace codecs

#pragma GCC visibility push(default)
extern "C" {

using namespace codecs;

// y[t · rows + i] = Σ_j W[i][j] · x[t · cols + j] + bias[i]; x, bias (or null) and y are of `type`.
int codecs_int8_multiply(int level, const Int8Matrix* matrix, const void* x, int type,
                         size_t tokens, const void* bias, void* y, int threads) {
  const Int8Matrix& m = *matrix;
  const Int8Kernels& use = kernels(level);
  const size_t padded = (m.cols + kInt8Padding - 1) / kInt8Padding * kInt8Padding;
  thread_local Buffer buffer_of_x;  // not tile_buffer, which this thread takes too
  float* const v =
      reinterpret_cast<float*>(buffer_of_x.reserve(tokens * (padded + 1) * sizeof(float)));
  if (!v) return kNoMemory;
  float* const sum = v + tokens * padded;
  for (size_t t = 0; t < tokens; ++t) {
    const uint8_t* from = static_cast<const uint8_t*>(x) + t * m.cols * item_size(type);
    sum[t] = use.prepare(from, type, m.col_scale, m.cols, padded, v + t * padded);
  }
  return for_parts(
      m.rows, m.cols, tokens, threads, tokens * sizeof(float),
      [&](size_t first, size_t end, uint8_t* buffer) {
        const size_t rows = end - first;
        float* products = reinterpret_cast<float*>(buffer);
        use.multiply(m.levels + first * m.stride, m.stride, rows, v, tokens, padded, products);
        for (size_t r = 0; r < rows; ++r) {
          const size_t i = first + r;
          const float scale = m.row_scale[i];
          const float zero_point = m.zero_point ? m.zero_point[i] : 0.0f;
          const float added =
              bias ? stored_value(static_cast<const uint8_t*>(bias) + i * item_size(type), type)
                   : 0.0f;
          for (size_t t = 0; t < tokens; ++t) {
            float& product = products[t * rows + r];
            for (uint32_t k = m.exact_starts[i]; k < m.exact_starts[i + 1]; ++k) {
              const size_t j = m.exact_columns[k] - m.first_col;  // wraps where it is left of it
              if (j < m.cols) product += m.exact_values[k] * v[t * padded + j];
            }
            product *= scale;
            if (m.zero_point) product += zero_point * sum[t];
            product += added;
          }
        }
        for (size_t t = 0; t < tokens; ++t) {
          const float* from = products + t * rows;
          const size_t place = t * m.rows + first;
          if (type == kFloat32) {
            std::copy(from, from + rows, static_cast<float*>(y) + place);
          } else {
            narrow(level, from, rows, type, static_cast<uint16_t*>(y) + place);
          }
        }
      });
}

// Rows of W of `type`: row indices[k] is row k of `out`, or row k where `indices` is null.
int codecs_int8_rows(int level, const Int8Matrix* matrix, const int64_t* indices, size_t count,
                     int type, void* out, int threads) {
  const Int8Matrix& m = *matrix;
  const Int8Kernels& use = kernels(level);
  return for_parts(count, m.cols, 1, threads, m.cols * sizeof(float),
                   [&](size_t first, size_t end, uint8_t* buffer) {
                     for (size_t k = first; k < end; ++k) {
                       const size_t i = indices ? static_cast<size_t>(indices[k]) : k;
                       float* z = type == kFloat32 ? static_cast<float*>(out) + k * m.cols
                                                   : reinterpret_cast<float*>(buffer);
                       const float scale = m.row_scale[i];
                       const float zero_point = m.zero_point ? m.zero_point[i] : 0.0f;
                       use.decode(m.levels + i * m.stride, m.cols, scale, m.col_scale, zero_point,
                                  z);
                       for (uint32_t e = m.exact_starts[i]; e < m.exact_starts[i + 1]; ++e) {
                         const size_t j = m.exact_columns[e] - m.first_col;
                         if (j < m.cols)
                           z[j] += m.exact_values[e] * scale * (m.col_scale ? m.col_scale[j] : 1);
                       }
                       if (type != kFloat32) {
                         narrow(level, z, m.cols, type, static_cast<uint16_t*>(out) + k * m.cols);
                       }
                     }
                   });
}

}  // extern "C"
#pragma GCC visibility pop
