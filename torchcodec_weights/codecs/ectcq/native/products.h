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

// As ectcq_multiply_matrix, with the tables of the search; null where there is none for the level or
// for these tables.
int multiply_rows(int level, const Tables& tables, const SearchTables* search, const Marks& marks,
                  const MatrixView& m, const float* scaled, size_t tokens, float* y, int threads,
                  size_t* failed);

}  // namespace ectcq

extern "C" {

int ectcq_multiply_column_matrix(int level, const ectcq::ColumnClass* columns, size_t count,
                                 int32_t states, const uint8_t* of_group,
                                 const codecs::MatrixView* matrix, const float* scaled,
                                 size_t tokens, float* y, int threads, size_t* failed);

int ectcq_decode_matrix(int level, const ectcq::Tables* tables, const codecs::MatrixView* matrix,
                        int type, void* out, int threads, size_t* failed);

int ectcq_decode_column_matrix(int level, const ectcq::ColumnClass* columns, size_t count,
                               int32_t states, const uint8_t* of_group,
                               const codecs::MatrixView* matrix, int type, void* out, int threads,
                               size_t* failed);

size_t ectcq_parts(const ectcq::Linear* layer);

int ectcq_fill_marks(int level, const ectcq::Linear* layer, size_t parts, void* marks, int threads);

int64_t ectcq_linear(int level, const ectcq::Linear* linear, const void* x, int type, size_t tokens,
                     const void* bias, void* y, int threads);

}  // extern "C"
