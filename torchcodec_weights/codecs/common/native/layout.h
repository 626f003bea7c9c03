// The structs that Python fills. Each has a mirror, a ctypes.Structure of the same fields in the same
// order: MatrixView and Int8Matrix in codecs/common/, Tables and Model in codecs/ectcq/kernels.py,
// ColumnClass in codecs/ectcq/column_kernels.py, Linear in codecs/ectcq/linear.py. layout.cpp lists
// their fields, and Python compares them with its mirrors when the library is loaded. Whoever changes
// a struct here changes layout.cpp and the mirror too.

#pragma once

#include <cstddef>
#include <cstdint>

#include "rans.h"

namespace codecs {

// Tiles `first` to `end` − 1 of a container whose header was read in Python. Points into its arrays.
struct MatrixView {
  const uint8_t* data;
  size_t size;
  size_t tiles;
  const uint64_t* offsets;        // of the payloads
  const uint32_t* payload_sizes;  // in bytes; the outlier section follows
  const uint32_t* outlier_sizes;
  const uint32_t* crcs;  // CRC-32C over both
  size_t rows;
  size_t cols;
  const float* row_scale;  // [i · row_stride], strides 0 or 1
  size_t row_stride;
  const float* col_scale;
  size_t col_stride;
  const uint32_t* column_order;  // [cols], the column at each position of the coded order, or null
  const float* zero_point;       // [rows], or null
  int type;                      // of the outliers' values
  size_t first;                  // of the tiles to process, `first` to `end` − 1
  size_t end;

  size_t first_row(size_t tile) const { return tile * rows / tiles; }
  size_t weights(size_t tile) const { return (first_row(tile + 1) - first_row(tile)) * cols; }
  // Index of a tile's first weight in an output whose element 0 is the first weight of tile `first`.
  size_t place(size_t tile) const { return (first_row(tile) - first_row(first)) * cols; }
  const uint8_t* payload(size_t tile) const { return data + offsets[tile]; }
};

// A window of a matrix of int8 levels; int8.h says what a weight is. `kInt8Padding` levels can be read
// beyond the last row.
struct Int8Matrix {
  const int8_t* levels;  // [i · stride + j]
  size_t stride;
  size_t rows;
  size_t cols;
  const float* row_scale;         // [rows]
  const float* col_scale;         // [cols], or null for 1
  const float* zero_point;        // [rows], or null for 0
  const uint32_t* exact_starts;   // [rows + 1], of the levels of each row that lack something
  const uint32_t* exact_columns;  // counted from `first_col` columns before the window
  const float* exact_values;      // what they lack, in levels
  size_t first_col;
};

}  // namespace codecs

namespace ectcq {

constexpr int kSymbols = 256;

// The decoder's tables of a matrix's entropy model.
struct Tables {
  // By union quantizer and slot: frequency | (slot − start) << 12 | symbol << 24.
  uint32_t slots[2 * codecs::kSlots];
  // By union quantizer and symbol: the value, a multiple of unit / 128 that was rounded.
  float values[2 * kSymbols];
  // Trellis: next = (state >> 1) ^ (state & 1 ? feedback : 0) ^ (symbol & 1 ? input : 0).
  uint32_t feedback;
  uint32_t input;
  float unit;
};

// A class of columns of a stream by columns, by union quantizer and symbol. Sixteen classes have half
// a megabyte of Tables: these are made from this at each call, and not kept.
struct ColumnClass {
  uint16_t frequency[2][kSymbols];  // they add up to kSlots
  float values[2][kSymbols];
};

// A linear layer's weight: some rows and columns of a matrix. Points into arrays of Python.
struct Linear {
  codecs::MatrixView matrix;  // its tiles are those that hold the rows
  const Tables* tables;       // of a stream by rows; null of one by columns
  const void* search;         // ectcq_fill_search's, or null
  const ColumnClass* classes;
  size_t class_count;
  const uint8_t* of_group;
  size_t first_row;
  size_t end_row;
  size_t first_col;
  size_t end_col;
  int32_t states;
  const void* marks;        // ectcq_fill_marks's of a stream by rows, or null
  size_t parts;             // of each tile; 1 without marks
  const void* corrections;  // ectcq_correct's, or null
  const size_t* correction_begins;
};

// A matrix's entropy model with the tables of the trellis search.
struct Model {
  uint32_t frequency[2]
                    [kSymbols];  // by union quantizer and symbol; 0 where there is no such symbol
  uint32_t start[2][kSymbols];   // sum of the frequencies of smaller symbols
  // Cost of a symbol for a weight z, less z²: line[0] − z · line[1], with line[0] = value² + λ · bits
  // and line[1] = 2 · value.
  float line[2][kSymbols][2];
  // Best symbol by class (union quantizer, parity) and cell of z.
  const uint8_t* best;  // [4][cells]
  int32_t cells;
  float first_cell;  // z where the first cell begins
  float cells_per_unit;
  int32_t states;  // 8, 64 or 256
};

}  // namespace ectcq
