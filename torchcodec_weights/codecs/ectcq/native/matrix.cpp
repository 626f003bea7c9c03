// Whole matrices of ECTCQ: decoded and scaled, or multiplied by.

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "common/native/matrix.h"
#include "products.h"
#include "stream.h"
#include "together.h"

namespace ectcq {
namespace {

void scale_rows(const MatrixView& m, size_t first, size_t last, float* z) {
  for (size_t i = first; i < last; ++i, z += m.cols) {
    const float scale = m.row_scale[i * m.row_stride];
    if (m.col_stride) {
      for (size_t j = 0; j < m.cols; ++j) z[j] = z[j] * scale * m.col_scale[j];
    } else {
      for (size_t j = 0; j < m.cols; ++j) z[j] = z[j] * scale * m.col_scale[0];
    }
    if (m.zero_point) {
      for (size_t j = 0; j < m.cols; ++j) z[j] += m.zero_point[i];
    }
  }
}

float dot(const float* a, const float* b, size_t n) {
  float sums[16] = {};
  size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (size_t k = 0; k < 16; ++k) sums[k] += a[i + k] * b[i + k];
  }
  float sum = 0;
  for (; i < n; ++i) sum += a[i] * b[i];
  for (const float lane : sums) sum += lane;
  return sum;
}

// An outlier's value, to be multiplied by scaled activations.
float unscaled(const MatrixView& m, size_t tile, size_t position, const uint8_t* value) {
  const size_t row = m.first_row(tile) + position / m.cols;
  const float scale =
      m.row_scale[row * m.row_stride] * m.col_scale[position % m.cols * m.col_stride];
  const float offset = m.zero_point ? m.zero_point[row] : 0.0f;
  return (stored_value(value, m.type) - offset) / scale;
}

// Check tile `i` and decode it into `z`, not scaled.
int decode_tile(const MatrixView& m, const Tables& tables, StepsFunction steps, size_t i,
                float* z) {
  const int status = check_tile(m, i);
  if (status != kOk) return status;
  return decode_by_slots(tables, steps, m.payload(i), m.payload_sizes[i], m.weights(i), z);
}

// Tiles of a matrix, or parts of tiles, that are decoded together.
class Run {
 public:
  // Check tiles `tile` to `tile` + count − 1 and begin with their first rows. On failure `*bad` is the
  // tile.
  int begin(const MatrixView& m, size_t tile, size_t count, size_t* bad) {
    count_ = count;
    const int checked = check_tiles(m, tile, count, bad);
    for (size_t s = 0; checked == kOk && s < count; ++s) {
      *bad = tile_[s] = tile + s;
      first_row_[s] = m.first_row(tile + s);
      first_[s] = 0;
      weights_[s] = m.weights(tile + s);
      const int begun = begin_stream(streams_[s], m.payload(tile + s), m.payload_sizes[tile + s],
                                     steps_of(weights_[s]));
      if (begun != kOk) return begun;
      until_[s] = streams_[s].end;
    }
    return checked;
  }

  // Begin with parts `unit` to `unit` + count − 1 of all parts, of tiles that others check; of tiles that
  // are not divided as above.
  int begin(const MatrixView& m, const Marks& marks, size_t unit, size_t count, size_t* bad) {
    if (!marks.marks) return begin(m, m.first + unit, count, bad);
    count_ = count;
    for (size_t s = 0; s < count; ++s) {
      const size_t part = (unit + s) % marks.parts;
      tile_[s] = m.first + (unit + s) / marks.parts;
      const size_t row = m.first_row(tile_[s]), rows = m.first_row(tile_[s] + 1) - row;
      const size_t begin = part * rows / marks.parts, end = (part + 1) * rows / marks.parts;
      first_row_[s] = row + begin;
      first_[s] = begin * m.cols;
      weights_[s] = (end - begin) * m.cols;
      const Mark& mark = marks.marks[unit + s];
      const uint8_t* payload = m.payload(tile_[s]);
      Stream& stream = streams_[s];
      std::memcpy(stream.low, mark.low, sizeof(mark.low));
      std::memcpy(stream.high, mark.high, sizeof(mark.high));
      std::memcpy(stream.trellis, mark.trellis, sizeof(mark.trellis));
      stream.reading = mark.reading;
      stream.words = payload + mark.words;
      stream.end = payload + m.payload_sizes[tile_[s]];
      until_[s] = part + 1 < marks.parts ? payload + marks.marks[unit + s + 1].words : stream.end;
    }
    return kOk;
  }

  size_t tile(size_t s) const { return tile_[s]; }
  size_t first_row(size_t s) const { return first_row_[s]; }
  // Position in its tile of the first weight of stream s, and their number.
  size_t first(size_t s) const { return first_[s]; }
  size_t weights(size_t s) const { return weights_[s]; }

  // Calls row(s, r, j, n, z) for n weights from column j on of a row, counted from the first of stream
  // s, and chunk(s, first, n, z) for each chunk before its rows. On failure `*bad` is the tile.
  template <typename Chunk, typename Row>
  int decode(const StepTables& own, size_t cols, float* chunks, size_t* bad, Chunk chunk, Row row) {
    size_t stream = 0;
    const int status =
        decode_rows_together(own, streams_, count_, weights_, until_, chunks, &stream,
                             [&](size_t s, size_t first, size_t n, float* z) {
                               chunk(s, first, n, z);
                               size_t r = first / cols, j = first % cols;
                               for (size_t k = 0, part; k < n; k += part, j = 0, ++r) {
                                 part = std::min(cols - j, n - k);
                                 row(s, r, j, part, z + k);
                               }
                             });
    *bad = tile_[stream];
    return status;
  }

  // Put the products of rows and x, before scales, into y. On failure `*bad` is the tile.
  int multiply(const StepTables& own, size_t cols, const float* x, float* chunks, size_t* bad,
               float* y) {
    size_t stream = 0;
    const int status =
        multiply_rows_together(own, streams_, count_, weights_, until_, cols, x, chunks, &stream,
                               [&](size_t s, size_t first, size_t n, const float* sums) {
                                 float* to = y + first_row_[s] + first;
                                 for (size_t r = 0; r < n; ++r) to[r] = sum_of(sums + r * kSums);
                               });
    *bad = tile_[stream];
    return status;
  }

 private:
  size_t count_ = 0;
  Stream streams_[kTogether];
  const uint8_t* until_[kTogether] = {};
  size_t tile_[kTogether] = {}, first_row_[kTogether] = {}, first_[kTogether] = {};
  size_t weights_[kTogether] = {};
};

// Decoded matrices of so many bytes are in memory rather than in caches when they are used.
constexpr size_t kPastCaches = size_t{1} << 25;

bool has_outliers(const MatrixView& m) {
  return std::any_of(m.outlier_sizes + m.first, m.outlier_sizes + m.end,
                     [](uint32_t size) { return size > 0; });
}

constexpr size_t chunk_floats(size_t tiles) { return tiles * kChunk * kLanes; }

int decode_together(const MatrixView& m, const StepTables& own, int level, int type, void* out,
                    int threads, size_t* failed) {
  const size_t together = tiles_together(*own.by, m), width = item_size(type);
  uint8_t* bytes = static_cast<uint8_t*>(out);
  const bool past = (m.first_row(m.end) - m.first_row(m.first)) * m.cols * width >= kPastCaches;
  return for_runs(m, threads, together, chunk_floats(together) * sizeof(float), failed,
                  [&](size_t i, size_t count, uint8_t* buffer, size_t* bad) {
                    Run run;
                    int status = run.begin(m, i, count, bad);
                    if (status != kOk) return status;
                    status = run.decode(
                        own, m.cols, reinterpret_cast<float*>(buffer), bad,
                        [](size_t, size_t, size_t, float*) {},
                        [&](size_t s, size_t r, size_t j, size_t n, const float* z) {
                          const size_t row = run.first_row(s) + r;
                          own.by->scale_row(z, n, m.row_scale[row * m.row_stride],
                                            m.col_scale + j * m.col_stride, m.col_stride,
                                            m.zero_point ? m.zero_point + row : nullptr, type, past,
                                            bytes + (m.place(i + s) + r * m.cols + j) * width);
                        });
                    if (past) std::atomic_thread_fence(std::memory_order_seq_cst);
                    for (size_t s = 0; status == kOk && s < count; ++s) {
                      *bad = i + s;
                      uint8_t* tile = bytes + m.place(i + s) * width;
                      status = for_outliers(m.payload(i + s) + m.payload_sizes[i + s],
                                            m.outlier_sizes[i + s], m.type, m.weights(i + s),
                                            [&](size_t position, const uint8_t* stored) {
                                              put_value(stored_value(stored, m.type), level, type,
                                                        tile + position * width);
                                            });
                    }
                    return status;
                  });
}

// The sum of a tile's rows `begin` to `end` − 1 grows by what outliers add to it.
void add_corrections(const MatrixView& m, const Corrections& corrections, size_t tile, size_t begin,
                     size_t end, const float* x, float* y) {
  const Correction* last = corrections.end(m, tile);
  const Correction* own = std::partition_point(corrections.begin(m, tile), last,
                                               [&](const Correction& c) { return c.row < begin; });
  for (; own < last && own->row < end; ++own) y[own->row] += own->value * x[own->column];
}

// for_runs of all parts of tiles, or of tiles, which `work` checks then. Parts are decoded before all
// checks have ended; if one fails, so does this.
template <typename Work>
int for_parts(const MatrixView& m, const StepTables& own, const Marks& marks, int threads,
              size_t* failed, Work work) {
  const size_t tiles = m.end - m.first, units = tiles * marks.parts;
  const size_t together = std::min(own.by->streams, units);
  const auto check = [&](size_t i, size_t* bad) {
    *bad = m.first + i;
    return check_tile(m, *bad);
  };
  const int status = for_runs(marks.marks ? tiles : 0, check, units, threads, together,
                              chunk_floats(together) * sizeof(float), failed, work);
  if (status == kOk || status == kNoMemory || !marks.marks) return status;
  // Whatever a damaged tile did first, its checksum is what is wrong.
  const int checked = check_tile(m, *failed);
  return checked == kOk ? status : checked;
}

// multiply_together with one token, whose products are added up as weights are decoded. Rows begin
// with a step.
int multiply_one(const MatrixView& m, const StepTables& own, const Marks& marks,
                 const Corrections& corrections, const float* x, float* y, int threads,
                 size_t* failed) {
  return for_parts(
      m, own, marks, threads, failed, [&](size_t unit, size_t count, uint8_t* buffer, size_t* bad) {
        Run run;
        int status = run.begin(m, marks, unit, count, bad);
        if (status != kOk) return status;
        status = run.multiply(own, m.cols, x, reinterpret_cast<float*>(buffer), bad, y);
        for (size_t s = 0; status == kOk && s < count; ++s) {
          const size_t begin = run.first_row(s), end = begin + run.weights(s) / m.cols;
          if (corrections.list) {
            add_corrections(m, corrections, run.tile(s), begin, end, x, y);
          }
          for (size_t r = begin; r < end; ++r) y[r] *= m.row_scale[r * m.row_stride];
        }
        return status;
      });
}

struct Exact {
  size_t position;
  float value;
};

int multiply_together(const MatrixView& m, const StepTables& own, const Marks& marks,
                      const Corrections& corrections, const float* scaled, size_t tokens, float* y,
                      int threads, size_t* failed) {
  const bool known = corrections.list || !has_outliers(m);
  if (tokens == 1 && m.cols % kLanes == 0 && known) {
    return multiply_one(m, own, marks, corrections, scaled, y, threads, failed);
  }
  return for_parts(
      m, own, marks, threads, failed, [&](size_t unit, size_t count, uint8_t* buffer, size_t* bad) {
        Run run;
        int status = run.begin(m, marks, unit, count, bad);
        std::unique_ptr<Exact[]> exact[kTogether];
        size_t found[kTogether] = {}, put[kTogether] = {};
        for (size_t s = 0; status == kOk && s < count; ++s) {
          const size_t i = run.tile(s), size = m.outlier_sizes[i];
          *bad = i;
          if (!size) continue;
          // Each takes two bytes of the section, and more.
          exact[s].reset(new (std::nothrow) Exact[size / 2]);
          if (!exact[s]) return static_cast<int>(kNoMemory);
          status =
              for_outliers(m.payload(i) + m.payload_sizes[i], size, m.type, m.weights(i),
                           [&](size_t position, const uint8_t* value) {
                             const size_t own_position = position - run.first(s);
                             if (own_position >= run.weights(s)) return;
                             exact[s][found[s]++] = {own_position, unscaled(m, i, position, value)};
                           });
        }
        if (status != kOk) return status;
        const size_t begin = run.first_row(0);
        const size_t end = run.first_row(count - 1) + run.weights(count - 1) / m.cols;
        for (size_t t = 0; t < tokens; ++t)
          std::fill(y + t * m.rows + begin, y + t * m.rows + end, 0.0f);
        status = run.decode(
            own, m.cols, reinterpret_cast<float*>(buffer), bad,
            [&](size_t s, size_t first, size_t n, float* z) {
              for (size_t& k = put[s]; k < found[s] && exact[s][k].position < first + n; ++k) {
                z[exact[s][k].position - first] = exact[s][k].value;
              }
            },
            [&](size_t s, size_t r, size_t j, size_t n, const float* z) {
              for (size_t t = 0; t < tokens; ++t) {
                y[t * m.rows + run.first_row(s) + r] += own.by->dot(z, scaled + t * m.cols + j, n);
              }
            });
        if (status != kOk) return status;
        for (size_t t = 0; t < tokens; ++t) {
          for (size_t r = begin; r < end; ++r) y[t * m.rows + r] *= m.row_scale[r * m.row_stride];
        }
        return static_cast<int>(kOk);
      });
}

}  // namespace

int multiply_rows(int level, const Tables& tables, const SearchTables* search, const Marks& marks,
                  const Corrections& corrections, const MatrixView& m, const float* scaled,
                  size_t tokens, float* y, int threads, size_t* failed) {
  *failed = m.first;
  const int sizes = check_sizes(m);
  if (sizes != kOk) return sizes;
  const Kernels* by = kernels_at(level);
  if (by && search) {
    const StepTables own{by, &tables, steps_function(level), search};
    return multiply_together(m, own, marks, corrections, scaled, tokens, y, threads, failed);
  }
  const auto product = by ? by->dot : dot;
  const size_t bytes = largest_tile(m) * sizeof(float);
  return for_tiles(m, threads, bytes, failed, [&](size_t i, uint8_t* buffer) {
    float* z = reinterpret_cast<float*>(buffer);
    const int status = decode_tile(m, tables, steps_function(level), i, z);
    if (status != kOk) return status;
    const size_t first = m.first_row(i), last = m.first_row(i + 1);
    const int outliers = for_outliers(m.payload(i) + m.payload_sizes[i], m.outlier_sizes[i], m.type,
                                      m.weights(i), [&](size_t position, const uint8_t* value) {
                                        z[position] = unscaled(m, i, position, value);
                                      });
    if (outliers != kOk) return outliers;
    for (size_t r = first; r < last; ++r, z += m.cols) {
      for (size_t t = 0; t < tokens; ++t) {
        y[t * m.rows + r] = m.row_scale[r * m.row_stride] * product(z, scaled + t * m.cols, m.cols);
      }
    }
    return static_cast<int>(kOk);
  });
}

}  // namespace ectcq

#pragma GCC visibility push(default)
extern "C" {

using namespace ectcq;

// Decode the rows of tiles `first` to `end` − 1 of the matrix into `out`, of `type`. On failure
// `*failed` is the tile.
int ectcq_decode_matrix(int level, const Tables* tables, const MatrixView* matrix, int type,
                        void* out, int threads, size_t* failed) {
  const MatrixView& m = *matrix;
  *failed = m.first;
  const int sizes = check_sizes(m);
  if (sizes != kOk) return sizes;
  const Kernels* by = kernels_at(level);
  const std::unique_ptr<SearchTables> search(by ? new (std::nothrow) SearchTables : nullptr);
  if (by && !search) return kNoMemory;
  if (by && search->fill(*by, *tables)) {
    const StepTables own{by, tables, steps_function(level), search.get()};
    return decode_together(m, own, level, type, out, threads, failed);
  }
  const size_t bytes = largest_tile(m) * sizeof(float);
  return for_tiles(m, threads, bytes, failed, [&](size_t i, uint8_t* buffer) {
    const size_t count = m.weights(i);
    const bool wide = type == kFloat32;
    float* z = wide ? static_cast<float*>(out) + m.place(i) : reinterpret_cast<float*>(buffer);
    const int status = decode_tile(m, *tables, steps_function(level), i, z);
    if (status != kOk) return status;
    scale_rows(m, m.first_row(i), m.first_row(i + 1), z);
    const int outliers = for_outliers(
        m.payload(i) + m.payload_sizes[i], m.outlier_sizes[i], m.type, count,
        [&](size_t position, const uint8_t* value) { z[position] = stored_value(value, m.type); });
    if (outliers != kOk) return outliers;
    if (!wide) narrow(level, z, count, type, static_cast<uint16_t*>(out) + m.place(i));
    return static_cast<int>(kOk);
  });
}

// How many parts tiles of a layer are to be divided into: so many that eight threads have the streams
// of a loop each, but of no fewer weights than kPart. 1 for a layer that cannot be divided: its stream
// is by columns or not searched, or its rows do not begin with a step.
size_t ectcq_parts(const Linear* layer) {
  constexpr size_t kStreams = 8 * kTogether, kPart = 1 << 13;
  const MatrixView& m = layer->matrix;
  if (!layer->search || m.cols % kLanes || check_sizes(m) != kOk) return 1;
  const size_t tiles = m.end - m.first, rows = m.rows / m.tiles;
  return std::max<size_t>(1,
                          std::min({(kStreams + tiles - 1) / tiles, rows, rows * m.cols / kPart}));
}

size_t ectcq_mark_bytes() { return sizeof(Mark); }

// Decode the tiles of a layer to learn how the streams of ectcq_parts' parts of each begin, into
// `marks`, at a multiple of 64, [tile][part]. Returns a status.
int ectcq_fill_marks(int level, const Linear* layer, size_t parts, void* marks, int threads) {
  const MatrixView& m = layer->matrix;
  const Kernels* by = kernels_at(level);
  const auto search = static_cast<const SearchTables*>(layer->search);
  if (!by || parts > ectcq_parts(layer)) return kBadHeader;
  const StepTables own{by, layer->tables, steps_function(level), search};
  size_t failed;
  const size_t bytes = chunk_floats(1) * sizeof(float);
  return for_tiles(m, threads, bytes, &failed, [&](size_t i, uint8_t* buffer) {
    const size_t rows = m.first_row(i + 1) - m.first_row(i), of_row = m.cols / kLanes;
    Stream stream;
    int status = check_tile(m, i);
    if (status == kOk) {
      status = begin_stream(stream, m.payload(i), m.payload_sizes[i], rows * of_row);
    }
    float* chunk = reinterpret_cast<float*>(buffer);
    Mark* to = static_cast<Mark*>(marks) + (i - m.first) * parts;
    for (size_t part = 0; status == kOk && part < parts; ++part) {
      std::memcpy(to[part].low, stream.low, sizeof(stream.low));
      std::memcpy(to[part].high, stream.high, sizeof(stream.high));
      std::memcpy(to[part].trellis, stream.trellis, sizeof(stream.trellis));
      to[part].words = static_cast<size_t>(stream.words - m.payload(i));
      to[part].reading = stream.reading;
      size_t steps = ((part + 1) * rows / parts - part * rows / parts) * of_row;
      for (size_t n, bad; status == kOk && steps; steps -= n) {
        n = std::min(kChunk, steps);
        status = advance(own, &stream, 1, &n, Sink::kValues, {}, &chunk, &bad);
      }
    }
    return status == kOk && stream.words != stream.end ? static_cast<int>(kTooLong) : status;
  });
}

// Corrections that a layer has, at most; 0 also where its products have no use for them.
size_t ectcq_corrections(int level, const Linear* layer) {
  const MatrixView& m = layer->matrix;
  const bool used =
      layer->tables ? layer->search && m.cols % kLanes == 0 : kernels_at(level) != nullptr;
  size_t most = 0;
  for (size_t i = m.first; used && i < m.end; ++i) {
    most += m.outlier_sizes[i] / (sizeof(uint16_t) + item_size(m.type));
  }
  return most;
}

// Decode the tiles of a layer to learn its corrections, and where those of each tile begin, [tiles + 1].
// Returns a status.
int ectcq_correct(int level, const Linear* layer, size_t* begins, void* corrections) {
  const MatrixView& m = layer->matrix;
  const auto list = static_cast<Correction*>(corrections);
  if (!layer->tables) return correct_columns(level, *layer, begins, list);
  const StepTables own{kernels_at(level), layer->tables, steps_function(level),
                       static_cast<const SearchTables*>(layer->search)};
  if (!own.by || !own.search) return kBadHeader;
  const int sizes = check_sizes(m);
  if (sizes != kOk) return sizes;
  alignas(64) float chunk[chunk_floats(1)];
  size_t count = begins[0] = 0;
  for (size_t i = m.first; i < m.end; ++i) {
    Run run;
    size_t bad;
    int status = run.begin(m, i, 1, &bad);
    if (status != kOk) return status;
    const size_t begin = count;
    status = for_outliers(m.payload(i) + m.payload_sizes[i], m.outlier_sizes[i], m.type,
                          m.weights(i), [&](size_t position, const uint8_t* value) {
                            list[count++] = {static_cast<uint32_t>(position / m.cols),
                                             static_cast<uint32_t>(position % m.cols),
                                             unscaled(m, i, position, value)};
                          });
    if (status != kOk) return status;
    Correction* next = list + begin;
    status = run.decode(
        own, m.cols, chunk, &bad, [](size_t, size_t, size_t, float*) {},
        [&](size_t, size_t r, size_t j, size_t n, const float* z) {
          for (; next < list + count && next->row == r && next->column < j + n; ++next) {
            next->value -= z[next->column - j];
            next->row += static_cast<uint32_t>(m.first_row(i));
          }
        });
    if (status != kOk) return status;
    begins[i + 1 - m.first] = count;
  }
  return kOk;
}

// y[t · rows + i] = Σ_j W[i][j] · x[t · cols + j], where `scaled` is x with each column multiplied by
// its scale, and without the zero point. No more of W is stored than a tile for each thread.
int ectcq_multiply_matrix(int level, const Tables* tables, const MatrixView* matrix,
                          const float* scaled, size_t tokens, float* y, int threads,
                          size_t* failed) {
  const Kernels* by = kernels_at(level);
  const std::unique_ptr<SearchTables> search(by ? new (std::nothrow) SearchTables : nullptr);
  if (by && !search) return kNoMemory;
  const bool searched = by && search->fill(*by, *tables);
  return multiply_rows(level, *tables, searched ? search.get() : nullptr, {nullptr, 1}, {}, *matrix,
                       scaled, tokens, y, threads, failed);
}

}  // extern "C"
#pragma GCC visibility pop
