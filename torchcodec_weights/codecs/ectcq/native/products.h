// Products by whole matrices, for those that have prepared what the kernels need.

#pragma once

#include "common/native/matrix.h"
#include "kernels.h"

namespace ectcq {

// A stream at the beginning of a part of its tile.
struct Mark {
  alignas(64) uint16_t low[kLanes], high[kLanes], trellis[kLanes];  // as in Stream
  size_t words;                                                     // bytes of the payload before
  size_t reading;
};

// Parts of tiles, where tiles are too few for the streams of a loop in each thread. Part p of a tile
// of n rows has rows p · n / parts to (p + 1) · n / parts − 1.
struct Marks {
  const Mark* marks;  // [tiles `first` to `end` − 1][parts]; null if tiles are not divided
  size_t parts;       // 1 then
};

// What makes an outlier of the weight that is decoded in its place, when it is added before scales.
struct Correction {
  uint32_t row,
      column;  // of the matrix; of streams by columns, the column's position in coded order
  float value;
};

// Those of all tiles, by tile and, of streams by rows, by row. With them a product need not look at
// weights while they are decoded.
struct Corrections {
  const Correction* list;  // null where they are not known
  const size_t* begins;    // [tiles `first` to `end`]

  // Those of tile i.
  const Correction* begin(const MatrixView& m, size_t i) const {
    return list + begins[i - m.first];
  }
  const Correction* end(const MatrixView& m, size_t i) const {
    return list + begins[i + 1 - m.first];
  }
};

// As ectcq_multiply_matrix, with the tables of the search; null where there is none for the level or
// for these tables.
int multiply_rows(int level, const Tables& tables, const SearchTables* search, const Marks& marks,
                  const Corrections& corrections, const MatrixView& m, const float* scaled,
                  size_t tokens, float* y, int threads, size_t* failed);

// As ectcq_multiply_column_matrix.
int multiply_columns(int level, const ColumnClass* columns, size_t count, int32_t states,
                     const uint8_t* of_group, const Corrections& corrections, const MatrixView& m,
                     const float* scaled, size_t tokens, float* y, int threads, size_t* failed);

// ectcq_correct of streams by columns.
int correct_columns(int level, const Linear& layer, size_t* begins, Correction* list);

}  // namespace ectcq

extern "C" {

int ectcq_decode_matrix(int level, const ectcq::Tables* tables, const codecs::MatrixView* matrix,
                        int type, void* out, int threads, size_t* failed);

int ectcq_decode_column_matrix(int level, const ectcq::ColumnClass* columns, size_t count,
                               int32_t states, const uint8_t* of_group,
                               const codecs::MatrixView* matrix, int type, void* out, int threads,
                               size_t* failed);

size_t ectcq_parts(const ectcq::Linear* layer);

int ectcq_fill_marks(int level, const ectcq::Linear* layer, size_t parts, void* marks, int threads);

size_t ectcq_corrections(int level, const ectcq::Linear* layer);

int ectcq_correct(int level, const ectcq::Linear* layer, size_t* begins, void* corrections);

int64_t ectcq_linear(int level, const ectcq::Linear* linear, const void* x, int type, size_t tokens,
                     const void* bias, void* y, int threads);

}  // extern "C"
