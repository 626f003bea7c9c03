// The C interface that Python loads: payloads of tiles in, weights out, and the other way.

#include <cstring>
#include <vector>

#include "ectcq.h"
#include "encode.h"

namespace ectcq {
namespace {

enum Level : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

int best_level() {
#if defined(ECTCQ_X86)
  const bool avx512 = __builtin_cpu_supports("avx512f");
  // On AMD's processors the gathers of AVX-512 are slower than those of AVX2: 760 million weights a
  // second against 840 on a Zen 4.
  if (avx512 && !__builtin_cpu_is("amd")) return kAvx512;
  if (__builtin_cpu_supports("avx2")) return kAvx2;
#endif
  return kScalar;
}

StepsFunction steps_function(int level) {
#if defined(ECTCQ_X86)
  if (level == kAvx512) return steps_avx512;
  if (level == kAvx2) return steps_avx2;
#endif
  (void)level;
  return steps_scalar;
}

SearchFunction search_function(int level) {
#if defined(ECTCQ_X86)
  if (level >= kAvx2) return search_avx2;
#endif
  (void)level;
  return search_baseline;
}

constexpr size_t kHead = 4 + 4 * kLanes;  // steps of the tail, first states

// One step at the end of a stream, where a whole step's words may not be there.
int careful_step(const Tables& tables, Lanes& lanes, const uint8_t** words, const uint8_t* end,
                 float* out) {
  uint8_t padded[2 * kLanes] = {};
  const size_t left = static_cast<size_t>(end - *words);
  const size_t taken = left < sizeof(padded) ? left : sizeof(padded);
  std::memcpy(padded, *words, taken);
  const uint8_t* p = padded;
  steps_scalar(tables, lanes, &p, padded + sizeof(padded), 1, true, out);
  const size_t used = static_cast<size_t>(p - padded);
  if (used > taken) return kTooShort;
  *words += used;
  return kOk;
}

// Decode the `count` weights of a payload.
int decode_stream(const Tables& tables, int level, const uint8_t* payload, size_t size,
                  size_t count, float* out) {
  if (size < kHead) return kTooShort;
  uint32_t tail;
  std::memcpy(&tail, payload, 4);
  Lanes lanes;
  std::memcpy(lanes.x, payload + 4, sizeof(lanes.x));
  std::memset(lanes.trellis, 0, sizeof(lanes.trellis));
  const uint8_t* words = payload + kHead;
  const uint8_t* end = payload + size;
  const StepsFunction steps_of = steps_function(level);
  const size_t whole = count / kLanes;
  const size_t steps = (count + kLanes - 1) / kLanes;
  if (tail > steps) return kBadHeader;
  const size_t reading = steps - tail;
  float last[kLanes];  // the last step may reach beyond the weights
  size_t t = steps_of(tables, lanes, &words, end, reading < whole ? reading : whole, true, out);
  for (; t < reading; ++t) {
    const int status = careful_step(tables, lanes, &words, end, t < whole ? out + t * kLanes : last);
    if (status != kOk) return status;
  }
  if (t < whole) {
    steps_of(tables, lanes, &words, end, whole - t, false, out + t * kLanes);
    t = whole;
  }
  if (t < steps) steps_of(tables, lanes, &words, end, 1, false, last);
  if (whole < steps) {
    std::memcpy(out + whole * kLanes, last, (count - whole * kLanes) * sizeof(float));
  }
  return words == end ? kOk : kTooLong;
}

float dot(const float* a, const float* b, size_t n) {
  // Sixteen sums that the compiler keeps in vectors; the order is the same on every machine.
  float sums[16] = {};
  size_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (size_t k = 0; k < 16; ++k) sums[k] += a[i + k] * b[i + k];
  float sum = 0;
  for (; i < n; ++i) sum += a[i] * b[i];
  for (size_t k = 0; k < 16; ++k) sum += sums[k];
  return sum;
}

#if defined(ECTCQ_X86)
__attribute__((target("avx2,fma"))) float dot_avx2(const float* a, const float* b, size_t n) {
  float sums[32] = {};
  size_t i = 0;
  for (; i + 32 <= n; i += 32)
    for (size_t k = 0; k < 32; ++k) sums[k] += a[i + k] * b[i + k];
  float sum = 0;
  for (; i < n; ++i) sum += a[i] * b[i];
  for (size_t k = 0; k < 32; ++k) sum += sums[k];
  return sum;
}
#endif

}  // namespace
}  // namespace ectcq

#pragma GCC visibility push(default)
extern "C" {

using namespace ectcq;

// The best instruction set here: 0 scalar, 1 AVX2, 2 AVX-512.
int ectcq_best_level() { return best_level(); }

// Decode a tile of rows × cols weights. Row i is multiplied by row_scale[i · row_stride] and column
// j by col_scale[j · col_stride]; strides are 0 or 1.
int ectcq_decode(int level, const Tables* tables, const uint8_t* payload, size_t size, size_t rows,
                 size_t cols, const float* row_scale, size_t row_stride, const float* col_scale,
                 size_t col_stride, float* out) {
  const int status = decode_stream(*tables, level, payload, size, rows * cols, out);
  if (status != kOk) return status;
  for (size_t i = 0; i < rows; ++i, out += cols) {
    const float scale = row_scale[i * row_stride];
    if (col_stride) {
      for (size_t j = 0; j < cols; ++j) out[j] = out[j] * scale * col_scale[j];
    } else {
      for (size_t j = 0; j < cols; ++j) out[j] = out[j] * scale * col_scale[0];
    }
  }
  return kOk;
}

// Decode a tile into `buffer` (rows · cols) and multiply: y[t · y_stride + i] =
// row_scale[i · row_stride] · Σ_j z[i][j] · x[t · cols + j]. Outliers replace z at `positions`
// (row-major in the tile, inside it).
int ectcq_multiply(int level, const Tables* tables, const uint8_t* payload, size_t size,
                   size_t rows, size_t cols, const int64_t* positions, const float* values,
                   size_t outliers, const float* row_scale, size_t row_stride, const float* x,
                   size_t tokens, float* buffer, float* y, size_t y_stride) {
  const int status = decode_stream(*tables, level, payload, size, rows * cols, buffer);
  if (status != kOk) return status;
  for (size_t k = 0; k < outliers; ++k) buffer[positions[k]] = values[k];
#if defined(ECTCQ_X86)
  const auto product = level >= kAvx2 ? dot_avx2 : dot;
#else
  const auto product = dot;
#endif
  for (size_t i = 0; i < rows; ++i) {
    for (size_t t = 0; t < tokens; ++t) {
      y[t * y_stride + i] =
          row_scale[i * row_stride] * product(buffer + i * cols, x + t * cols, cols);
    }
  }
  return kOk;
}

// Search the paths of all lanes of a stream of `count` weights: path[i] = symbol | quantizer << 8
// for i < count rounded up to 32; `z` must have as many elements.
void ectcq_search(int level, const Model* model, const float* z, size_t count, uint16_t* path) {
  const size_t steps = (count + kLanes - 1) / kLanes;
  const SearchFunction search = search_function(level);
  std::vector<uint8_t> decisions(steps * static_cast<size_t>(model->states));
  for (size_t l = 0; l < kLanes; ++l)
    search(*model, z + l, kLanes, steps, decisions.data(), path + l);
}

// Bytes that a payload of `count` weights can take at most.
size_t ectcq_bound(size_t count) { return kHead + 2 * (count + kLanes); }

// Encode `count` weights into `payload`, which has room for `ectcq_bound(count)` bytes; returns its
// size in bytes.
size_t ectcq_encode(int level, const Model* model, const float* z, size_t count,
                    uint8_t* payload) {
  const size_t steps = (count + kLanes - 1) / kLanes;
  std::vector<float> padded(steps * kLanes, 0.0f);
  std::memcpy(padded.data(), z, count * sizeof(float));
  std::vector<uint16_t> path(steps * kLanes), words;
  ectcq_search(level, model, padded.data(), count, path.data());

    const auto coded = [&](uint64_t x, size_t t, size_t l) {
      const uint32_t q = path[t * kLanes + l] >> 8, symbol = path[t * kLanes + l] & 255;
      const uint64_t f = model->frequency[q][symbol];
      return (x / f << kProbabilityBits) + model->start[q][symbol] + x % f;
    };
    // The longest tail that fits into every lane's state, and the least first state that ends in
    // the range where words are read.
    uint64_t x[kLanes];
    for (size_t l = 0; l < kLanes; ++l) x[l] = kLowest;
    size_t tail = 0;
    for (size_t longer = 1; longer <= steps && longer < 256; ++longer) {
      uint64_t ends[kLanes];
      bool fits = true;
      for (size_t l = 0; fits && l < kLanes; ++l) {
        for (uint64_t begin = 1;; begin *= 2) {
          ends[l] = begin;
          for (size_t t = steps; t-- > steps - longer;) {
            ends[l] = coded(ends[l], t, l);
            if (ends[l] >> 32) break;
          }
          if (ends[l] >= kLowest) break;
        }
        fits = ends[l] >> 32 == 0;
      }
      if (!fits) break;
      std::memcpy(x, ends, sizeof(x));
      tail = longer;
    }
    for (size_t t = steps - tail; t-- > 0;) {
      for (size_t l = kLanes; l-- > 0;) {
        const uint16_t step = path[t * kLanes + l];
        const uint32_t f = model->frequency[step >> 8][step & 255];
        uint32_t state = static_cast<uint32_t>(x[l]);
        if (state >> 20 >= f) {
          words.push_back(static_cast<uint16_t>(state));
          state >>= 16;
        }
        x[l] = (static_cast<uint64_t>(state / f) << kProbabilityBits) +
               model->start[step >> 8][step & 255] + state % f;
      }
    }
    const uint32_t head = static_cast<uint32_t>(tail);
    std::memcpy(payload, &head, 4);
    for (size_t l = 0; l < kLanes; ++l) {
      const uint32_t state = static_cast<uint32_t>(x[l]);
      std::memcpy(payload + 4 + 4 * l, &state, 4);
    }
    uint8_t* out = payload + kHead;
    for (size_t k = words.size(); k-- > 0; out += 2) std::memcpy(out, &words[k], 2);
  return static_cast<size_t>(out - payload);
}

}  // extern "C"
#pragma GCC visibility pop
