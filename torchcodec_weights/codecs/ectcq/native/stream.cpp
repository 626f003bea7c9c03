#include "stream.h"

#include <cstring>

#include <memory>
#include <new>

#include "common/native/stream.h"
#include "together.h"

namespace ectcq {

StepsFunction steps_function(int level) {
#if defined(CODECS_X86)
  if (level >= kAvx512) return steps_avx512;
  if (level == kAvx2) return steps_avx2;
#endif
  return level == kScalar ? steps_scalar : steps_vector;
}

const Kernels* kernels_at(int level) {
#if defined(CODECS_X86)
  if (level >= kVbmi2) return &kVbmi2Kernels;
  if (level == kAvx512) return &kAvx512Kernels;
  if (level == kAvx2) return &kAvx2Kernels;
#elif defined(CODECS_NEON)
  if (level >= kNeon) return &kNeonKernels;
#endif
  (void)level;
  return nullptr;
}

int decode_by_slots(const Tables& tables, StepsFunction steps, const uint8_t* payload, size_t size,
                    size_t count, float* out) {
  Lanes lanes;
  std::memset(lanes.trellis, 0, sizeof(lanes.trellis));
  const auto by = [&](StepsFunction steps_of) {
    return [&tables, &lanes, steps_of](const uint8_t** words, const uint8_t* end, size_t left,
                                       bool read, float* to) {
      return steps_of(tables, lanes, words, end, left, read, to);
    };
  };
  return decode_lanes(payload, size, count, lanes.x, out, by(steps), by(steps_scalar));
}

int decode_stream(const Tables& tables, int level, const uint8_t* payload, size_t size,
                  size_t count, float* out) {
  const Kernels* by = kernels_at(level);
  const std::unique_ptr<SearchTables> search(by ? new (std::nothrow) SearchTables : nullptr);
  if (by && !search) return kNoMemory;
  if (!by || !search->fill(*by, tables)) {
    return decode_by_slots(tables, steps_function(level), payload, size, count, out);
  }
  const StepTables own{by, &tables, steps_function(level), search.get()};
  Stream stream;
  const int begun = begin_stream(stream, payload, size, steps_of(count));
  if (begun != kOk) return begun;
  alignas(64) float chunk[kChunk * kLanes];
  size_t bad;
  return decode_rows_together(own, &stream, 1, &count, &stream.end, chunk, &bad,
                              [&](size_t, size_t first, size_t n, const float* z) {
                                std::memcpy(out + first, z, n * sizeof(float));
                              });
}

}  // namespace ectcq
