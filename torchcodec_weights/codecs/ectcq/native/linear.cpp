// A linear layer in one call: activations of any type in, those of the next layer out. What is around
// the kernel (scales, zero points, bias, types) takes longer than a small layer's kernel otherwise.

#include <algorithm>
#include <cstring>

#include "common/native/buffer.h"
#include "kernels.h"
#include "products.h"

namespace ectcq {
namespace {

// One token's activations to those of all columns of the matrix, times the columns' scales. Returns
// their sum before that if `wants_sum`.
float scale_token(const Linear& layer, const uint8_t* x, int type, bool wants_sum, float* scaled) {
  const MatrixView& m = layer.matrix;
  const size_t width = layer.end_col - layer.first_col;
  std::fill(scaled, scaled + layer.first_col, 0.0f);
  std::fill(scaled + layer.end_col, scaled + m.cols, 0.0f);
  float* own = scaled + layer.first_col;
  if (type == kFloat32) {
    std::memcpy(own, x, width * sizeof(float));
  } else {
    widen(reinterpret_cast<const uint16_t*>(x), width, type, own);
  }
  float sum = 0;
  if (wants_sum) {
    float sums[16] = {};
    size_t j = 0;
    for (; j + 16 <= width; j += 16) {
      for (size_t k = 0; k < 16; ++k) sums[k] += own[j + k];
    }
    for (; j < width; ++j) sum += own[j];
    for (const float part : sums) sum += part;
  }
  if (m.col_stride) {
    const float* columns = m.col_scale + layer.first_col;
    for (size_t j = 0; j < width; ++j) own[j] *= columns[j];
  } else {
    for (size_t j = 0; j < width; ++j) own[j] *= m.col_scale[0];
  }
  return sum;
}

}  // namespace
}  // namespace ectcq

#pragma GCC visibility push(default)
extern "C" {

using namespace ectcq;

size_t ectcq_search_bytes() { return sizeof(SearchTables); }

// Fill in the tables of the search of a stream by rows, at a multiple of 64. False where the level
// has no search, or it has none for these tables.
bool ectcq_fill_search(int level, const Tables* tables, void* search) {
  const Kernels* by = kernels_at(level);
  return by && static_cast<SearchTables*>(search)->fill(*by, *tables);
}

// y = x · Wᵀ + bias for `tokens` rows of x and of y, which have no gaps; x, y and bias are of `type`,
// bias may be null. Sums are of floats. Returns a status, and above its lowest 8 bits the tile.
int64_t ectcq_linear(int level, const Linear* linear, const void* x, int type, size_t tokens,
                     const void* bias, void* y, int threads) {
  const Linear& layer = *linear;
  const MatrixView& m = layer.matrix;
  const size_t width = layer.end_col - layer.first_col, rows = layer.end_row - layer.first_row;
  const size_t item = item_size(type);
  thread_local Buffer buffer;  // not tile_buffer, which this thread decodes into
  float* scaled =
      reinterpret_cast<float*>(buffer.reserve(tokens * (m.cols + m.rows + 1) * sizeof(float)));
  if (!scaled) return kNoMemory;
  float* products = scaled + tokens * m.cols;
  float* sums = products + tokens * m.rows;
  for (size_t t = 0; t < tokens; ++t) {
    const uint8_t* own = static_cast<const uint8_t*>(x) + t * width * item;
    sums[t] = scale_token(layer, own, type, m.zero_point != nullptr, scaled + t * m.cols);
  }
  size_t failed = 0;
  const Corrections corrections = {static_cast<const Correction*>(layer.corrections),
                                   layer.correction_begins};
  const int status =
      layer.tables
          ? multiply_rows(level, *layer.tables, static_cast<const SearchTables*>(layer.search),
                          {static_cast<const Mark*>(layer.marks), layer.parts}, corrections, m,
                          scaled, tokens, products, threads, &failed)
          : multiply_columns(level, layer.classes, layer.class_count, layer.states, layer.of_group,
                             corrections, m, scaled, tokens, products, threads, &failed);
  if (status != kOk) return status | static_cast<int64_t>(failed) << 8;
  for (size_t t = 0; t < tokens; ++t) {
    float* own = products + t * m.rows + layer.first_row;
    if (m.zero_point) {
      const float* zero = m.zero_point + layer.first_row;
      for (size_t i = 0; i < rows; ++i) own[i] += sums[t] * zero[i];
    }
    if (bias && type == kFloat32) {
      const float* added = static_cast<const float*>(bias);
      for (size_t i = 0; i < rows; ++i) own[i] += added[i];
    } else if (bias) {
      const uint8_t* added = static_cast<const uint8_t*>(bias);
      for (size_t i = 0; i < rows; ++i) own[i] += stored_value(added + i * item, type);
    }
    uint8_t* to = static_cast<uint8_t*>(y) + t * rows * item;
    if (type == kFloat32) {
      std::memcpy(to, own, rows * sizeof(float));
    } else {
      narrow(level, own, rows, type, reinterpret_cast<uint16_t*>(to));
    }
  }
  return kOk;
}

}  // extern "C"
#pragma GCC visibility pop
