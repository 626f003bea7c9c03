// Every decoder of a processor beside the scalar one, which tests/test_neon.py runs where Python has no
// package: in an emulator of another processor. Reads a matrix from a file; its weights must have the
// scalar decoder's bits, its products be those of these weights but for the rounding of sums. Writes
// the weights, float32, to a second file.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "common/native/floats.h"
#include "ectcq/native/columns.h"

extern "C" {
int codecs_best_level();
int ectcq_decode_matrix(int, const ectcq::Tables*, const codecs::MatrixView*, int, void*, int,
                        size_t*);
int ectcq_decode_column_matrix(int, const ectcq::ColumnClass*, size_t, int32_t, const uint8_t*,
                               const codecs::MatrixView*, int, void*, int, size_t*);
size_t ectcq_search_bytes();
bool ectcq_fill_search(int, const ectcq::Tables*, void*);
size_t ectcq_corrections(int, const ectcq::Linear*);
int ectcq_correct(int, const ectcq::Linear*, size_t*, void*);
int64_t ectcq_linear(int, const ectcq::Linear*, const void*, int, size_t, const void*, void*, int);
}

namespace {

std::FILE* file;

template <typename Value>
std::vector<Value> read(size_t count) {
  std::vector<Value> values(count);
  if (std::fread(values.data(), sizeof(Value), count, file) != count) std::exit(2);
  return values;
}

struct Matrix {
  codecs::MatrixView view{};
  std::vector<ectcq::Tables> tables;        // one of a stream by rows
  std::vector<ectcq::ColumnClass> classes;  // of a stream by columns
  std::vector<uint8_t> of_group;
  int32_t states;

  int decode(int level, int type, void* out) const {
    size_t failed;
    return classes.empty()
               ? ectcq_decode_matrix(level, tables.data(), &view, type, out, 1, &failed)
               : ectcq_decode_column_matrix(level, classes.data(), classes.size(), states,
                                            of_group.data(), &view, type, out, 1, &failed);
  }

  // Prepared as linear.py does.
  int64_t multiply(int level, const float* x, size_t tokens, float* y) const {
    ectcq::Linear layer{};
    layer.matrix = view;
    layer.end_row = view.rows;
    layer.end_col = view.cols;
    layer.parts = 1;
    std::vector<uint8_t> search(ectcq_search_bytes() + 63);
    if (classes.empty()) {
      layer.tables = tables.data();
      const auto address = reinterpret_cast<uintptr_t>(search.data());
      uint8_t* aligned = search.data() + (64 - address % 64) % 64;
      if (ectcq_fill_search(level, tables.data(), aligned)) layer.search = aligned;
    } else {
      layer.classes = classes.data();
      layer.class_count = classes.size();
      layer.of_group = of_group.data();
      layer.states = states;
    }
    std::vector<size_t> begins(view.tiles + 1);
    std::vector<uint32_t> corrections(3 * ectcq_corrections(level, &layer));
    if (!corrections.empty()) {
      const int status = ectcq_correct(level, &layer, begins.data(), corrections.data());
      if (status != 0) return status;
      layer.corrections = corrections.data();
      layer.correction_begins = begins.data();
    }
    return ectcq_linear(level, &layer, x, codecs::kFloat32, tokens, nullptr, y, 1);
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 || !(file = std::fopen(argv[1], "rb"))) return 2;
  const auto sizes = read<uint64_t>(8);
  const size_t rows = sizes[0], cols = sizes[1], tiles = sizes[2], bytes = sizes[3];
  Matrix matrix;
  codecs::MatrixView& view = matrix.view;
  if (sizes[4]) {
    matrix.classes = read<ectcq::ColumnClass>(sizes[4]);
    matrix.of_group = read<uint8_t>(ectcq::groups_of(cols));
    matrix.states = static_cast<int32_t>(sizes[5]);
  } else {
    matrix.tables = read<ectcq::Tables>(1);
  }
  const auto offsets = read<uint64_t>(tiles);
  const auto payload_sizes = read<uint32_t>(tiles), outlier_sizes = read<uint32_t>(tiles);
  const auto crcs = read<uint32_t>(tiles);
  const auto row_scale = read<float>(rows), col_scale = read<float>(cols);
  const auto zero_point = read<float>(sizes[7] ? rows : 0);
  const auto order = read<uint32_t>(sizes[6] ? cols : 0);
  const auto data = read<uint8_t>(bytes);
  view.data = data.data();
  view.size = bytes;
  view.tiles = view.end = tiles;
  view.offsets = offsets.data();
  view.payload_sizes = payload_sizes.data();
  view.outlier_sizes = outlier_sizes.data();
  view.crcs = crcs.data();
  view.rows = rows;
  view.cols = cols;
  view.row_scale = row_scale.data();
  view.row_stride = view.col_stride = 1;
  view.col_scale = col_scale.data();
  view.column_order = order.empty() ? nullptr : order.data();
  view.zero_point = zero_point.empty() ? nullptr : zero_point.data();
  view.type = codecs::kFloat32;

  const size_t count = rows * cols, most = 4;
  std::vector<float> x(most * cols), weights(count);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(std::sin(0.7 * double(i)));
  if (matrix.decode(0, codecs::kFloat32, weights.data()) != 0) return 3;
  const int best = codecs_best_level();
  for (int level = 0; level <= best; ++level) {
    for (const int type : {codecs::kFloat32, codecs::kFloat16, codecs::kBfloat16}) {
      std::vector<uint8_t> out(count * codecs::item_size(type), 0xFF), expected(out);
      matrix.decode(0, type, expected.data());
      if (matrix.decode(level, type, out.data()) != 0 || out != expected) {
        std::printf("level %d decodes to other values of type %d\n", level, type);
        return 1;
      }
    }
    for (const size_t tokens : {size_t{1}, most}) {
      std::vector<float> y(tokens * rows, NAN);
      if (matrix.multiply(level, x.data(), tokens, y.data()) != 0) return 3;
      for (size_t t = 0; t < tokens; ++t) {
        for (size_t i = 0; i < rows; ++i) {
          const double added = zero_point.empty() ? 0 : double(zero_point[i]);
          double sum = 0, size = 0;
          for (size_t j = 0; j < cols; ++j) {
            const double weight = weights[i * cols + j], own = x[t * cols + j];
            sum += weight * own;
            size += (std::fabs(weight - added) + std::fabs(added)) * std::fabs(own);
          }
          if (!(std::fabs(y[t * rows + i] - sum) <= size * double(cols + 8) * 0x1p-24)) {
            std::printf("level %d: product %zu of token %zu is %g, not %g\n", level, i, t,
                        double(y[t * rows + i]), sum);
            return 1;
          }
        }
      }
    }
  }
  std::FILE* decoded = std::fopen(argv[2], "wb");
  if (!decoded || std::fwrite(weights.data(), sizeof(float), count, decoded) != count ||
      std::fclose(decoded) != 0) {
    return 2;
  }
  std::printf("%d levels agree\n", best + 1);
  return 0;
}
