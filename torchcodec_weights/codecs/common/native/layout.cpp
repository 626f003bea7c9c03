// Where the fields of the structs of layout.h lie, for Python to compare with its mirrors.

#include "layout.h"

#include <cstring>

namespace codecs {
namespace {

struct Field {
  const char* name;
  size_t offset;  // in bytes
  size_t size;
};

struct Layout {
  const char* name;
  size_t size;
  const Field* fields;
  size_t count;
};

#define FIELD(Struct, name) {#name, offsetof(Struct, name), sizeof(Struct::name)}

constexpr Field kMatrixView[] = {
    FIELD(MatrixView, data),          FIELD(MatrixView, size),
    FIELD(MatrixView, tiles),         FIELD(MatrixView, offsets),
    FIELD(MatrixView, payload_sizes), FIELD(MatrixView, outlier_sizes),
    FIELD(MatrixView, crcs),          FIELD(MatrixView, rows),
    FIELD(MatrixView, cols),          FIELD(MatrixView, row_scale),
    FIELD(MatrixView, row_stride),    FIELD(MatrixView, col_scale),
    FIELD(MatrixView, col_stride),    FIELD(MatrixView, column_order),
    FIELD(MatrixView, zero_point),    FIELD(MatrixView, type),
    FIELD(MatrixView, first),         FIELD(MatrixView, end),
};

constexpr Field kInt8Matrix[] = {
    FIELD(Int8Matrix, levels),        FIELD(Int8Matrix, stride),
    FIELD(Int8Matrix, rows),          FIELD(Int8Matrix, cols),
    FIELD(Int8Matrix, row_scale),     FIELD(Int8Matrix, col_scale),
    FIELD(Int8Matrix, zero_point),    FIELD(Int8Matrix, exact_starts),
    FIELD(Int8Matrix, exact_columns), FIELD(Int8Matrix, exact_values),
    FIELD(Int8Matrix, first_col),
};

constexpr Field kTables[] = {
    FIELD(ectcq::Tables, slots), FIELD(ectcq::Tables, values), FIELD(ectcq::Tables, feedback),
    FIELD(ectcq::Tables, input), FIELD(ectcq::Tables, unit),
};

constexpr Field kColumnClass[] = {
    FIELD(ectcq::ColumnClass, frequency),
    FIELD(ectcq::ColumnClass, values),
};

constexpr Field kLinear[] = {
    FIELD(ectcq::Linear, matrix),
    FIELD(ectcq::Linear, tables),
    FIELD(ectcq::Linear, search),
    FIELD(ectcq::Linear, classes),
    FIELD(ectcq::Linear, class_count),
    FIELD(ectcq::Linear, of_group),
    FIELD(ectcq::Linear, first_row),
    FIELD(ectcq::Linear, end_row),
    FIELD(ectcq::Linear, first_col),
    FIELD(ectcq::Linear, end_col),
    FIELD(ectcq::Linear, states),
    FIELD(ectcq::Linear, marks),
    FIELD(ectcq::Linear, parts),
    FIELD(ectcq::Linear, corrections),
    FIELD(ectcq::Linear, correction_begins),
};

constexpr Field kModel[] = {
    FIELD(ectcq::Model, frequency),      FIELD(ectcq::Model, start),
    FIELD(ectcq::Model, line),           FIELD(ectcq::Model, best),
    FIELD(ectcq::Model, cells),          FIELD(ectcq::Model, first_cell),
    FIELD(ectcq::Model, cells_per_unit), FIELD(ectcq::Model, states),
};

#undef FIELD

template <typename Struct, size_t kCount>
constexpr Layout layout_of(const char* name, const Field (&fields)[kCount]) {
  return {name, sizeof(Struct), fields, kCount};
}

constexpr Layout kLayouts[] = {
    layout_of<MatrixView>("MatrixView", kMatrixView),
    layout_of<Int8Matrix>("Int8Matrix", kInt8Matrix),
    layout_of<ectcq::Tables>("Tables", kTables),
    layout_of<ectcq::ColumnClass>("ColumnClass", kColumnClass),
    layout_of<ectcq::Linear>("Linear", kLinear),
    layout_of<ectcq::Model>("Model", kModel),
};

}  // namespace
}  // namespace codecs

#pragma GCC visibility push(default)
extern "C" {

// Bytes of the struct of this name, 0 if there is none.
size_t codecs_struct_size(const char* name) {
  for (const auto& layout : codecs::kLayouts) {
    if (std::strcmp(layout.name, name) == 0) return layout.size;
  }
  return 0;
}

// Name of field `index` of a struct, with its offset and size in bytes; null beyond the last.
const char* codecs_struct_field(const char* name, size_t index, size_t* offset, size_t* size) {
  for (const auto& layout : codecs::kLayouts) {
    if (std::strcmp(layout.name, name) != 0 || index >= layout.count) continue;
    *offset = layout.fields[index].offset;
    *size = layout.fields[index].size;
    return layout.fields[index].name;
  }
  return nullptr;
}

}  // extern "C"
#pragma GCC visibility pop
