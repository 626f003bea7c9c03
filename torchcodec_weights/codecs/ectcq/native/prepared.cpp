#include "prepared.h"

#include <cstring>
#include <new>

#include "kernels.h"
#include "products.h"

namespace ectcq {

std::string Prepared::open(const WeightArrays& weight, const Window& window, int level) {
  std::string error = container_.open(weight);
  if (!error.empty()) return error;
  const Container& c = container_;
  if (c.codec != "ectcq") return "encoded with another codec than 'ectcq': only Python decodes it";
  if (c.across != 1) return "tiles of codec 'ectcq' are blocks: allowed: whole rows";
  if (c.order & Container::kSortedRows)
    return "rows of codec 'ectcq' are sorted: allowed: unsorted";
  const auto [first_row, rows, first_col, cols] = window;
  const auto lies_in = [](int64_t first, int64_t count, size_t all) {
    return first >= 0 && count > 0 && static_cast<uint64_t>(first) <= all &&
           static_cast<uint64_t>(count) <= all - static_cast<uint64_t>(first);
  };
  if (!lies_in(first_row, rows, c.rows) || !lies_in(first_col, cols, c.cols)) {
    return "window of rows and columns that the matrix does not have";
  }
  linear_ = {};
  linear_.parts = 1;
  linear_.first_row = static_cast<size_t>(first_row);
  linear_.end_row = static_cast<size_t>(first_row + rows);
  linear_.first_col = static_cast<size_t>(first_col);
  linear_.end_col = static_cast<size_t>(first_col + cols);
  const size_t first = tile_of(linear_.first_row, c.tiles, c.rows);
  const size_t end = tile_of(linear_.end_row - 1, c.tiles, c.rows) + 1;
  for (size_t i = first; i < end; ++i) {
    if (c.payload_sizes[i] == 0) {
      return "tile " + std::to_string(i) + " is not here: this is a slice of a weight";
    }
  }
  for (const float unit : c.units) {
    if (unit != c.units[0]) return "ectcq: tiles differ in their step";
  }
  error = models_.read(c.private_data, c.private_size, c.cols, c.units[0]);
  if (!error.empty()) return error;
  row_scale_ = decode_scale(weight.scale, weight.scales, c.row_base);
  col_scale_ = decode_scale(weight.act_pre_scale, weight.act_pre_scales, c.col_base);
  zero_point_.assign(weight.zero_point, weight.zero_point + weight.zero_points);
  if (c.order & Container::kSortedColumns) {
    column_order_ = sorted_order(weight.act_pre_scale, weight.act_pre_scales, c.cols);
  }
  MatrixView& m = linear_.matrix;
  m.size = weight.size;
  m.tiles = c.tiles;
  m.offsets = c.offsets.data();
  m.payload_sizes = c.payload_sizes.data();
  m.outlier_sizes = c.outlier_sizes.data();
  m.crcs = c.crcs.data();
  m.rows = c.rows;
  m.cols = c.cols;
  m.row_scale = row_scale_.data();
  m.row_stride = row_scale_.size() > 1;
  m.col_scale = col_scale_.data();
  m.col_stride = col_scale_.size() > 1;
  m.column_order = column_order_.empty() ? nullptr : column_order_.data();
  m.zero_point = weight.zero_point ? zero_point_.data() : nullptr;
  m.type = c.type;
  m.first = first;
  m.end = end;
  level_ = level;
  if (models_.tables.empty()) {
    linear_.classes = models_.classes.data();
    linear_.class_count = models_.classes.size();
    linear_.of_group = models_.of_group.data();
    linear_.states = models_.states;
  } else {
    linear_.tables = models_.tables.data();
    const Kernels* by = kernels_at(level);
    search_.reset(by ? new SearchTables : nullptr);
    if (by && search_->fill(*by, models_.tables[0])) {
      linear_.search = search_.get();
      divide(weight.data);
    } else {
      search_.reset();
    }
  }
  correct(weight.data);
  copy_ = WeightCopy(weight, c.header_size);
  return {};
}

void Prepared::divide(const uint8_t* data) {
  Linear whole = at(data);
  const size_t parts = ectcq_parts(&whole);
  if (parts == 1) return;
  marks_.resize((whole.matrix.end - whole.matrix.first) * parts);
  // Where a tile is damaged, the first product says so.
  if (ectcq_fill_marks(level_, &whole, parts, marks_.data(), 1) != kOk) return;
  linear_.marks = marks_.data();
  linear_.parts = parts;
}

void Prepared::correct(const uint8_t* data) {
  Linear whole = at(data);
  const size_t most = ectcq_corrections(level_, &whole);
  if (most == 0) return;
  corrections_.resize(most);
  correction_begins_.resize(whole.matrix.end - whole.matrix.first + 1);
  // As in `divide`.
  if (ectcq_correct(level_, &whole, correction_begins_.data(), corrections_.data()) != kOk) return;
  linear_.corrections = corrections_.data();
  linear_.correction_begins = correction_begins_.data();
}

Linear Prepared::at(const uint8_t* data) const {
  Linear linear = linear_;
  linear.matrix.data = data;
  return linear;
}

int64_t Prepared::decode(const uint8_t* data, size_t first, size_t end, int type, void* out,
                         int threads) const {
  MatrixView m = linear_.matrix;
  m.data = data;
  m.first = first;
  m.end = end;
  size_t failed = 0;
  const int status =
      linear_.tables
          ? ectcq_decode_matrix(level_, linear_.tables, &m, type, out, threads, &failed)
          : ectcq_decode_column_matrix(level_, linear_.classes, linear_.class_count, linear_.states,
                                       linear_.of_group, &m, type, out, threads, &failed);
  return status | static_cast<int64_t>(failed) << 8;
}

}  // namespace ectcq
