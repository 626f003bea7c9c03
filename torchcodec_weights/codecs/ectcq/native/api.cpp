// The C interface to one payload: the trellis search, encoding, decoding. matrix.cpp has the other.

#include <cstring>
#include <vector>

#include "encode.h"
#include "stream.h"

namespace ectcq {
namespace {

int best_level() {
#if defined(ECTCQ_X86)
  const bool avx512 = __builtin_cpu_supports("avx512f");
  // On AMD's processors the gathers of AVX-512 are slower than those of AVX2: 760 million weights a
  // second against 840 on a Zen 4.
  if (avx512 && !__builtin_cpu_is("amd")) return kAvx512;
  if (__builtin_cpu_supports("avx2")) return kAvx2;
#endif
  return kVector;
}

SearchFunction search_function(int level) {
#if defined(ECTCQ_X86)
  if (level >= kAvx2) return search_avx2;
#endif
  (void)level;
  return search_baseline;
}

}  // namespace
}  // namespace ectcq

#pragma GCC visibility push(default)
extern "C" {

using namespace ectcq;

// The best instruction set here: 0 scalar, 1 portable vectors, 2 AVX2, 3 AVX-512.
int ectcq_best_level() { return best_level(); }

// Decode the `count` weights of one payload.
int ectcq_decode(int level, const Tables* tables, const uint8_t* payload, size_t size, size_t count,
                 float* out) {
  return decode_stream(*tables, level, payload, size, count, out);
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

  // rANS: state x after the symbol of step t in lane l.
  const auto coded = [&](auto x, size_t t, size_t l) {
    const uint16_t step = path[t * kLanes + l];
    const uint32_t f = model->frequency[step >> 8][step & 255];
    return (x / f << kProbabilityBits) + model->start[step >> 8][step & 255] + x % f;
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
      uint32_t state = static_cast<uint32_t>(x[l]);
      if (state >> 20 >= model->frequency[step >> 8][step & 255]) {
        words.push_back(static_cast<uint16_t>(state));
        state >>= 16;
      }
      x[l] = coded(state, t, l);
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
