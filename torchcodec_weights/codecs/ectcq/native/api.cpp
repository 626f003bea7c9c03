// The C interface to one payload: trellis search, encoding, decoding. matrix.cpp has the interface to
// whole matrices.

#include <cstring>
#include <iterator>
#include <vector>

#include "common/native/encode_stream.h"
#include "encode.h"
#include "stream.h"
#include "trellis.h"

namespace ectcq {

SearchFunction search_function(int level, int32_t states) {
#if defined(CODECS_X86)
  if (level >= kAvx2) return search_avx2(states);
#endif
  (void)level;
  return search_baseline(states);
}

}  // namespace ectcq

#pragma GCC visibility push(default)
extern "C" {

using namespace ectcq;

// Number of states of trellis `index` of trellis.h, with its polynomials; 0 after the last.
int32_t ectcq_trellis(size_t index, uint32_t* h0, uint32_t* h1) {
  if (index >= std::size(kTrellises)) return 0;
  *h0 = kTrellises[index].h0;
  *h1 = kTrellises[index].h1;
  return kTrellises[index].states;
}

// Decode the `count` weights of one payload.
int ectcq_decode(int level, const Tables* tables, const uint8_t* payload, size_t size, size_t count,
                 float* out) {
  return decode_stream(*tables, level, payload, size, count, out);
}

// Search the paths of all lanes of a stream of `count` weights: path[i] = symbol | quantizer << 8
// for i < count rounded up to 32; `z` must have as many elements. Returns false, and writes nothing,
// where there is no trellis of the model's number of states.
bool ectcq_search(int level, const Model* model, const float* z, size_t count, uint16_t* path) {
  const size_t steps = (count + kLanes - 1) / kLanes;
  const SearchFunction search = search_function(level, model->states);
  if (!search) return false;
  std::vector<uint8_t> decisions(steps * static_cast<size_t>(model->states));
  for (size_t l = 0; l < kLanes; ++l)
    search(*model, z + l, kLanes, steps, decisions.data(), path + l);
  return true;
}

// Bytes that a payload of `count` weights can take at most.
size_t ectcq_bound(size_t count) { return stream_bound(count); }

// Encode `count` weights into `payload`, of `ectcq_bound(count)` bytes of capacity; returns its
// size in bytes, 0 where there is no trellis of the model's number of states.
size_t ectcq_encode(int level, const Model* model, const float* z, size_t count, uint8_t* payload) {
  const size_t steps = (count + kLanes - 1) / kLanes;
  std::vector<float> padded(steps * kLanes, 0.0f);
  std::memcpy(padded.data(), z, count * sizeof(float));
  std::vector<uint16_t> path(steps * kLanes);
  if (!ectcq_search(level, model, padded.data(), count, path.data())) return 0;
  return encode_lanes(steps, payload, [&](size_t t, size_t l) {
    const uint16_t step = path[t * kLanes + l];
    return Range{model->frequency[step >> 8][step & 255], model->start[step >> 8][step & 255]};
  });
}

}  // extern "C"
#pragma GCC visibility pop
