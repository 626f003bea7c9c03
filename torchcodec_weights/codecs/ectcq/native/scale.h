// Scales and zero points of decoded rows.

#pragma once

#include "common/native/layout.h"

namespace ectcq {

// Apply them to rows `first` to `last` − 1 of the matrix, which lie at `z` with columns in their own
// order.
inline void scale_rows(const codecs::MatrixView& m, size_t first, size_t last, float* z) {
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

}  // namespace ectcq
