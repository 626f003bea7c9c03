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
constexpr size_t kStrip = 32;

// Columns whose errors are carried into all later ones together: those that follow are read and
// written from outside the caches once for so many.
constexpr size_t kBlock = 128;

// Columns of a block whose errors are carried into the rest of it together.
constexpr size_t kPart = 16;

// Columns that are corrected together. Their factors stay in the first-level cache.
constexpr size_t kPanel = 24;

// Subtract the errors of `count` columns, [strips][kBlock][kStrip], from `width` columns: column k
// gets −Σ_b factors[b · stride + k] · errors[b].
using CarryFunction = void (*)(const float* errors, size_t strips, size_t count,
                               const float* factors, size_t stride, float* const* columns,
                               size_t width);

void carry_plain(const float* errors, size_t strips, size_t count, const float* factors,
                 size_t stride, float* const* columns, size_t width) {
  for (size_t s = 0; s < strips; ++s, errors += kBlock * kStrip) {
    for (size_t k = 0; k < width; ++k) {
      float* z = columns[k] + s * kStrip;
      for (size_t b = 0; b < count; ++b) {
        for (size_t r = 0; r < kStrip; ++r)
          z[r] -= factors[b * stride + k] * errors[b * kStrip + r];
      }
    }
  }
}

#if defined(CODECS_X86)
// kWidth columns and half a strip in registers.
template <int kWidth>
__attribute__((target("avx2,fma"))) void carry_half_avx2(const float* errors, size_t count,
                                                         const float* factors, size_t stride,
                                                         float* const* columns, size_t row) {
  __m256 z[kWidth][2];
#pragma GCC unroll 12
  for (int c = 0; c < kWidth; ++c) {
    z[c][0] = _mm256_loadu_ps(columns[c] + row);
    z[c][1] = _mm256_loadu_ps(columns[c] + row + 8);
  }
  for (size_t b = 0; b < count; ++b, errors += kStrip, factors += stride) {
    const __m256 e0 = _mm256_loadu_ps(errors), e1 = _mm256_loadu_ps(errors + 8);
#pragma GCC unroll 12
    for (int c = 0; c < kWidth; ++c) {
      const __m256 factor = _mm256_broadcast_ss(&factors[c]);
      z[c][0] = _mm256_fnmadd_ps(factor, e0, z[c][0]);
      z[c][1] = _mm256_fnmadd_ps(factor, e1, z[c][1]);
    }
  }
#pragma GCC unroll 12
  for (int c = 0; c < kWidth; ++c) {
    _mm256_storeu_ps(columns[c] + row, z[c][0]);
    _mm256_storeu_ps(columns[c] + row + 8, z[c][1]);
  }
}

void carry_avx2(const float* errors, size_t strips, size_t count, const float* factors,
                size_t stride, float* const* columns, size_t width) {
  for (size_t half = 0; half < 2 * strips; ++half) {
    const float* e = errors + half / 2 * kBlock * kStrip + half % 2 * 16;
    size_t k = 0;
    for (; k + 6 <= width; k += 6) {
      carry_half_avx2<6>(e, count, factors + k, stride, columns + k, 16 * half);
    }
    for (; k < width; ++k)
      carry_half_avx2<1>(e, count, factors + k, stride, columns + k, 16 * half);
  }
}

// kWidth columns and a strip in registers.
template <int kWidth>
__attribute__((target("avx512f"))) void carry_strip_avx512(const float* errors, size_t count,
                                                           const float* factors, size_t stride,
                                                           float* const* columns, size_t row) {
  __m512 z[kWidth][2];
#pragma GCC unroll 12
  for (int c = 0; c < kWidth; ++c) {
    z[c][0] = _mm512_loadu_ps(columns[c] + row);
    z[c][1] = _mm512_loadu_ps(columns[c] + row + 16);
  }
  for (size_t b = 0; b < count; ++b, errors += kStrip, factors += stride) {
    const __m512 e0 = _mm512_loadu_ps(errors), e1 = _mm512_loadu_ps(errors + 16);
#pragma GCC unroll 12
    for (int c = 0; c < kWidth; ++c) {
      const __m512 factor = _mm512_set1_ps(factors[c]);
      z[c][0] = _mm512_fnmadd_ps(factor, e0, z[c][0]);
      z[c][1] = _mm512_fnmadd_ps(factor, e1, z[c][1]);
    }
  }
#pragma GCC unroll 12
  for (int c = 0; c < kWidth; ++c) {
    _mm512_storeu_ps(columns[c] + row, z[c][0]);
    _mm512_storeu_ps(columns[c] + row + 16, z[c][1]);
  }
}

void carry_avx512(const float* errors, size_t strips, size_t count, const float* factors,
                  size_t stride, float* const* columns, size_t width) {
  for (size_t s = 0; s < strips; ++s, errors += kBlock * kStrip) {
    size_t k = 0;
    for (; k + 12 <= width; k += 12) {
      carry_strip_avx512<12>(errors, count, factors + k, stride, columns + k, s * kStrip);
    }
    for (; k < width; ++k) {
      carry_strip_avx512<1>(errors, count, factors + k, stride, columns + k, s * kStrip);
    }
  }
}
#endif

CarryFunction carry_function(int level) {
#if defined(CODECS_X86)
  if (level >= kAvx512) return carry_avx512;
  if (level == kAvx2) return carry_avx2;
#endif
  (void)level;
  return carry_plain;
}

// The errors of a block of columns, and the way of them into later columns.
class Carried {
 public:
  // `order` and `factors` as ectcq_search_columns gets them.
  Carried(int level, size_t height, size_t cols, const float* factors, const uint32_t* order,
          float* weights)
      : carry_(carry_function(level)),
        height_(height),
        cols_(cols),
        factors_(factors),
        order_(order),
        weights_(weights),
        errors_(kBlock * height, 0.0f),
        ordered_(std::min(kBlock, cols) * (cols + 32)) {}

  // Keep the errors of column number `b` of the block: its weights less the values of their path.
  void keep(size_t b, const Model& model, const float* z, const uint16_t* path, size_t rows) {
    for (size_t r = 0; r < rows; ++r) {
      errors_[(r / kStrip * kBlock + b) * kStrip + r % kStrip] =
          z[r] - 0.5f * model.line[path[r] >> 8][path[r] & 255][1];
    }
  }

  // Carry the errors of the columns that are taken from `begin` to `end` − 1, the first of which is
  // number `b` of the block, into those that are taken from `first` to `last` − 1.
  void into(size_t b, size_t begin, size_t end, size_t first, size_t last) {
    // Whole rows of the factors at a time: of a wide matrix they come from memory.
    // They are an odd number of lines of the cache apart, or those of a panel would share few sets.
    const size_t count = last - first, stride = ((count + 15) / 16 | 1) * 16;
    for (size_t i = begin; i < end; ++i) {
      const float* row = factors_ + order_[i] * cols_;
      float* ordered = ordered_.data() + (i - begin) * stride;
      for (size_t k = 0; k < count; ++k) ordered[k] = row[order_[first + k]];
    }
    for (size_t k = 0; k < count; k += kPanel) {
      const size_t width = std::min(count - k, kPanel);
      float* later[kPanel];
      for (size_t c = 0; c < width; ++c) later[c] = weights_ + order_[first + k + c] * height_;
      carry_(errors_.data() + b * kStrip, height_ / kStrip, end - begin, ordered_.data() + k,
             stride, later, width);
    }
  }

 private:
  CarryFunction carry_;
  size_t height_, cols_;
  const float* factors_;
  const uint32_t* order_;
  float* weights_;
  std::vector<float> errors_;
  std::vector<float> ordered_;  // factors of some columns, later columns in their order
};

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

// The best level for ectcq_search_columns.
int ectcq_search_level() { return best_level(); }

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
  int32_t states = 0;
  for (size_t g = 0; g < groups_of(cols); ++g) {
    const int32_t of_model = models[of_group[g]].states;
    if (!search_function(level, of_model)) return false;
    states = std::max(states, of_model);
  }
  const size_t height = ectcq_column_height(rows);
  transpose(z, rows, cols, height, weights);
  std::vector<uint8_t> decisions(rows * static_cast<size_t>(states));
  const auto search_column = [&](size_t j) {
    const Model& model = models[of_group[j / kLanes]];
    search_function(level, model.states)(model, weights + j * height, 1, rows, decisions.data(),
                                         path + j * height);
  };
  if (!factors) {
    for (size_t j = 0; j < cols; ++j) search_column(j);
    return true;
  }
  Carried carried(level, height, cols, factors, order, weights);
  for (size_t block = 0; block < cols; block += kBlock) {
    const size_t end = std::min(cols, block + kBlock);
    for (size_t part = block; part < end; part += kPart) {
      const size_t part_end = std::min(end, part + kPart);
      for (size_t i = part; i < part_end; ++i) {
        const size_t j = order[i];
        search_column(j);
        const Model& model = models[of_group[j / kLanes]];
        carried.keep(i - block, model, weights + j * height, path + j * height, rows);
        carried.into(i - block, i, i + 1, i + 1, part_end);
      }
      carried.into(part - block, part, part_end, part_end, end);
    }
    carried.into(0, block, end, end, cols);
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
