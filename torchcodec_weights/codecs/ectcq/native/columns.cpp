// The C interface to streams by columns: one payload, whole matrices, products.

#include "columns.h"

#if defined(CODECS_X86)
#include <immintrin.h>
#endif

#include <iterator>
#include <memory>
#include <new>

#include "common/native/matrix.h"
#include "products.h"
#include "together.h"
#include "trellis.h"

namespace ectcq {
namespace {

template <typename Value>
std::unique_ptr<Value[]> allocate(size_t count) {
  return std::unique_ptr<Value[]>(new (std::nothrow) Value[count]);
}

// Null where a class has too many values, or the level has no such kernel.
StepsFunction few_values(int level, size_t values) {
#if defined(CODECS_X86)
  if (level >= kAvx512) return few_values_avx512(values);
  if (level == kAvx2) return few_values_avx2(values);
#endif
  (void)level;
  (void)values;
  return nullptr;
}

// check_sizes, and what streams by columns need besides.
int check_columns(const MatrixView& m) {
  const int sizes = check_sizes(m);
  if (sizes != kOk) return sizes;
  // Places in a tile as Shape lays it out then have 32 bits.
  return ((m.rows + m.tiles - 1) / m.tiles + 8) * m.cols <= INT32_MAX ? kOk : kBadHeader;
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

// Columns are put in their own order four rows at a time: the four weights of a column lie side by
// side, so that one load gets them, and go to their rows in a transposition of registers. With a
// gather for each weight, a matrix took 1.3 times as long.
constexpr size_t kRows = 4;

// Where a lane's four weights lie in those of its group: as a transposition of two registers of
// eight lanes leaves them.
constexpr size_t slot_of(size_t lane) { return (lane & 24) | (lane & 3) << 1 | (lane >> 2 & 1); }

// A decoded tile before its columns are put in their own order. Whole groups lie one after the
// other, [blocks of 4 rows][32 slots][4] each, `stride` apart; the last columns, fewer than 32, lie
// behind them, [rows][rest]. Padded to 32 they would take up to 32 times the memory of the weights.
struct Shape {
  size_t whole;  // groups
  size_t rest;   // columns of the last group, if it is not whole
  size_t
      stride;  // an odd number of blocks, as those of all groups would else lie in few cache sets
  size_t floats;

  explicit Shape(const MatrixView& m) : whole(m.cols / kLanes), rest(m.cols % kLanes) {
    const size_t rows = (m.rows + m.tiles - 1) / m.tiles;
    stride = ((rows + kRows - 1) / kRows | 1) * kRows * kLanes;
    floats = whole * stride + rows * rest;
  }

  // Of the weight in row 0 at a position of whole groups.
  size_t place(size_t position) const {
    return position / kLanes * stride + slot_of(position % kLanes) * kRows;
  }
};

// Rows of a group, [rows][32], to blocks. Of the last block's rows only those that there are.
void pack_plain(const float* z, size_t rows, float* blocks) {
  for (size_t r = 0; r < rows; ++r) {
    float* block = blocks + r / kRows * kRows * kLanes + r % kRows;
    for (size_t l = 0; l < kLanes; ++l) block[slot_of(l) * kRows] = z[r * kLanes + l];
  }
}

// What a block of four rows is multiplied by, and what is added.
struct Scales {
  float row[kRows];
  float zero[kRows];
  bool has_zero;
  const float* columns;  // [j · column_stride]
  size_t column_stride;
};

// Columns `first` to `last` − 1 of four rows in their own order, scaled, to out[r · stride + j − first].
void assemble_plain(const float* block, const uint32_t* places, const Scales& scales, size_t first,
                    size_t last, float* out, size_t stride) {
  for (size_t j = first; j < last; ++j, ++out) {
    const float* z = block + places[j];
    for (size_t r = 0; r < kRows; ++r) {
      float value = z[r] * scales.row[r] * scales.columns[j * scales.column_stride];
      if (scales.has_zero) value += scales.zero[r];
      out[r * stride] = value;
    }
  }
}

#if defined(CODECS_X86)
__attribute__((target("avx2"))) inline void transpose(__m256 (&v)[4]) {
  const __m256 a = _mm256_unpacklo_ps(v[0], v[1]), b = _mm256_unpackhi_ps(v[0], v[1]);
  const __m256 c = _mm256_unpacklo_ps(v[2], v[3]), d = _mm256_unpackhi_ps(v[2], v[3]);
  v[0] = _mm256_shuffle_ps(a, c, 0x44);
  v[1] = _mm256_shuffle_ps(a, c, 0xEE);
  v[2] = _mm256_shuffle_ps(b, d, 0x44);
  v[3] = _mm256_shuffle_ps(b, d, 0xEE);
}

__attribute__((target("avx2"))) void pack_avx2(const float* z, size_t rows, float* blocks) {
  size_t r = 0;
  for (; r + kRows <= rows; r += kRows, z += kRows * kLanes, blocks += kRows * kLanes) {
#pragma GCC unroll 4
    for (int l = 0; l < kLanes; l += 8) {
      __m256 v[4];
      for (int k = 0; k < 4; ++k) v[k] = _mm256_loadu_ps(z + k * kLanes + l);
      transpose(v);
      for (int k = 0; k < 4; ++k) _mm256_storeu_ps(blocks + l * 4 + k * 8, v[k]);
    }
  }
  pack_plain(z, rows - r, blocks);
}

__attribute__((target("avx2"))) void assemble_avx2(const float* block, const uint32_t* places,
                                                   const Scales& scales, size_t first, size_t last,
                                                   float* out, size_t stride) {
  __m256 row[4], zero[4];
  for (int r = 0; r < 4; ++r) {
    row[r] = _mm256_set1_ps(scales.row[r]);
    zero[r] = _mm256_set1_ps(scales.zero[r]);
  }
  size_t j = first;
  for (; j + 8 <= last; j += 8, out += 8) {
    __m256 v[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      v[k] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(block + places[j + k])),
                                  _mm_loadu_ps(block + places[j + k + 4]), 1);
    }
    transpose(v);
    const __m256 column = scales.column_stride ? _mm256_loadu_ps(scales.columns + j)
                                               : _mm256_set1_ps(scales.columns[0]);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      __m256 value = _mm256_mul_ps(_mm256_mul_ps(v[r], row[r]), column);
      if (scales.has_zero) value = _mm256_add_ps(value, zero[r]);
      _mm256_storeu_ps(out + static_cast<size_t>(r) * stride, value);
    }
  }
  assemble_plain(block, places, scales, j, last, out, stride);
}
#endif

// y[r] += Σ_l z[r][l] · x[l]
void add_products(const float* z, size_t rows, const float* x, float* y) {
  for (size_t r = 0; r < rows; ++r, z += kLanes) {
    float sums[8] = {};
    for (int l = 0; l < kLanes; ++l) sums[l % 8] += z[l] * x[l];
    y[r] +=
        ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
  }
}

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

  // Whether rows `first` to `first` + count − 1 of a group have one. Called as `put` is, before it.
  bool any(size_t group, size_t first, size_t count) {
    if (!list_) return false;
    if (first == 0) next_ = begins_[group + 1];
    return next_ > begins_[group] && list_[next_ - 1].row < first + count;
  }

  // Call each(exact, z) for those of rows `first` to `first` + count − 1 of a group, with their places.
  // Called for rows in increasing order.
  template <typename Each>
  void for_rows(size_t group, size_t first, size_t count, float* z, Each each) {
    if (!list_) return;
    if (first == 0) next_ = begins_[group + 1];
    for (; next_ > begins_[group]; --next_) {
      const Exact& exact = list_[next_ - 1];
      if (exact.row >= first + count) break;
      each(exact, z[(exact.row - first) * kLanes + exact.lane]);
    }
  }

  // Put those of such rows in their places.
  void put(size_t group, size_t first, size_t count, float* z) {
    for_rows(group, first, count, z, [](const Exact& exact, float& there) { there = exact.value; });
  }

 private:
  std::unique_ptr<size_t[]> begins_;
  std::unique_ptr<Exact[]> list_;
  size_t next_ = 0;  // one past the outlier to be put next
};

// ectcq_decode_column_matrix where all classes are searched and tiles are no lower than a strip. A tile
// is kept as indices, a byte for a weight, until its columns are put in their own order: four tiles of
// floats would not stay in the second-level cache.
int decode_together(const MatrixView& m, const Kernels& by, const Classes& classes,
                    const uint32_t* positions, int level, int type, void* out, int threads,
                    size_t* failed) {
  const size_t together = tiles_together(by, m), width = item_size(type);
  const size_t groups = groups_of(m.cols);
  const size_t most = ((m.rows + m.tiles - 1) / m.tiles + kStripRows - 1) / kStripRows * kStripRows;
  const size_t strip_floats = groups * kLanes * kStripRows;
  const size_t tile_bytes = groups * most * kLanes;
  const auto scales = allocate<float>(groups * kLanes);
  const auto places = allocate<uint32_t>(m.cols);
  if (!scales || !places) return kNoMemory;
  std::fill_n(scales.get(), groups * kLanes, 0.0f);
  for (size_t j = 0; j < m.cols; ++j) {
    scales[positions[j]] = m.col_scale[j * m.col_stride];
    places[j] = positions[j] * static_cast<uint32_t>(kStripRows);
  }
  return for_runs(
      m, threads, together, strip_floats * sizeof(float) + together * tile_bytes, failed,
      [&](size_t i, size_t count, uint8_t* buffer, size_t* bad) {
        int status = check_tiles(m, i, count, bad);
        if (status != kOk) return status;
        float* strip = reinterpret_cast<float*>(buffer);
        uint8_t* tiles = buffer + strip_floats * sizeof(float);
        Coded coded[kTogether];
        for (size_t s = 0; s < count; ++s) coded[s] = Coded(m, i + s);
        status = decode_groups_together(
            by, classes, coded, count, m.cols, nullptr, bad,
            [](size_t, size_t) { return Sink::kIndices; },
            [&](size_t s, size_t g, size_t r) {
              return reinterpret_cast<float*>(tiles + s * tile_bytes + (g * most + r) * kLanes);
            },
            [](size_t, size_t, size_t, size_t, const float*) {});
        *bad += i;
        for (size_t s = 0; status == kOk && s < count; ++s) {
          *bad = i + s;
          uint8_t* tile_out = static_cast<uint8_t*>(out) + m.place(i + s) * width;
          for (size_t r = 0; r < coded[s].rows; r += kStripRows) {
            const size_t height = std::min(kStripRows, coded[s].rows - r);
            float row[kStripRows] = {}, zero[kStripRows] = {};
            for (size_t k = 0; k < height; ++k) {
              const size_t own = m.first_row(i + s) + r + k;
              row[k] = m.row_scale[own * m.row_stride];
              if (m.zero_point) zero[k] = m.zero_point[own];
            }
            for (size_t g = 0; g < groups; ++g) {
              by.expand(classes.tables[classes.of_group[g]].search,
                        tiles + s * tile_bytes + (g * most + r) * kLanes, row,
                        scales.get() + g * kLanes, m.zero_point ? zero : nullptr,
                        strip + g * kLanes * kStripRows);
            }
            by.assemble(strip, places.get(), m.cols, height, type, tile_out + r * m.cols * width);
          }
          status = for_outliers(
              m.payload(i + s) + m.payload_sizes[i + s], m.outlier_sizes[i + s], m.type,
              m.weights(i + s), [&](size_t position, const uint8_t* stored) {
                put_value(stored_value(stored, m.type), level, type, tile_out + position * width);
              });
        }
        return status;
      });
}

// multiply_columns, with `x` in coded order, [tokens][width]. Products with one token are added up as
// weights are decoded, which are not stored then, but for chunks that have outliers not corrected for.
int multiply_together(const MatrixView& m, const Kernels& by, const Classes& classes,
                      const uint32_t* positions, const Corrections& corrections, const float* x,
                      size_t tokens, float* y, int threads, size_t* failed) {
  const size_t together = tiles_together(by, m), width = groups_of(m.cols) * kLanes;
  const size_t most = (m.rows + m.tiles - 1) / m.tiles;
  const bool one = tokens == 1;
  const size_t floats = together * (kChunk * kLanes + (one ? most * kSums : 0));
  return for_runs(
      m, threads, together, floats * sizeof(float), failed,
      [&](size_t i, size_t count, uint8_t* buffer, size_t* bad) {
        Outliers outliers[kTogether];
        Coded coded[kTogether];
        int status = check_tiles(m, i, count, bad);
        for (size_t s = 0; status == kOk && s < count; ++s) {
          *bad = i + s;
          coded[s] = Coded(m, i + s);
          if (!one || !corrections.list) status = outliers[s].read(m, i + s, positions);
        }
        if (status != kOk) return status;
        float* chunks = reinterpret_cast<float*>(buffer);
        float* sums = chunks + together * kChunk * kLanes;
        const auto sums_at = [&](size_t s, size_t r) { return sums + (s * most + r) * kSums; };
        const size_t begin = m.first_row(i), end = m.first_row(i + count);
        if (one) {
          std::fill_n(sums, together * most * kSums, 0.0f);
        } else {
          for (size_t t = 0; t < tokens; ++t)
            std::fill(y + t * m.rows + begin, y + t * m.rows + end, 0.0f);
        }
        bool fused = false;
        status = decode_groups_together(
            by, classes, coded, count, m.cols, x, bad,
            [&](size_t g, size_t r) {
              fused = one;
              for (size_t s = 0; s < count; ++s) fused = !outliers[s].any(g, r, kChunk) && fused;
              return fused ? Sink::kSums : Sink::kValues;
            },
            [&](size_t s, size_t, size_t r) {
              return fused ? sums_at(s, r) : chunks + s * kChunk * kLanes;
            },
            [&](size_t s, size_t g, size_t r, size_t n, float* z) {
              if (fused) return;
              outliers[s].put(g, r, n, z);
              if (one) return by.accumulate(z, n, x + g * kLanes, sums_at(s, r));
              float* to = y + m.first_row(i + s) + r;
              for (size_t t = 0; t < tokens; ++t) {
                by.add_products(z, n, x + t * width + g * kLanes, to + t * m.rows);
              }
            });
        *bad += i;
        if (status != kOk) return status;
        for (size_t s = 0; one && s < count; ++s) {
          for (size_t r = 0; r < coded[s].rows; ++r) {
            y[m.first_row(i + s) + r] = sum_of(sums_at(s, r));
          }
          if (!corrections.list) continue;
          for (auto c = corrections.begin(m, i + s); c < corrections.end(m, i + s); ++c) {
            y[c->row] += c->value * x[c->column];
          }
        }
        for (size_t t = 0; t < tokens; ++t) {
          for (size_t r = begin; r < end; ++r) y[t * m.rows + r] *= m.row_scale[r * m.row_stride];
        }
        return static_cast<int>(kOk);
      });
}

}  // namespace

int Classes::fill(int level, const ColumnClass* classes, size_t count, int32_t states,
                  const uint8_t* groups, size_t cols) {
  const Trellis* trellis = nullptr;
  for (const Trellis& one : kTrellises) {
    if (one.states == states) trellis = &one;
  }
  if (!trellis || count < 1 || count > UINT8_MAX) return kBadHeader;
  of_group = groups;
  for (size_t g = 0; g < groups_of(cols); ++g) {
    if (groups[g] >= count) return kBadHeader;
  }
  // Kept from call to call, as new memory costs more time than filling it.
  thread_local std::unique_ptr<ClassTables[]> kept;
  thread_local size_t capacity = 0;
  if (capacity < count) {
    kept = allocate<ClassTables>(count);
    capacity = kept ? count : 0;
    if (!kept) return kNoMemory;
  }
  tables = kept.get();
  searched = true;
  for (size_t c = 0; c < count; ++c) {
    Tables& made = tables[c].tables;
    made.feedback = trellis->h0 >> 1;
    made.input = trellis->h1 >> 1;
    const Kernels* by = kernels_at(level);
    tables[c].searched = by && tables[c].search.fill(*by, classes[c], made.feedback, made.input);
    searched = searched && tables[c].searched;
    if (tables[c].searched) {
      // Half of the slots would be written in as much time as a small matrix takes.
      for (const uint16_t (&frequency)[kSymbols] : classes[c].frequency) {
        uint32_t sum = 0;
        for (const uint16_t own : frequency) {
          if (own == kSlots) return kBadHeader;
          sum += own;
        }
        if (sum != kSlots) return kBadHeader;
      }
      continue;
    }
    uint32_t begin[2], size[2];  // of the symbols that occur, both even
    for (int q = 0; q < 2; ++q) {
      const uint16_t* frequency = classes[c].frequency[q];
      uint32_t first = 0, last = kSymbols;
      while (first < kSymbols && !frequency[first]) ++first;
      while (last > first && !frequency[last - 1]) --last;
      begin[q] = first & ~1u;
      size[q] = (last - begin[q] + 1) & ~1u;
    }
    tables[c].steps = few_values(level, size[0] + size[1]);
    const bool few = tables[c].steps != nullptr;
    if (!few) tables[c].steps = steps_function(level);
    std::fill(std::begin(made.values), std::end(made.values), 0.0f);
    for (uint32_t q = 0; q < 2; ++q) {
      uint32_t* slots = made.slots + q * kSlots;
      uint32_t start = 0;
      for (uint32_t symbol = 0; symbol < kSymbols; ++symbol) {
        const uint32_t frequency = classes[c].frequency[q][symbol];
        if (!frequency) continue;
        // A slot has twelve bits for it, which do not hold all of them.
        if (frequency == kSlots || frequency > kSlots - start) return kBadHeader;
        const uint32_t index = few ? symbol - begin[q] + (q ? size[0] : 0) : symbol;
        uint32_t* to = slots + start;
        for (uint32_t k = 0; k < frequency; ++k) to[k] = slot_entry(frequency, k, index);
        start += frequency;
        made.values[index | q * kSymbols] = classes[c].values[q][symbol];
        if (few) made.values[index] = classes[c].values[q][symbol];
      }
      if (start != kSlots) return kBadHeader;
    }
  }
  return kOk;
}

int multiply_columns(int level, const ColumnClass* columns, size_t count, int32_t states,
                     const uint8_t* of_group, const Corrections& corrections, const MatrixView& m,
                     const float* scaled, size_t tokens, float* y, int threads, size_t* failed) {
  *failed = m.first;
  int status = check_columns(m);
  if (status != kOk) return status;
  Classes classes;
  status = classes.fill(level, columns, count, states, of_group, m.cols);
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
  if (const Kernels* by = kernels_at(level)) {
    return multiply_together(m, *by, classes, positions.get(), corrections, x.get(), tokens, y,
                             threads, failed);
  }
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
        classes, m.payload(i), m.payload_sizes[i], rows, m.cols,
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

int correct_columns(int level, const Linear& layer, size_t* begins, Correction* list) {
  const MatrixView& m = layer.matrix;
  const Kernels* by = kernels_at(level);
  int status = by ? check_columns(m) : kBadHeader;
  if (status != kOk) return status;
  Classes classes;
  status =
      classes.fill(level, layer.classes, layer.class_count, layer.states, layer.of_group, m.cols);
  if (status != kOk) return status;
  const auto positions = positions_of(m, &status);
  if (status != kOk) return status;
  alignas(64) float chunk[kChunk * kLanes];
  size_t count = begins[0] = 0;
  for (size_t i = m.first; i < m.end; ++i) {
    Outliers outliers;
    status = check_tile(m, i);
    if (status == kOk) status = outliers.read(m, i, positions.get());
    if (status != kOk) return status;
    const Coded coded(m, i);
    size_t bad;
    status = decode_groups_together(
        *by, classes, &coded, 1, m.cols, nullptr, &bad,
        [](size_t, size_t) { return Sink::kValues; }, [&](size_t, size_t, size_t) { return chunk; },
        [&](size_t, size_t g, size_t first, size_t n, float* z) {
          outliers.for_rows(g, first, n, z, [&](const Exact& exact, float there) {
            list[count++] = {static_cast<uint32_t>(m.first_row(i)) + exact.row,
                             static_cast<uint32_t>(g * kLanes) + exact.lane, exact.value - there};
          });
        });
    if (status != kOk) return status;
    begins[i + 1 - m.first] = count;
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
  const int status = classes.fill(level, columns, count, states, of_group, cols);
  if (status != kOk) return status;
  alignas(64) float chunk[kChunk * kLanes];
  const auto put = [&](size_t g, size_t first, size_t n, const float* z) {
    const size_t width = std::min<size_t>(kLanes, cols - g * kLanes);
    float* to = out + first * cols + g * kLanes;
    for (size_t r = 0; r < n; ++r, to += cols, z += kLanes) {
      std::memcpy(to, z, width * sizeof(float));
    }
  };
  if (const Kernels* by = kernels_at(level)) {
    const Coded coded{payload, size, rows};
    size_t bad;
    return decode_groups_together(
        *by, classes, &coded, 1, cols, nullptr, &bad, [](size_t, size_t) { return Sink::kValues; },
        [&](size_t, size_t, size_t) { return chunk; },
        [&](size_t, size_t g, size_t first, size_t n, const float* z) { put(g, first, n, z); });
  }
  return decode_groups(
      classes, payload, size, rows, cols, [&](size_t, size_t) { return chunk; }, put);
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
  status = classes.fill(level, columns, count, states, of_group, m.cols);
  if (status != kOk) return status;
  const Shape shape(m);
  const auto places = positions_of(m, &status);
  if (status != kOk) return status;
  const Kernels* by = kernels_at(level);
  if (by && by->expand && classes.searched && shape.whole && m.rows / m.tiles >= kStripRows) {
    return decode_together(m, *by, classes, places.get(), level, type, out, threads, failed);
  }
  for (size_t j = 0; j < m.cols; ++j) {
    const size_t position = places[j];
    // Columns of the last group get any place here, and are put in later.
    places[j] = position < shape.whole * kLanes ? static_cast<uint32_t>(shape.place(position)) : 0;
  }
#if defined(CODECS_X86)
  const auto pack = level >= kAvx2 ? pack_avx2 : pack_plain;
  const auto assemble = level >= kAvx2 ? assemble_avx2 : assemble_plain;
#else
  const auto pack = pack_plain;
  const auto assemble = assemble_plain;
#endif
  const bool wide = type == kFloat32;
  constexpr size_t kStrip = 512;  // columns
  const auto put_group = [&](size_t g, size_t r, size_t n, const float* z, float* tile) {
    if (g < shape.whole) return pack(z, n, tile + g * shape.stride + r * kLanes);
    float* rest = tile + shape.whole * shape.stride;
    for (size_t k = 0; k < n; ++k) {
      std::memcpy(rest + (r + k) * shape.rest, z + k * kLanes, shape.rest * sizeof(float));
    }
  };
  // A tile's weights in their own order, scaled, with its outliers.
  const auto finish = [&](size_t i, const float* tile, float* strip) {
    const float* rest = tile + shape.whole * shape.stride;
    const size_t first = m.first_row(i), rows = m.first_row(i + 1) - first;
    float* floats_out = static_cast<float*>(out) + (wide ? m.place(i) : 0);
    uint16_t* halves_out = static_cast<uint16_t*>(out) + (wide ? 0 : m.place(i));
    const auto put = [&](size_t place, const float* values, size_t count) {
      if (wide) {
        std::memcpy(floats_out + place, values, count * sizeof(float));
      } else {
        narrow(level, values, count, type, halves_out + place);
      }
    };
    for (size_t r = 0; r < rows; r += kRows) {
      const size_t height = std::min(kRows, rows - r);
      Scales scales{{}, {}, m.zero_point != nullptr, m.col_scale, m.col_stride};
      for (size_t k = 0; k < height; ++k) {
        scales.row[k] = m.row_scale[(first + r + k) * m.row_stride];
        if (m.zero_point) scales.zero[k] = m.zero_point[first + r + k];
      }
      const float* block = tile + r * kLanes;
      for (size_t j = 0; shape.whole && j < m.cols; j += kStrip) {
        const size_t end = std::min(m.cols, j + kStrip);
        if (wide && height == kRows) {
          assemble(block, places.get(), scales, j, end, floats_out + r * m.cols + j, m.cols);
          continue;
        }
        assemble(block, places.get(), scales, j, end, strip, kStrip);
        for (size_t k = 0; k < height; ++k) put((r + k) * m.cols + j, strip + k * kStrip, end - j);
      }
      for (size_t k = 0; k < height; ++k) {
        for (size_t l = 0; l < shape.rest; ++l) {
          const size_t position = shape.whole * kLanes + l;
          const size_t j = m.column_order ? m.column_order[position] : position;
          float value =
              rest[(r + k) * shape.rest + l] * scales.row[k] * m.col_scale[j * m.col_stride];
          if (m.zero_point) value += scales.zero[k];
          put((r + k) * m.cols + j, &value, 1);
        }
      }
    }
    return for_outliers(m.payload(i) + m.payload_sizes[i], m.outlier_sizes[i], m.type, m.weights(i),
                        [&](size_t position, const uint8_t* stored) {
                          const float value = stored_value(stored, m.type);
                          put(position, &value, 1);
                        });
  };
  constexpr size_t kKept = 1 << 18;  // floats that a second-level cache keeps
  const size_t kept = std::max<size_t>(1, kKept / std::max<size_t>(1, shape.floats));
  const size_t together = by ? std::min(kept, tiles_together(*by, m)) : 1;
  const size_t own = kRows * kStrip + together * (kChunk * kLanes + shape.floats);
  return for_runs(
      m, threads, together, own * sizeof(float), failed,
      [&](size_t i, size_t count, uint8_t* buffer, size_t* bad) {
        float* strip = reinterpret_cast<float*>(buffer);
        float* chunks = strip + kRows * kStrip;
        float* tiles = chunks + together * kChunk * kLanes;
        int result = check_tiles(m, i, count, bad);
        if (result != kOk) return result;
        if (by) {
          Coded coded[kTogether];
          for (size_t s = 0; s < count; ++s) coded[s] = Coded(m, i + s);
          result = decode_groups_together(
              *by, classes, coded, count, m.cols, nullptr, bad,
              [](size_t, size_t) { return Sink::kValues; },
              [&](size_t s, size_t, size_t) { return chunks + s * kChunk * kLanes; },
              [&](size_t s, size_t g, size_t r, size_t n, const float* z) {
                put_group(g, r, n, z, tiles + s * shape.floats);
              });
          *bad += i;
        } else {
          result = decode_groups(
              classes, m.payload(i), m.payload_sizes[i], m.first_row(i + 1) - m.first_row(i),
              m.cols, [&](size_t, size_t) { return chunks; },
              [&](size_t g, size_t r, size_t n, const float* z) { put_group(g, r, n, z, tiles); });
        }
        for (size_t s = 0; result == kOk && s < count; ++s) {
          *bad = i + s;
          result = finish(i + s, tiles + s * shape.floats, strip);
        }
        return result;
      });
}

// As ectcq_multiply_matrix, columns of `scaled` in the matrix's own order. No more of W is stored
// than a chunk for each thread.
int ectcq_multiply_column_matrix(int level, const ColumnClass* columns, size_t count,
                                 int32_t states, const uint8_t* of_group, const MatrixView* matrix,
                                 const float* scaled, size_t tokens, float* y, int threads,
                                 size_t* failed) {
  return multiply_columns(level, columns, count, states, of_group, {}, *matrix, scaled, tokens, y,
                          threads, failed);
}

}  // extern "C"
#pragma GCC visibility pop
