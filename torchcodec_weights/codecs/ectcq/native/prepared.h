// A weight that is prepared to be multiplied by, from its four arrays alone: what linear.py does, for
// operators that Python does not call.

#pragma once

#include <memory>

#include "common/native/container.h"
#include "entropy_model.h"
#include "products.h"
#include "search_tables.h"

namespace ectcq {

// The rows and columns of the encoded matrix that a weight consists of.
struct Window {
  int64_t first_row, rows, first_col, cols;
};

class Prepared {
 public:
  Prepared() = default;
  Prepared(const Prepared&) = delete;
  Prepared& operator=(const Prepared&) = delete;

  // Returns what is wrong, in a message for users; empty if nothing is. Tiles are checked at each use.
  std::string open(const WeightArrays& weight, const Window& window, int level);

  // Whether this was prepared from arrays of the same content, but for the tiles.
  bool is_of(const WeightArrays& weight) const { return copy_.is_of(weight); }

  // Its weight, whose container lies at `data` now. It points into this object.
  Linear at(const uint8_t* data) const;

  int level() const { return level_; }

  // Decode the rows of tiles `first` to `end` − 1 into `out`, of `type` (floats.h). Returns a status,
  // and above its lowest 8 bits the tile.
  int64_t decode(const uint8_t* data, size_t first, size_t end, int type, void* out,
                 int threads) const;

 private:
  // Divide tiles into parts, if they are few.
  void divide(const uint8_t* data);

  // Learn corrections, if there are outliers.
  void correct(const uint8_t* data);

  int level_ = 0;
  WeightCopy copy_;
  Container container_ = {};
  std::vector<float> row_scale_, col_scale_, zero_point_;
  std::vector<uint32_t> column_order_;
  EntropyModels models_ = {};
  std::unique_ptr<SearchTables> search_;
  std::vector<Mark> marks_;
  std::vector<Correction> corrections_;
  std::vector<size_t> correction_begins_;
  Linear linear_ = {};  // points into the others
};

// The tile that holds a row.
constexpr size_t tile_of(size_t row, size_t tiles, size_t rows) {
  return ((row + 1) * tiles - 1) / rows;
}

}  // namespace ectcq
