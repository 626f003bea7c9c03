// Matrices of int8 levels: W[i][j] = row_scale[i] · (level[i][j] + exact) · col_scale[j] + zero_point[i],
// where `exact` is what a few levels lack, stored beside them.

#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace codecs {

// Activations are padded with zeros to a multiple of this, and levels are read as far beyond a row.
constexpr size_t kInt8Padding = 16;

struct Int8Kernels {
  // One token's activations of `type`, each times its column's scale where there are scales, as
  // floats padded to `padded`; their sum before scaling is returned.
  float (*prepare)(const void* x, int type, const float* col_scale, size_t cols, size_t padded,
                   float* out);
  // y[t · rows + i] = Σ_j levels[i · stride + j] · x[t · padded + j] for `rows` rows.
  void (*multiply)(const int8_t* levels, size_t stride, size_t rows, const float* x, size_t tokens,
                   size_t padded, float* y);
  // z[j] = levels[j] · scale · col_scale[j] + zero_point for one row; no scales of columns if null.
  void (*decode)(const int8_t* levels, size_t cols, float scale, const float* col_scale,
                 float zero_point, float* z);
};

extern const Int8Kernels kInt8Baseline, kInt8Avx2, kInt8Avx512;

}  // namespace codecs

extern "C" int codecs_int8_multiply(int level, const codecs::Int8Matrix* matrix, const void* x,
                                    int type, size_t tokens, const void* bias, void* y,
                                    int threads);
