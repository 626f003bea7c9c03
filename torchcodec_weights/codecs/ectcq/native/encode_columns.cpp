// The encoder of streams by columns: a trellis search for each column, and the error of each carried
// into those that follow (GPTQ, Frantar et al., arXiv 2210.17323).

#if defined(CODECS_X86)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <vector>

#include "columns.h"
#include "common/native/encode_stream.h"
#include "encode.h"

namespace ectcq {
namespace {

// Columns lie one after the other, padded with zeros to whole strips of rows.
constexpr size_t kStrip = 16;

// Columns whose errors are carried into all later ones together. Their errors stay in the cache.
constexpr size_t kBlock = 32;

// Columns that are corrected together: their factors stay in the cache.
constexpr size_t kPanel = 64;

// Subtract the errors of `count` columns, [count][height], from `width` columns: column k gets
// −Σ_b factors[k][b] · errors[b].
using CarryFunction = void (*)(const float* errors, size_t count, size_t height,
                               const float (*factors)[kBlock], float* const* columns, size_t width);

void carry_plain(const float* errors, size_t count, size_t height, const float (*factors)[kBlock],
                 float* const* columns, size_t width) {
  for (size_t k = 0; k < width; ++k) {
    float* z = columns[k];
    for (size_t b = 0; b < count; ++b) {
      const float* e = errors + b * height;
      const float factor = factors[k][b];
      for (size_t r = 0; r < height; ++r) z[r] -= factor * e[r];
    }
  }
}

#if defined(CODECS_X86)
__attribute__((target("avx2,fma"))) void carry_avx2(const float* errors, size_t count,
                                                    size_t height, const float (*factors)[kBlock],
                                                    float* const* columns, size_t width) {
  size_t k = 0;
  for (; k + 4 <= width; k += 4) {
    for (size_t r = 0; r < height; r += kStrip) {
      __m256 z[4][2];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        z[c][0] = _mm256_loadu_ps(columns[k + c] + r);
        z[c][1] = _mm256_loadu_ps(columns[k + c] + r + 8);
      }
      for (size_t b = 0; b < count; ++b) {
        const float* e = errors + b * height + r;
        const __m256 e0 = _mm256_loadu_ps(e), e1 = _mm256_loadu_ps(e + 8);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
          const __m256 factor = _mm256_broadcast_ss(&factors[k + c][b]);
          z[c][0] = _mm256_fnmadd_ps(factor, e0, z[c][0]);
          z[c][1] = _mm256_fnmadd_ps(factor, e1, z[c][1]);
        }
      }
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        _mm256_storeu_ps(columns[k + c] + r, z[c][0]);
        _mm256_storeu_ps(columns[k + c] + r + 8, z[c][1]);
      }
    }
  }
  carry_plain(errors, count, height, factors + k, columns + k, width - k);
}
#endif

// The weights less the values of their path.
void errors_of(const Model& model, const uint16_t* path, const float* z, size_t rows,
               float* errors) {
  for (size_t r = 0; r < rows; ++r) {
    errors[r] = z[r] - 0.5f * model.line[path[r] >> 8][path[r] & 255][1];
  }
}

// Columns of a tile (rows, cols), row-major, one after the other, each `height` long.
void transpose(const float* z, size_t rows, size_t cols, size_t height, float* columns) {
  std::fill_n(columns, cols * height, 0.0f);
  for (size_t first = 0; first < cols; first += kLanes) {
    const size_t last = std::min(cols, first + kLanes);
    for (size_t r = 0; r < rows; ++r) {
      for (size_t j = first; j < last; ++j) columns[j * height + r] = z[r * cols + j];
    }
  }
}

}  // namespace
}  // namespace ectcq

#pragma GCC visibility push(default)
extern "C" {

using namespace ectcq;

// Rows of the columns that ectcq_search_columns writes: `rows`, padded.
size_t ectcq_column_height(size_t rows) { return (rows + kStrip - 1) / kStrip * kStrip; }

// Search the path of each column of a tile, z (rows, cols), row-major, in the coded order. Columns
// are taken in the order `order`, [cols], and the error of each, times factors[column][k], (cols,
// cols), is subtracted from each later column k; without `factors`, null, columns are independent.
// Writes, column by column, [cols][height]: to `weights` what was searched, and to `path` symbol |
// quantizer << 8 of the first `rows` of each. Returns false, and writes nothing, where there is no
// trellis of a model's number of states.
bool ectcq_search_columns(int level, const Model* models, const uint8_t* of_group, const float* z,
                          size_t rows, size_t cols, const float* factors, const uint32_t* order,
                          float* weights, uint16_t* path) {
#if defined(CODECS_X86)
  const CarryFunction carry = level >= kAvx2 ? carry_avx2 : carry_plain;
#else
  const CarryFunction carry = carry_plain;
#endif
  int32_t states = 0;
  for (size_t g = 0; g < groups_of(cols); ++g) {
    const int32_t of_model = models[of_group[g]].states;
    if (!search_function(level, of_model)) return false;
    states = std::max(states, of_model);
  }
  const size_t height = ectcq_column_height(rows);
  transpose(z, rows, cols, height, weights);
  std::vector<uint8_t> decisions(rows * static_cast<size_t>(states));
  std::vector<float> errors(kBlock * height, 0.0f);
  for (size_t begin = 0; begin < cols; begin += kBlock) {
    const size_t end = std::min(cols, begin + kBlock);
    for (size_t i = begin; i < end; ++i) {
      const size_t j = factors ? order[i] : i;
      const Model& model = models[of_group[j / kLanes]];
      float* column = weights + j * height;
      uint16_t* steps = path + j * height;
      search_function(level, model.states)(model, column, 1, rows, decisions.data(), steps);
      if (!factors) continue;
      errors_of(model, steps, column, rows, errors.data() + (i - begin) * height);
      // The rest of the block is searched next, so it is corrected at once.
      float factor[kBlock][kBlock];
      float* later[kBlock];
      for (size_t k = i + 1; k < end; ++k) {
        factor[k - i - 1][0] = factors[j * cols + order[k]];
        later[k - i - 1] = weights + order[k] * height;
      }
      carry(errors.data() + (i - begin) * height, 1, height, factor, later, end - i - 1);
    }
    if (!factors) continue;
    for (size_t first = end; first < cols; first += kPanel) {
      const size_t width = std::min(cols - first, kPanel);
      float panel[kPanel][kBlock];
      float* later[kPanel];
      for (size_t b = 0; b < end - begin; ++b) {
        const float* row = factors + order[begin + b] * cols;
        for (size_t k = 0; k < width; ++k) panel[k][b] = row[order[first + k]];
      }
      for (size_t k = 0; k < width; ++k) later[k] = weights + order[first + k] * height;
      carry(errors.data(), end - begin, height, panel, later, width);
    }
  }
  return true;
}

// Bytes that a payload of rows · cols weights can take at most.
size_t ectcq_columns_bound(size_t rows, size_t cols) {
  return stream_bound(groups_of(cols) * kLanes * rows);
}

// Write the payload of paths that ectcq_search_columns found; returns its size in bytes.
size_t ectcq_write_columns(const Model* models, const uint8_t* of_group, const uint16_t* path,
                           size_t rows, size_t cols, uint8_t* payload) {
  const size_t height = ectcq_column_height(rows);
  size_t group = groups_of(cols), row = 0;
  return encode_lanes(groups_of(cols) * rows, payload, [&](size_t t, size_t l) {
    // Steps come in runs, and a division for each weight would take longer than all else here.
    if (group * rows + row != t) group = t / rows, row = t % rows;
    const size_t column = group * kLanes + l;
    // Columns that are thrown away get level 0 in state 0, again and again.
    const uint16_t step = column < cols ? path[column * height + row] : kSymbols / 2;
    const Model& model = models[of_group[group]];
    return Range{model.frequency[step >> 8][step & 255], model.start[step >> 8][step & 255]};
  });
}

}  // extern "C"
#pragma GCC visibility pop
