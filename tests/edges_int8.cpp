// Products and rows of int8 levels in buffers of exactly their sizes, under the sanitizers that
// tests/test_sanitizer.py compiles this with: all instruction sets, types and odd shapes.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "common/native/floats.h"
#include "common/native/int8.h"

extern "C" {
int codecs_best_level();
int codecs_int8_multiply(int, const codecs::Int8Matrix*, const void*, int, size_t, const void*,
                         void*, int);
int codecs_int8_rows(int, const codecs::Int8Matrix*, const int64_t*, size_t, int, void*, int);
}

int main() {
  size_t results = 0;
  for (const size_t rows : {1, 3, 9, 40}) {
    for (const size_t cols : {1, 15, 16, 17, 67}) {
      const std::vector<int8_t> levels(rows * cols + codecs::kInt8Padding, 1);
      const std::vector<float> row_scale(rows, 2.0f), col_scale(cols, 3.0f), zero_point(rows, 0.5f);
      std::vector<uint32_t> starts(rows + 1), columns;
      for (size_t i = 0; i < rows; ++i) {
        if (i % 2 == 0) columns.push_back(static_cast<uint32_t>((i * 7) % cols));
        starts[i + 1] = static_cast<uint32_t>(columns.size());
      }
      const std::vector<float> values(columns.size(), 10.0f);
      // The whole matrix, and its last rows and columns.
      const size_t row = rows / 2, col = cols / 2;
      const codecs::Int8Matrix whole{levels.data(),
                                     cols,
                                     rows,
                                     cols,
                                     row_scale.data(),
                                     col_scale.data(),
                                     zero_point.data(),
                                     starts.data(),
                                     columns.data(),
                                     values.data(),
                                     0};
      const codecs::Int8Matrix part{levels.data() + row * cols + col,
                                    cols,
                                    rows - row,
                                    cols - col,
                                    row_scale.data() + row,
                                    col_scale.data() + col,
                                    zero_point.data() + row,
                                    starts.data() + row,
                                    columns.data(),
                                    values.data(),
                                    col};
      for (const codecs::Int8Matrix* m : {&whole, &part}) {
        for (int level = 0; level <= codecs_best_level(); ++level) {
          for (const int type : {codecs::kFloat32, codecs::kFloat16, codecs::kBfloat16}) {
            const size_t width = codecs::item_size(type);
            for (const size_t tokens : {1, 2, 7}) {
              const std::vector<uint8_t> x(tokens * m->cols * width, 0x3C);
              const std::vector<uint8_t> bias(m->rows * width, 0x3C);
              std::vector<uint8_t> y(tokens * m->rows * width);
              if (codecs_int8_multiply(level, m, x.data(), type, tokens, bias.data(), y.data(), 2))
                return 1;
              results += y.size();
            }
            const std::vector<int64_t> indices{static_cast<int64_t>(m->rows) - 1, 0};
            std::vector<uint8_t> out(2 * m->cols * width), all(m->rows * m->cols * width);
            if (codecs_int8_rows(level, m, indices.data(), 2, type, out.data(), 2)) return 1;
            if (codecs_int8_rows(level, m, nullptr, m->rows, type, all.data(), 2)) return 1;
            const size_t length = m->cols * width;
            if (!std::equal(out.begin() + length, out.end(), all.begin())) return 1;
            results += out.size();
          }
        }
      }
    }
  }
  std::printf("%zu bytes of results\n", results);
  return 0;
}
