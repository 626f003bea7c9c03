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
