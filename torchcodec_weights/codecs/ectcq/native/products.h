// Products by whole matrices, for those that have prepared what the kernels need.

#pragma once

#include "common/native/matrix.h"
#include "search_tables.h"

namespace ectcq {

// As ectcq_multiply_matrix, with the tables of the search; null where there is none for the level or
// for these tables.
int multiply_rows(int level, const Tables& tables, const SearchTables* search, const MatrixView& m,
                  const float* scaled, size_t tokens, float* y, int threads, size_t* failed);

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

int64_t ectcq_linear(int level, const ectcq::Linear* linear, const void* x, int type, size_t tokens,
                     const void* bias, void* y, int threads);

}  // extern "C"
