// The C interface to streams by columns: one payload, whole matrices, products.

#include "columns.h"

#if defined(CODECS_X86)
#include <immintrin.h>
#endif

#include <memory>
#include <new>

#include "common/native/matrix.h"
#include "scale.h"
#include "trellis.h"

namespace ectcq {
namespace {

template <typename Value>
std::unique_ptr<Value[]> allocate(size_t count) {
  return std::unique_ptr<Value[]>(new (std::nothrow) Value[count]);
}

// check_sizes, and what streams by columns need besides.
int check_columns(const MatrixView& m) {
  const int sizes = check_sizes(m);
  if (sizes != kOk) return sizes;
  // Rows of a tile and one more, as Shape has: indices into a tile then fit 31 bits.
  return ((m.rows + m.tiles - 1) / m.tiles + 1) * m.cols <= INT32_MAX ? kOk : kBadHeader;
}

// Position in the coded order of each column; null where there is no memory. `*status` says whether
// the order is one.
std::unique_ptr<uint32_t[]> positions_of(const MatrixView& m, int* status) {
  auto positions = allocate<uint32_t>(m.cols);
  *status = positions ? kOk : kNoMemory;
  if (!positions) return positions;
  if (!m.column_order) {
    for (size_t p = 0; p < m.cols; ++p) positions[p] = static_cast<uint32_t>(p);
    return positions;
  }
  std::fill_n(positions.get(), m.cols, UINT32_MAX);
  for (size_t p = 0; p < m.cols; ++p) {
    const uint32_t column = m.column_order[p];
    if (column >= m.cols || positions[column] != UINT32_MAX) {
      *status = kBadHeader;
      break;
    }
    positions[column] = static_cast<uint32_t>(p);
  }
  return positions;
}

// A decoded tile before its columns are put in their own order. Whole groups lie one after the
// other, [rows][32] each, `stride` apart; the last columns, fewer than 32, lie behind them, [rows]
// [rest]. Padded to 32 they would take up to 32 times the memory of the weights.
struct Shape {
  size_t cols;
  size_t whole;   // groups
  size_t rest;    // columns of the last group, if it is not whole
  size_t stride;  // an odd number of rows, as rows of all groups would else lie in one cache set
  size_t floats;

  Shape(const MatrixView& m) : cols(m.cols), whole(m.cols / kLanes), rest(m.cols % kLanes) {
    const size_t rows = (m.rows + m.tiles - 1) / m.tiles;
    stride = (rows | 1) * kLanes;
    floats = whole * stride + rows * rest;
  }

  // Of the weight in row 0 at a position of whole groups.
  size_t place(size_t position) const { return position / kLanes * stride + position % kLanes; }
};

void permute_plain(const float* z, const uint32_t* places, size_t cols, float* row) {
  for (size_t j = 0; j < cols; ++j) row[j] = z[places[j]];
}

#if defined(CODECS_X86)
__attribute__((target("avx2"))) void permute_avx2(const float* z, const uint32_t* places,
                                                  size_t cols, float* row) {
  size_t j = 0;
  for (; j + 8 <= cols; j += 8) {
    const __m256i place = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(places + j));
    _mm256_storeu_ps(row + j, _mm256_i32gather_ps(z, place, 4));
  }
  permute_plain(z, places + j, cols - j, row + j);
}
#endif

// One row of a tile, its columns in their own order. `places` is of each column, null if columns lie
// in their own order.
void assemble_row(int level, const Shape& shape, const float* tile, const MatrixView& m,
                  const uint32_t* places, size_t row, float* out) {
  const float* rest = tile + shape.whole * shape.stride + row * shape.rest;
  if (!places) {
    for (size_t g = 0; g < shape.whole; ++g) {
      std::memcpy(out + g * kLanes, tile + g * shape.stride + row * kLanes, kLanes * sizeof(float));
    }
    std::memcpy(out + shape.whole * kLanes, rest, shape.rest * sizeof(float));
    return;
  }
  if (shape.whole) {
#if defined(CODECS_X86)
    const auto permute = level >= kAvx2 ? permute_avx2 : permute_plain;
#else
    (void)level;
    const auto permute = permute_plain;
#endif
    permute(tile + row * kLanes, places, shape.cols, out);
  }
  for (size_t l = 0; l < shape.rest; ++l) out[m.column_order[shape.whole * kLanes + l]] = rest[l];
}

// y[r] += Σ_l z[r][l] · x[l]
void add_products_plain(const float* z, size_t rows, const float* x, float* y) {
  for (size_t r = 0; r < rows; ++r, z += kLanes) {
    float sums[8] = {};
    for (int l = 0; l < kLanes; ++l) sums[l % 8] += z[l] * x[l];
    y[r] +=
        ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
  }
}

#if defined(CODECS_X86)
__attribute__((target("avx2,fma"))) void add_products_avx2(const float* z, size_t rows,
                                                           const float* x, float* y) {
  const __m256 x0 = _mm256_loadu_ps(x), x1 = _mm256_loadu_ps(x + 8);
  const __m256 x2 = _mm256_loadu_ps(x + 16), x3 = _mm256_loadu_ps(x + 24);
  size_t r = 0;
  for (; r + 8 <= rows; r += 8, z += 8 * kLanes) {
    __m256 s[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const float* row = z + i * kLanes;
      s[i] = _mm256_mul_ps(_mm256_loadu_ps(row), x0);
      s[i] = _mm256_fmadd_ps(_mm256_loadu_ps(row + 8), x1, s[i]);
      s[i] = _mm256_fmadd_ps(_mm256_loadu_ps(row + 16), x2, s[i]);
      s[i] = _mm256_fmadd_ps(_mm256_loadu_ps(row + 24), x3, s[i]);
    }
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(s[4], s[5]), _mm256_hadd_ps(s[6], s[7]));
    const __m256 sums =
        _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    _mm256_storeu_ps(y + r, _mm256_add_ps(_mm256_loadu_ps(y + r), sums));
  }
  add_products_plain(z, rows - r, x, y + r);
}
#endif

struct Exact {
  uint32_t row;  // of the tile
  uint32_t lane;
  float value;
};

// The outliers of a tile by group and row, with values to be multiplied by scaled activations.
class Outliers {
 public:
  int read(const MatrixView& m, size_t tile, const uint32_t* positions) {
    const uint8_t* section = m.payload(tile) + m.payload_sizes[tile];
    const size_t size = m.outlier_sizes[tile], groups = groups_of(m.cols);
    if (!size) return kOk;
    begins_ = allocate<size_t>(groups + 1);
    // Each takes two bytes of the section, and more.
    list_ = allocate<Exact>(size / 2);
    if (!begins_ || !list_) return kNoMemory;
    std::fill_n(begins_.get(), groups + 1, 0);
    const int status = for_outliers(
        section, size, m.type, m.weights(tile),
        [&](size_t position, const uint8_t*) { ++begins_[positions[position % m.cols] / kLanes]; });
    if (status != kOk) return status;
    size_t sum = 0;
    for (size_t g = 0; g <= groups; ++g) {
      sum += begins_[g];
      begins_[g] = sum;
    }
    // A group's begin moves down to where it belongs, so its rows lie in decreasing order.
    return for_outliers(
        section, size, m.type, m.weights(tile), [&](size_t position, const uint8_t* value) {
          const size_t row = position / m.cols, column = position % m.cols;
          const size_t i = m.first_row(tile) + row;
          const float scale = m.row_scale[i * m.row_stride] * m.col_scale[column * m.col_stride];
          const float offset = m.zero_point ? m.zero_point[i] : 0.0f;
          list_[--begins_[positions[column] / kLanes]] = {
              static_cast<uint32_t>(row), positions[column] % kLanes,
              (stored_value(value, m.type) - offset) / scale};
        });
  }

  // Put those of rows `first` to `first` + count − 1 of a group in their places. Called for rows in
  // increasing order.
  void put(size_t group, size_t first, size_t count, float* z) {
    if (!list_) return;
    if (first == 0) next_ = begins_[group + 1];
    for (; next_ > begins_[group]; --next_) {
      const Exact& exact = list_[next_ - 1];
      if (exact.row >= first + count) break;
      z[(exact.row - first) * kLanes + exact.lane] = exact.value;
    }
  }

 private:
  std::unique_ptr<size_t[]> begins_;
  std::unique_ptr<Exact[]> list_;
  size_t next_ = 0;  // one past the outlier to be put next
};

}  // namespace

int Classes::fill(const ColumnClass* classes, size_t count, int32_t states, const uint8_t* groups,
                  size_t cols) {
  const Trellis* trellis = nullptr;
  for (const Trellis& one : kTrellises) {
    if (one.states == states) trellis = &one;
  }
  if (!trellis || count < 1 || count > UINT8_MAX) return kBadHeader;
  of_group = groups;
  for (size_t g = 0; g < groups_of(cols); ++g) {
    if (groups[g] >= count) return kBadHeader;
  }
  tables = allocate<Tables>(count);
  if (!tables) return kNoMemory;
  for (size_t c = 0; c < count; ++c) {
    Tables& made = tables[c];
    made.feedback = trellis->h0 >> 1;
    made.input = trellis->h1 >> 1;
    std::memcpy(made.values, classes[c].values, sizeof(made.values));
    for (uint32_t q = 0; q < 2; ++q) {
      uint32_t* slots = made.slots + q * kSlots;
      uint32_t start = 0;
      for (uint32_t symbol = 0; symbol < kSymbols; ++symbol) {
        const uint32_t frequency = classes[c].frequency[q][symbol];
        if (frequency > kSlots - start) return kBadHeader;
        for (uint32_t k = 0; k < frequency; ++k)
          slots[start + k] = slot_entry(frequency, k, symbol);
        start += frequency;
      }
      if (start != kSlots) return kBadHeader;
    }
  }
  return kOk;
}

}  // namespace ectcq

#pragma GCC visibility push(default)
extern "C" {

using namespace ectcq;

// Decode a payload of rows · cols weights into `out`, columns in the coded order.
int ectcq_decode_columns(int level, const ColumnClass* columns, size_t count, int32_t states,
                         const uint8_t* of_group, const uint8_t* payload, size_t size, size_t rows,
                         size_t cols, float* out) {
  Classes classes;
  const int status = classes.fill(columns, count, states, of_group, cols);
  if (status != kOk) return status;
  alignas(64) float chunk[kChunk * kLanes];
  return decode_groups(
      classes, level, payload, size, rows, cols, [&](size_t, size_t) { return chunk; },
      [&](size_t g, size_t first, size_t n, const float* z) {
        const size_t width = std::min<size_t>(kLanes, cols - g * kLanes);
        float* to = out + first * cols + g * kLanes;
        for (size_t r = 0; r < n; ++r, to += cols, z += kLanes) {
          std::memcpy(to, z, width * sizeof(float));
        }
      });
}

// Decode the rows of tiles `first` to `end` − 1 of the matrix into `out`, of `type`, columns in the
// matrix's own order. On failure `*failed` is the tile.
int ectcq_decode_column_matrix(int level, const ColumnClass* columns, size_t count, int32_t states,
                               const uint8_t* of_group, const MatrixView* matrix, int type,
                               void* out, int threads, size_t* failed) {
  const MatrixView& m = *matrix;
  *failed = m.first;
  int status = check_columns(m);
  if (status != kOk) return status;
  Classes classes;
  status = classes.fill(columns, count, states, of_group, m.cols);
  if (status != kOk) return status;
  const Shape shape(m);
  std::unique_ptr<uint32_t[]> places;
  if (m.column_order) {
    places = positions_of(m, &status);
    if (status != kOk) return status;
    for (size_t j = 0; j < m.cols; ++j) {
      const size_t position = places[j];
      // Columns of the last group get any place here: assemble_row puts them in later.
      places[j] =
          position < shape.whole * kLanes ? static_cast<uint32_t>(shape.place(position)) : 0;
    }
  }
  const bool wide = type == kFloat32;
  const size_t floats = kChunk * kLanes + shape.floats + (wide ? 0 : m.cols);
  return for_tiles(m, threads, floats * sizeof(float), failed, [&](size_t i, uint8_t* buffer) {
    const int checked = check_tile(m, i);
    if (checked != kOk) return checked;
    float* chunk = reinterpret_cast<float*>(buffer);
    float* tile = chunk + kChunk * kLanes;
    const size_t first = m.first_row(i), rows = m.first_row(i + 1) - first;
    float* rest = tile + shape.whole * shape.stride;
    const int decoded = decode_groups(
        classes, level, m.payload(i), m.payload_sizes[i], rows, m.cols,
        [&](size_t g, size_t r) {
          return g < shape.whole ? tile + g * shape.stride + r * kLanes : chunk;
        },
        [&](size_t g, size_t r, size_t n, const float* z) {
          if (g < shape.whole) return;
          for (size_t k = 0; k < n; ++k) {
            std::memcpy(rest + (r + k) * shape.rest, z + k * kLanes, shape.rest * sizeof(float));
          }
        });
    if (decoded != kOk) return decoded;
    float* floats_out = static_cast<float*>(out) + (wide ? m.place(i) : 0);
    uint16_t* halves_out = static_cast<uint16_t*>(out) + (wide ? 0 : m.place(i));
    float* row = tile + shape.floats;
    for (size_t r = 0; r < rows; ++r) {
      if (wide) row = floats_out + r * m.cols;
      assemble_row(level, shape, tile, m, places.get(), r, row);
      scale_rows(m, first + r, first + r + 1, row);
      if (!wide) narrow(level, row, m.cols, type, halves_out + r * m.cols);
    }
    return for_outliers(m.payload(i) + m.payload_sizes[i], m.outlier_sizes[i], m.type, m.weights(i),
                        [&](size_t position, const uint8_t* stored) {
                          const float value = stored_value(stored, m.type);
                          if (wide) {
                            floats_out[position] = value;
                          } else {
                            narrow(level, &value, 1, type, halves_out + position);
                          }
                        });
  });
}

// As ectcq_multiply_matrix, columns of `scaled` in the matrix's own order. No more of W is stored
// than a chunk for each thread.
int ectcq_multiply_column_matrix(int level, const ColumnClass* columns, size_t count,
                                 int32_t states, const uint8_t* of_group, const MatrixView* matrix,
                                 const float* scaled, size_t tokens, float* y, int threads,
                                 size_t* failed) {
  const MatrixView& m = *matrix;
  *failed = m.first;
  int status = check_columns(m);
  if (status != kOk) return status;
  Classes classes;
  status = classes.fill(columns, count, states, of_group, m.cols);
  if (status != kOk) return status;
  const auto positions = positions_of(m, &status);
  if (status != kOk) return status;
  const size_t width = groups_of(m.cols) * kLanes;
  const auto x = allocate<float>(tokens * width);
  if (!x) return kNoMemory;
  for (size_t t = 0; t < tokens; ++t) {
    float* row = x.get() + t * width;
    for (size_t j = 0; j < m.cols; ++j) row[positions[j]] = scaled[t * m.cols + j];
    std::fill(row + m.cols, row + width, 0.0f);  // what is thrown away
  }
#if defined(CODECS_X86)
  const auto add_products = level >= kAvx2 ? add_products_avx2 : add_products_plain;
#else
  const auto add_products = add_products_plain;
#endif
  const size_t bytes = kChunk * kLanes * sizeof(float);
  return for_tiles(m, threads, bytes, failed, [&](size_t i, uint8_t* buffer) {
    const int checked = check_tile(m, i);
    if (checked != kOk) return checked;
    Outliers outliers;
    const int read = outliers.read(m, i, positions.get());
    if (read != kOk) return read;
    float* chunk = reinterpret_cast<float*>(buffer);
    const size_t first = m.first_row(i), rows = m.first_row(i + 1) - first;
    for (size_t t = 0; t < tokens; ++t) std::fill_n(y + t * m.rows + first, rows, 0.0f);
    const int decoded = decode_groups(
        classes, level, m.payload(i), m.payload_sizes[i], rows, m.cols,
        [&](size_t, size_t) { return chunk; },
        [&](size_t g, size_t r, size_t n, float* z) {
          outliers.put(g, r, n, z);
          for (size_t t = 0; t < tokens; ++t) {
            add_products(z, n, x.get() + t * width + g * kLanes, y + t * m.rows + first + r);
          }
        });
    if (decoded != kOk) return decoded;
    for (size_t t = 0; t < tokens; ++t) {
      for (size_t r = first; r < first + rows; ++r)
        y[t * m.rows + r] *= m.row_scale[r * m.row_stride];
    }
    return static_cast<int>(kOk);
  });
}

}  // extern "C"
#pragma GCC visibility pop
