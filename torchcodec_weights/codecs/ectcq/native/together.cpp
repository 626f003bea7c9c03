#include "together.h"

namespace ectcq {
namespace {

// Where a step goes.
struct Target {
  Sink sink;
  Activations x;
  float* out;

  // Where the step goes that comes so many later.
  Target after(size_t steps) const {
    if (sink != Sink::kRowSums) return {sink, x, out + steps * width_of(sink)};
    const size_t step = x.step + steps;
    return {sink, {x.x, x.row_steps, step % x.row_steps}, out + step / x.row_steps * kSums};
  }
};

// Advance by tables of too many symbols for SearchTables, which have no indices and no sums of rows.
int advance_by_slots(const StepTables& own, Stream& stream, size_t steps, const Target& target) {
  Lanes lanes;
  for (int l = 0; l < kLanes; ++l) {
    lanes.x[l] = stream.low[l] | static_cast<uint32_t>(stream.high[l]) << 16;
    lanes.trellis[l] = stream.trellis[l];
  }
  const auto by = [&](StepsFunction steps_of) {
    return [&own, &lanes, steps_of](const uint8_t** from, const uint8_t* limit, size_t count,
                                    bool read, float* to) {
      return steps_of(*own.slots, lanes, from, limit, count, read, to);
    };
  };
  const auto fast = by(own.steps);
  alignas(64) float chunk[kChunk * kLanes];
  float* z = target.sink == Sink::kSums ? chunk : target.out;
  const size_t read = std::min(steps, stream.reading);
  const int status = read_steps(&stream.words, stream.end, read, z, fast, by(steps_scalar));
  if (status != kOk) return status;
  if (read < steps) fast(&stream.words, stream.end, steps - read, false, z + read * kLanes);
  stream.reading -= read;
  for (int l = 0; l < kLanes; ++l) {
    stream.low[l] = static_cast<uint16_t>(lanes.x[l]);
    stream.high[l] = static_cast<uint16_t>(lanes.x[l] >> 16);
    stream.trellis[l] = static_cast<uint16_t>(lanes.trellis[l]);
  }
  if (target.sink == Sink::kSums) own.by->accumulate(z, steps, target.x.x, target.out);
  return kOk;
}

// Advance one stream, to its end too, where a whole step's words may not be there.
int advance_alone(const StepTables& own, Stream& stream, size_t steps, const Target& target) {
  const size_t read = std::min(steps, stream.reading);
  Stream* one = &stream;
  const auto by = [&](size_t from, size_t to, bool reads) {
    Target there = target.after(from);
    return own.by->steps(*own.search, &one, 1, to - from, reads, there.sink, there.x, &there.out);
  };
  for (size_t done = by(0, read, true); done < read; ++done) {
    uint8_t padded[2 * kLanes] = {};
    const uint8_t *words = stream.words, *end = stream.end;
    const size_t taken = std::min(static_cast<size_t>(end - words), sizeof(padded));
    std::memcpy(padded, words, taken);
    stream.words = padded;
    stream.end = padded + sizeof(padded);
    by(done, done + 1, true);
    const size_t used = static_cast<size_t>(stream.words - padded);
    stream.words = words;
    stream.end = end;
    if (used > taken) return kTooShort;
    stream.words += used;
  }
  if (read < steps) by(read, steps, false);
  stream.reading -= read;
  return kOk;
}

}  // namespace

int begin_stream(Stream& stream, const uint8_t* payload, size_t size, size_t steps) {
  if (size < kHead) return kTooShort;
  uint32_t tail, x[kLanes];
  std::memcpy(&tail, payload, 4);
  std::memcpy(x, payload + 4, sizeof(x));
  if (tail > steps) return kBadHeader;
  for (int l = 0; l < kLanes; ++l) {
    stream.low[l] = static_cast<uint16_t>(x[l]);
    stream.high[l] = static_cast<uint16_t>(x[l] >> 16);
    stream.trellis[l] = 0;
  }
  stream.words = payload + kHead;
  stream.end = payload + size;
  stream.reading = steps - tail;
  return kOk;
}

int advance(const StepTables& own, Stream* streams, size_t count, const size_t* steps, Sink sink,
            const Activations& x, float* const* out, size_t* bad) {
  size_t together = 0;
  if (own.search && count > 1) {
    Stream* each[kTogether];
    together = SIZE_MAX;
    for (size_t s = 0; s < count; ++s) {
      each[s] = streams + s;
      together = std::min({together, steps[s], streams[s].reading});
    }
    together = own.by->steps(*own.search, each, count, together, true, sink, x, out);
    for (size_t s = 0; s < count; ++s) streams[s].reading -= together;
  }
  for (size_t s = 0; s < count; ++s) {
    *bad = s;
    const Target rest = Target{sink, x, out[s]}.after(together);
    const int status = own.search ? advance_alone(own, streams[s], steps[s] - together, rest)
                                  : advance_by_slots(own, streams[s], steps[s], rest);
    if (status != kOk) return status;
  }
  return kOk;
}

}  // namespace ectcq
