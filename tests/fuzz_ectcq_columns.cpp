// Damaged payloads and outlier sections of streams by columns through every decoder of this machine,
// under the sanitizers that tests/test_sanitizer.py compiles this with. Reads one tile from a file:
// classes, their groups, the columns' order, a payload, an outlier section. Mutates them, and decodes
// into buffers of exactly the tile's size.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "common/native/crc32c.h"
#include "common/native/floats.h"
#include "ectcq/native/columns.h"

extern "C" {
int codecs_best_level();
int ectcq_decode_columns(int, const ectcq::ColumnClass*, size_t, int32_t, const uint8_t*,
                         const uint8_t*, size_t, size_t, size_t, float*);
int ectcq_decode_column_matrix(int, const ectcq::ColumnClass*, size_t, int32_t, const uint8_t*,
                               const codecs::MatrixView*, int, void*, int, size_t*);
int ectcq_multiply_column_matrix(int, const ectcq::ColumnClass*, size_t, int32_t, const uint8_t*,
                                 const codecs::MatrixView*, const float*, size_t, float*, int,
                                 size_t*);
}

namespace {

template <typename Value>
std::vector<Value> read(std::FILE* file, size_t count) {
  std::vector<Value> values(count);
  if (std::fread(values.data(), sizeof(Value), count, file) != count) std::exit(2);
  return values;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 7) return 2;
  std::FILE* file = std::fopen(argv[1], "rb");
  if (!file) return 2;
  size_t sizes[5];
  for (int i = 0; i < 5; ++i) sizes[i] = std::strtoul(argv[2 + i], nullptr, 10);
  const size_t rows = sizes[0], cols = sizes[1], count = sizes[2];
  const auto classes = read<ectcq::ColumnClass>(file, count);
  const auto groups = read<uint8_t>(file, ectcq::groups_of(cols));
  const auto order = read<uint32_t>(file, cols);
  const auto payload = read<uint8_t>(file, sizes[3]);
  const auto section = read<uint8_t>(file, sizes[4]);
  std::fclose(file);

  const int levels = codecs_best_level();
  std::mt19937 random(1);
  int results = 0, errors = 0;
  for (int trial = 0; trial < 4000; ++trial) {
    // Buffers of their own size, so that one byte too far is found.
    auto bad = payload;
    if (trial % 4 == 0) bad.resize(random() % (payload.size() + 1));
    if (trial % 4 == 1) bad.resize(payload.size() + random() % 70, 0xA5);
    unsigned changes = trial % 3 == 0 ? random() % 400 : random() % 4;
    for (unsigned i = 0; i < changes && !bad.empty(); ++i) bad[random() % bad.size()] = random();
    if (trial % 7 == 0 && bad.size() >= 4) std::memset(bad.data(), trial & 8 ? 0 : 255, 4);
    auto outliers = section;
    changes = trial % 5 == 0 ? random() % 3 : 0;
    for (unsigned i = 0; i < changes; ++i) outliers[random() % outliers.size()] = random();
    if (trial % 11 == 0) outliers.resize(random() % outliers.size());
    auto places = order;
    if (trial % 13 == 0) places[random() % cols] = trial % 2 ? random() : random() % cols;
    auto classes_of = groups;
    if (trial % 17 == 0) classes_of[random() % classes_of.size()] = random() % (count + 1);
    auto tables = classes;
    if (trial % 19 == 0)
      tables[random() % count].frequency[random() % 2][random() % 256] = random();
    std::vector<uint8_t> data(bad);
    data.insert(data.end(), outliers.begin(), outliers.end());
    const size_t stored = data.size();
    data.insert(data.end(), payload.begin(), payload.end());
    data.shrink_to_fit();

    // The good payload between two that are damaged, as tiles are decoded together.
    constexpr size_t kTiles = 3;
    const uint64_t offset[kTiles] = {0, stored, 0};
    const uint32_t bytes_of_bad = bad.size(), bytes_of_good = payload.size();
    const uint32_t payload_size[kTiles] = {bytes_of_bad, bytes_of_good, bytes_of_bad};
    const uint32_t bytes_of_section = outliers.size();
    const uint32_t outlier_size[kTiles] = {bytes_of_section, 0, bytes_of_section};
    const uint32_t crc_of_bad = codecs::crc32c(data.data(), stored);
    const uint32_t crc[kTiles] = {crc_of_bad, codecs::crc32c(payload.data(), payload.size()),
                                  crc_of_bad};
    const float one = 1.0f;
    const std::vector<float> zeros(kTiles * rows, 0.25f);
    codecs::MatrixView view{};
    view.data = data.data();
    view.size = data.size();
    view.tiles = kTiles;
    view.offsets = offset;
    view.payload_sizes = payload_size;
    view.outlier_sizes = outlier_size;
    view.crcs = crc;
    view.rows = kTiles * rows;
    view.cols = cols;
    view.row_scale = view.col_scale = &one;
    view.column_order = trial % 3 ? places.data() : nullptr;
    view.zero_point = trial % 2 ? zeros.data() : nullptr;
    view.type = codecs::kFloat32;
    view.end = kTiles;

    int first[3] = {};
    std::vector<float> expected[2];
    for (int level = 0; level <= levels; ++level) {
      const size_t tokens = 1 + trial % 2;
      std::vector<float> weights(rows * cols), matrix(kTiles * rows * cols);
      std::vector<float> x(tokens * cols, 1.0f), y(tokens * kTiles * rows);
      size_t failed;
      const int status[3] = {
          ectcq_decode_columns(level, tables.data(), count, 8, classes_of.data(), bad.data(),
                               bad.size(), rows, cols, weights.data()),
          ectcq_decode_column_matrix(level, tables.data(), count, 8, classes_of.data(), &view,
                                     codecs::kFloat32, matrix.data(), 1, &failed),
          ectcq_multiply_column_matrix(level, tables.data(), count, 8, classes_of.data(), &view,
                                       x.data(), tokens, y.data(), 1, &failed),
      };
      if (level == 0) {
        std::memcpy(first, status, sizeof(first));
        expected[0] = weights;
        expected[1] = matrix;
        continue;
      }
      // Bits, as an outlier may be any value.
      const size_t bytes = weights.size() * sizeof(float);
      const bool same =
          std::memcmp(first, status, sizeof(first)) == 0 &&
          (status[0] || !std::memcmp(weights.data(), expected[0].data(), bytes)) &&
          (status[1] || !std::memcmp(matrix.data(), expected[1].data(), kTiles * bytes));
      if (!same) {
        std::printf("trial %d, level %d: status %d %d %d, scalar %d %d %d\n", trial, level,
                    status[0], status[1], status[2], first[0], first[1], first[2]);
        return 1;
      }
    }
    first[1] == 0 ? ++results : ++errors;
  }
  std::printf("%d results, %d errors\n", results, errors);
  return results > 0 && errors > 0 ? 0 : 1;
}
