// ECTCQ on NVIDIA GPUs: streams cut into segments, segments decoded or multiplied by, a warp each.
//
// The bitstream is that of docs/bitstream.md, read where it lies; ectcq.h and rans.h have the same
// constants and the same steps for the CPU. A warp's 32 threads are a stream's 32 lanes.
//
// A stream is some 2,048 steps long, and a matrix has too few of them to fill a GPU. So the first
// kernel that sees a matrix, `ectcq_index`, decodes each stream from its beginning and writes down
// the lanes' states every few hundred steps. From then on all the segments between are decoded at the
// same time. The index is made on the GPU and never stored: a file does not pay for it.
//
// Streams by columns have kernels of their own, in the second half of this file.
//
// gpu.py mirrors the structures, has this compiled by NVRTC and calls it; tests/cuda_host.h runs the
// same source on a CPU. All numbers among a kernel's parameters are of 64 bits.

#if defined(__CUDACC_RTC__)
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;
#endif

namespace {

constexpr uint32_t kLanes = 32;
constexpr uint32_t kProbabilityBits = 12;
constexpr uint32_t kSlots = 1u << kProbabilityBits;
constexpr uint32_t kSymbols = 256;  // of a union quantizer
constexpr uint32_t kLowest = 1u << 16;
constexpr uint32_t kAll = 0xFFFFFFFFu;
constexpr uint32_t kWarps = 16;             // most in a block
constexpr uint32_t kHead = 4 + 4 * kLanes;  // bytes of a payload before its words

enum Type : uint32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum Status : uint32_t { kOk = 0, kTooShort = 1, kTooLong = 2 };

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Consecutive steps of a stream, and the weights that they give.
struct Segment {
  uint64_t place;     // of the first weight in the matrix, row-major
  uint32_t words;     // where its next word lies in the container
  uint32_t count;     // weights
  uint32_t reading;   // steps in which words are read: all that are not in the stream's tail
  uint32_t outliers;  // index of its first outlier; its last is before the next segment's first
};

// A stream.
struct Tile {
  uint32_t payload;  // where it lies in the container
  uint32_t end;      // where it ends
  uint32_t first;    // of its segments
  uint32_t last;     // index after its last segment
};

struct DeviceMatrix {
  const uint8_t* data;  // the container
  uint64_t size;        // bytes of the container, less than 4 GiB
  const Tile* tiles;
  Segment* segments;               // and one more for its `outliers`
  uint32_t* states;                // [segments][32]: rANS states where segments begin
  uint8_t* trellis;                // [segments][32]: trellis states there
  const uint64_t* outlier_places;  // in the matrix, row-major, increasing
  const float* outlier_values;
  float* outlier_changes;  // what is to be added to Z
  const float* row_scale;  // [row · row_stride], strides 0 or 1
  const float* col_scale;
  const float* zero_point;  // [rows], or null
  uint64_t rows;
  uint64_t cols;
  uint32_t row_stride;
  uint32_t col_stride;
  uint32_t feedback;  // of the trellis, as in ectcq.h
  uint32_t input;
  uint32_t runs[2 * kSymbols];  // slots of a symbol: the first one | how many << 16
  float values[2 * kSymbols];   // by union quantizer and symbol
};

// What is known of a slot: what a step needs comes by one load of 64 bits.
struct alignas(8) Slot {
  uint32_t step;  // frequency of its symbol | change of the trellis state << 12 | offset << 20
  uint32_t z;     // the symbol's Z, bits of a float
};

// Slots of both union quantizers, at the beginning of a block's dynamic shared memory.
struct Shared {
  Slot slots[2 * kSlots];
};

// Fills in the slots; all threads of a block call it together, and then wait for each other.
//
// A trellis state s goes to s / 2 ^ (s odd ? feedback : 0) ^ (symbol odd ? input : 0), and the
// quantizer is that of s odd or even: the change depends on the slot alone.
template <typename Tables>
__device__ void fill_slots(const Tables& tables, uint32_t feedback, uint32_t input,
                           Shared& shared) {
  for (uint32_t i = threadIdx.x / kLanes; i < 2 * kSymbols; i += blockDim.x / kLanes) {
    const uint32_t count = tables.runs[i] >> 16;
    Slot* const slots = shared.slots + i / kSymbols * kSlots + (tables.runs[i] & 0xFFFF);
    const uint32_t change = (i / kSymbols ? feedback : 0) ^ (i % 2 ? input : 0);
    const uint32_t z = __float_as_uint(tables.values[i]);
    for (uint32_t k = threadIdx.x % kLanes; k < count; k += kLanes) {
      slots[k] = {count | change << kProbabilityBits | k << 20, z};
    }
  }
}

// Four bytes at any address; zeros from `end` on, and nothing is read there.
__device__ uint32_t load_bytes(const uint8_t* data, uint64_t at, uint64_t end) {
  uint32_t value = 0;
  for (uint32_t i = 0; i < 4 && at + i < end; ++i) {
    value |= static_cast<uint32_t>(__ldg(data + at + i)) << (8 * i);
  }
  return value;
}

// Shared memory by addresses of its own. Through pointers, the compiler finds out anew in every step
// where a block's shared memory begins.
#if defined(__CUDA_ARCH__)
extern __shared__ __align__(1024) unsigned char dynamic_shared[];

using SharedAddress = uint32_t;

__device__ SharedAddress shared_address(const void* pointer) {
  SharedAddress address = static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
  asm volatile("" : "+r"(address));  // not to be computed again
  return address;
}

__device__ Slot load_slot(SharedAddress slots, uint32_t number) {
  Slot slot;
  asm("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(slot.step), "=r"(slot.z) : "r"(slots + number * 8));
  return slot;
}
#else
using SharedAddress = const Slot*;

SharedAddress shared_address(const Slot* pointer) { return pointer; }

Slot load_slot(SharedAddress slots, uint32_t number) { return slots[number]; }
#endif

__device__ Shared& shared_memory() { return *reinterpret_cast<Shared*>(dynamic_shared); }

// One thread's lane of a stream that its warp decodes.
//
// Words are read from the container where they lie, through the first-level cache: a step takes at
// most 64 bytes of them, so that a line serves many steps. kOdd says that words lie at odd addresses,
// where only single bytes can be read.
template <bool kOdd>
class Lane {
 public:
  uint32_t x;           // rANS state
  uint32_t trellis;     // trellis state << 12; below that, bits that are of no use any more
  const uint8_t* next;  // word of the stream; the same in all lanes

  // Its next word is at `words`, and nothing is read from `end` on.
  __device__ Lane(const Shared& shared, const uint8_t* words, const uint8_t* end)
      : next(words),
        slots_(shared_address(shared.slots)),
        below_((1u << (threadIdx.x % kLanes)) - 1),
        end_(end) {}

  __device__ void set_trellis(uint32_t state) { trellis = state << kProbabilityBits; }
  __device__ uint32_t trellis_state() const { return trellis >> kProbabilityBits; }

  // Whether the words of so many steps lie before the end, whatever they are.
  __device__ bool inside(uint32_t steps) const { return next + steps * 2 * kLanes <= end_; }

  // Decodes the next weight of the lane to its Z; all lanes together. kInside says that all words
  // that it may read lie before the end; else zeros are read from there on.
  template <bool kInside>
  __device__ float step(bool read) {
    const uint32_t number = (x & (kSlots - 1)) | (trellis & kSlots);
    const Slot slot = load_slot(slots_, number);
    trellis = trellis >> 1 ^ (slot.step & 0xFF000);
    x = (slot.step & 0xFFF) * (x >> kProbabilityBits) + (slot.step >> 20);
    if (read) take_words<kInside>();
    return __uint_as_float(slot.z);
  }

 private:
  SharedAddress slots_;
  uint32_t below_;  // a bit for each lane of a smaller number
  const uint8_t* end_;

  // Lanes whose state is below kLowest take a word each, in their order.
  template <bool kInside>
  __device__ void take_words() {
#if defined(__CUDA_ARCH__)
    if (kInside && !kOdd) {
      // As below, but all lanes load: a word that is not needed lies in the same line, and a load
      // under a condition takes an instruction more. The compiler would compute addresses and
      // conditions twice.
      asm volatile(
          "{\n"
          ".reg .pred needs;\n"
          ".reg .u32 needing, count, word;\n"
          ".reg .u64 at;\n"
          "setp.lt.u32 needs, %0, 65536;\n"
          "vote.sync.ballot.b32 needing, needs, 0xFFFFFFFF;\n"
          "and.b32 count, needing, %2;\n"
          "popc.b32 count, count;\n"
          "mad.wide.u32 at, count, 2, %1;\n"
          "ld.global.nc.u16 word, [at];\n"
          "popc.b32 count, needing;\n"
          "mad.wide.u32 %1, count, 2, %1;\n"
          "@needs prmt.b32 %0, word, %0, 0x5410;\n"
          "}"
          : "+r"(x), "+l"(next)
          : "r"(below_));
      return;
    }
#endif
    const bool needs = x < kLowest;
    const uint32_t needing = __ballot_sync(kAll, needs);
    if (needs) {
      const uint8_t* const at = next + 2 * __popc(needing & below_);
      x = x << 16 | (kInside || at + 2 <= end_ ? load_word(at) : 0);
    }
    next += 2 * __popc(needing);
  }

  __device__ static uint32_t load_word(const uint8_t* at) {
    if (kOdd) return __ldg(at) | static_cast<uint32_t>(__ldg(at + 1)) << 8;
    return __ldg(reinterpret_cast<const uint16_t*>(at));
  }
};

__device__ uint32_t steps_of(uint32_t weights) { return (weights + kLanes - 1) / kLanes; }

__device__ uint32_t warps_of_block() { return blockDim.x / kLanes; }

// With programmatic dependent launch, a kernel starts before the one before it has ended, and does
// meanwhile what does not depend on it.
__device__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ void wait_for_former_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}

// Decodes the next `steps` steps and calls `use(k, z)` with the Z of step k; all lanes together.
// Words are read in the first `reading` of them, which is reduced by what was read. So many steps as
// kTogether says follow each other without a test.
template <uint32_t kTogether, bool kOdd, typename Use>
__device__ void decode_steps(Lane<kOdd>& lane, uint32_t steps, uint32_t& reading, Use use) {
  uint32_t k = 0;
  while (k + kTogether <= steps && reading >= kTogether && lane.inside(kTogether)) {
#pragma unroll
    for (uint32_t i = 0; i < kTogether; ++i) use(k + i, lane.template step<true>(true));
    k += kTogether;
    reading -= kTogether;
  }
#pragma unroll 1  // a stream's tail, where registers count more than time
  for (; k < steps; ++k) {
    use(k, lane.template step<false>(reading != 0));
    if (reading) --reading;
  }
}

// The scales and zero points of a matrix. They are copied: the compiler cannot rule out that a
// kernel's stores change the matrix, and would load them again after each store.
class Scales {
 public:
  const uint32_t cols;

  template <typename Matrix>
  __device__ explicit Scales(const Matrix& m)
      : cols(static_cast<uint32_t>(m.cols)),
        rows_(static_cast<uint32_t>(m.rows)),
        row_stride_(m.row_stride),
        col_stride_(m.col_stride),
        row_scale_(m.row_scale),
        col_scale_(m.col_scale),
        zero_point_(m.zero_point) {}

  // Lanes without a weight ask for rows after the last one, and get 0.
  __device__ float row_scale(uint32_t row) const {
    return row < rows_ ? __ldg(row_scale_ + static_cast<uint64_t>(row) * row_stride_) : 0.0f;
  }

  // −0 where there is none: adding it changes no weight, not even −0.
  __device__ float zero_point(uint32_t row) const {
    return zero_point_ && row < rows_ ? __ldg(zero_point_ + row) : -0.0f;
  }

  __device__ float col_scale(uint32_t col) const {
    return __ldg(col_scale_ + static_cast<uint64_t>(col) * col_stride_);
  }

 private:
  const uint32_t rows_;
  const uint32_t row_stride_;
  const uint32_t col_stride_;
  const float* const row_scale_;
  const float* const col_scale_;
  const float* const zero_point_;
};

// Rounded as on the CPU, where nothing is contracted to a fused multiply-add.
__device__ float weight_of(float z, float row, float col, float zero_point) {
  return __fadd_rn(__fmul_rn(__fmul_rn(z, row), col), zero_point);
}

__device__ void put(float* to, float value) { *to = value; }

__device__ void put(Float16* to, float value) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(value));
#else
  const _Float16 half = static_cast<_Float16>(value);
  __builtin_memcpy(&to->bits, &half, 2);
#endif
}

__device__ void put(BFloat16* to, float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(value));
#else
  const uint32_t bits = __float_as_uint(value);
  to->bits = static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
#endif
}

__device__ void put(void* to, uint64_t index, uint32_t type, float value) {
  if (type == kFloat32) put(static_cast<float*>(to) + index, value);
  if (type == kFloat16) put(static_cast<Float16*>(to) + index, value);
  if (type == kBFloat16) put(static_cast<BFloat16*>(to) + index, value);
}

__device__ float get(const void* from, uint64_t index, uint32_t type) {
  if (type == kFloat32) return static_cast<const float*>(from)[index];
  const uint16_t bits = static_cast<const uint16_t*>(from)[index];
  if (type == kBFloat16) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#else
  _Float16 half;
  __builtin_memcpy(&half, &bits, 2);
  return half;
#endif
}

// Z of an outlier.
__device__ float outlier_z(const Scales& scales, float value, uint32_t row, uint32_t col) {
  return (value - scales.zero_point(row)) / __fmul_rn(scales.row_scale(row), scales.col_scale(col));
}

// The lane of this thread where segment `index` begins.
template <bool kOdd>
__device__ Lane<kOdd> lane_of_segment(const DeviceMatrix& m, const Shared& shared, uint32_t index,
                                      const Segment& segment) {
  const uint64_t place = static_cast<uint64_t>(index) * kLanes + threadIdx.x % kLanes;
  Lane<kOdd> lane(shared, m.data + segment.words, m.data + m.size);
  lane.x = m.states[place];
  lane.set_trellis(m.trellis[place]);
  return lane;
}

// Decodes the weights of segment `index` that lie in the range `first` to `end` − 1 of the matrix.
// Weight `first` goes to `out[0]`. All threads of a warp call it together.
template <bool kOdd, typename Value>
__device__ void decode_segment(const DeviceMatrix& m, const Shared& shared, const Scales& scales,
                               uint32_t index, uint64_t first, uint64_t end, Value* out) {
  const Segment segment = m.segments[index];
  const uint32_t number = threadIdx.x % kLanes;
  Lane<kOdd> lane = lane_of_segment<kOdd>(m, shared, index, segment);
  const uint64_t place = segment.place;
  uint32_t reading = segment.reading;
  const uint32_t to =
      end - place < segment.count ? static_cast<uint32_t>(end - place) : segment.count;
  Value* target = out + (static_cast<int64_t>(place - first) + number);
  uint32_t row = static_cast<uint32_t>(place / scales.cols);
  if (scales.cols % kLanes == 0) {
    const uint32_t steps = scales.cols / kLanes;
    for (uint32_t done = 0; done < to; done += scales.cols, ++row, target += scales.cols) {
      const float scale = scales.row_scale(row), zero_point = scales.zero_point(row);
      if (place + done >= first) {
        decode_steps<4>(lane, steps, reading, [&](uint32_t k, float z) {
          put(target + k * kLanes,
              weight_of(z, scale, scales.col_scale(k * kLanes + number), zero_point));
        });
      } else {
        decode_steps<4>(lane, steps, reading, [](uint32_t, float) {});
      }
    }
  } else {
    const uint32_t from = first > place ? static_cast<uint32_t>(first - place) : 0;
    uint32_t col = static_cast<uint32_t>((place + number) % scales.cols);
    row = static_cast<uint32_t>((place + number) / scales.cols);
    decode_steps<4>(lane, steps_of(to), reading, [&](uint32_t k, float z) {
      if (k * kLanes + number - from < to - from) {
        put(target + k * kLanes,
            weight_of(z, scales.row_scale(row), scales.col_scale(col), scales.zero_point(row)));
      }
      for (col += kLanes; col >= scales.cols; col -= scales.cols) ++row;
    });
  }
  __syncwarp();  // what follows overwrites what other lanes have written
  for (uint32_t i = segment.outliers + number; i < m.segments[index + 1].outliers; i += kLanes) {
    const uint64_t at = m.outlier_places[i];
    if (at >= first && at < end) put(out + (at - first), m.outlier_values[i]);
  }
}

// Whether a matrix's words lie at odd addresses. They do for all of its tiles or for none, as
// payloads and outlier sections have even sizes.
__device__ bool is_odd(const uint8_t* data, uint32_t place) {
  return (reinterpret_cast<uintptr_t>(data) + place) % 2 != 0;
}

// Calls `use(index)` for each index of a range that this warp is to do. Neighbours go to different
// blocks, so that all multiprocessors get as many.
template <typename Use>
__device__ void share_among_warps(uint64_t first, uint64_t end, Use use) {
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * warps_of_block();
  const uint64_t own =
      first + blockIdx.x + static_cast<uint64_t>(gridDim.x) * (threadIdx.x / kLanes);
  for (uint64_t index = own; index < end; index += stride) use(static_cast<uint32_t>(index));
}

// Tables first, as they depend on no other kernel.
__device__ Shared& begin(const DeviceMatrix& m) {
  let_next_kernel_start();
  Shared& shared = shared_memory();
  fill_slots(m, m.feedback, m.input, shared);
  __syncthreads();
  wait_for_former_kernel();
  return shared;
}

// Weights `first` to `end` − 1 of the matrix, from the segments that hold them.
template <typename Value>
__device__ void decode(const DeviceMatrix& m, Value* out, uint64_t first_segment,
                       uint64_t end_segment, uint64_t first, uint64_t end) {
  const Shared& shared = begin(m);
  const Scales scales(m);
  share_among_warps(first_segment, end_segment, [&](uint32_t index) {
    if (is_odd(m.data, m.segments[index].words)) {
      decode_segment<true>(m, shared, scales, index, first, end, out);
    } else {
      decode_segment<false>(m, shared, scales, index, first, end, out);
    }
  });
}

// Rows of the matrix by their numbers less `first_row`, from segments of whole rows. A number that is
// not less than `rows` ends the kernel with an error, as in PyTorch's own embedding.
template <typename Value>
__device__ void gather(const DeviceMatrix& m, const int64_t* numbers, uint64_t count, Value* out,
                       uint64_t segments, uint64_t first_row, uint64_t rows) {
  const Shared& shared = begin(m);
  const Scales scales(m);
  share_among_warps(0, count, [&](uint32_t i) {
    const uint64_t number = static_cast<uint64_t>(numbers[i]);
    if (number >= rows) __trap();
    const uint64_t first = (first_row + number) * m.cols;
    uint32_t low = 0, high = static_cast<uint32_t>(segments);
    while (high - low > 1) {  // to the last segment that begins at `first` or before
      const uint32_t middle = (low + high) / 2;
      (m.segments[middle].place <= first ? low : high) = middle;
    }
    Value* const to = out + static_cast<uint64_t>(i) * m.cols;
    if (is_odd(m.data, m.segments[low].words)) {
      decode_segment<true>(m, shared, scales, low, first, first + m.cols, to);
    } else {
      decode_segment<false>(m, shared, scales, low, first, first + m.cols, to);
    }
  });
}

// What a product needs besides the matrix.
struct Product {
  const float* scaled;  // x in groups of up to four tokens, [group][col][token of the group], times
                        // the columns' scales
  const float* totals;  // sums of x over the columns; null if there are no zero points
  const void* bias;     // or null
  void* y;
  uint32_t type;  // of bias and y
  uint32_t tokens;
  uint32_t first_row;
  uint32_t end_row;
};

// y = x · Wᵀ for those rows of a segment of whole rows, of a number of columns that is a multiple of
// 32, that are asked for. The weights are used as they leave the decoder.
template <bool kOdd, uint32_t kTokens>
__device__ void multiply_segment(const DeviceMatrix& m, const Shared& shared,
                                 const Product& product, uint32_t index) {
  constexpr uint32_t kGroup = kTokens < 4 ? kTokens : 4;
  struct alignas(4 * kGroup) Group {
    float x[kGroup];
  };
  const Segment segment = m.segments[index];
  const uint32_t number = threadIdx.x % kLanes;
  Lane<kOdd> lane = lane_of_segment<kOdd>(m, shared, index, segment);
  uint32_t reading = segment.reading;
  const uint32_t cols = static_cast<uint32_t>(m.cols);
  const Group* const groups = reinterpret_cast<const Group*>(product.scaled) + number;
  const uint32_t end_outlier = m.segments[index + 1].outliers;
  uint32_t outlier = segment.outliers;
  uint32_t row = static_cast<uint32_t>(segment.place / cols);
  uint32_t last = row + segment.count / cols;
  if (last > product.end_row) last = product.end_row;
  for (; row < last; ++row) {
    float sums[kTokens] = {};
    const auto add = [&](uint32_t k, float z) {
#pragma unroll
      for (uint32_t g = 0; g < kTokens / kGroup; ++g) {
        const Group x = groups[static_cast<uint64_t>(g) * cols + k];
#pragma unroll
        for (uint32_t i = 0; i < kGroup; ++i) sums[g * kGroup + i] += z * x.x[i];
      }
    };
    decode_steps<kTokens <= 4 ? 8 : 4>(lane, cols / kLanes, reading,
                                       [&](uint32_t k, float z) { add(k * kLanes, z); });
    while (outlier < end_outlier) {
      const uint32_t i = outlier + number;
      const bool here = i < end_outlier && m.outlier_places[i] < (row + 1ull) * cols;
      if (here) {
        add(static_cast<uint32_t>(m.outlier_places[i] % cols) - number, m.outlier_changes[i]);
      }
      const uint32_t count = __popc(__ballot_sync(kAll, here));
      outlier += count;
      if (count < kLanes) break;
    }
    float mine = 0;  // the sum of the token of this lane's number
#pragma unroll
    for (uint32_t k = 0; k < kTokens; ++k) {
      float sum = sums[k];
      for (uint32_t other = kLanes / 2; other; other /= 2) sum += __shfl_xor_sync(kAll, sum, other);
      if (number == k) mine = sum;
    }
    if (row >= product.first_row && number < product.tokens) {
      const uint32_t own = row - product.first_row;
      const Scales scales(m);  // loaded for each row, as registers are few
      float result = mine * scales.row_scale(row);
      if (product.totals) result += scales.zero_point(row) * product.totals[number];
      if (product.bias) result += get(product.bias, own, product.type);
      const uint64_t rows = product.end_row - product.first_row;
      put(product.y, number * rows + own, product.type, result);
    }
  }
}

template <uint32_t kTokens>
__device__ void multiply(const DeviceMatrix& m, const Product& product, uint64_t first_segment,
                         uint64_t end_segment) {
  const Shared& shared = begin(m);
  share_among_warps(first_segment, end_segment, [&](uint32_t index) {
    if (is_odd(m.data, m.segments[index].words)) {
      multiply_segment<true, kTokens>(m, shared, product, index);
    } else {
      multiply_segment<false, kTokens>(m, shared, product, index);
    }
  });
}

// Streams by columns.
//
// A block decodes the same groups of columns for all of its warps, each of which has other rows. So
// the block's tables of slots are those of one class, and are filled in anew where the next group is
// of another. A segment is some rows of one group, or, where tiles are low, all rows of some groups;
// a *set* is the groups of a segment, and a *part* the share of a tile's rows: segment
// (tile · sets + set) · parts + part. This is also their order in the streams.

constexpr uint32_t kNone = 0xFFFFFFFFu;
constexpr uint32_t kHalf = 8;           // rows that a warp decodes before it multiplies
constexpr uint32_t kBatch = 2 * kHalf;  // rows of which it adds up the products together
constexpr uint32_t kMostTokens = 8;     // of a product

struct ColumnTile {
  uint64_t payload;  // where it lies in the container
  uint64_t end;      // where it ends
  uint32_t row;      // its first in the matrix
  uint32_t height;   // rows
  uint32_t reading;  // steps in which words are read
  uint32_t padding;
};

struct ColumnOutlier {
  uint32_t row;       // of the matrix
  uint32_t position;  // of its column in the coded order
  float value;
};

struct ClassTables {
  uint32_t runs[2 * kSymbols];  // as in DeviceMatrix
  float values[2 * kSymbols];
};

struct DeviceColumns {
  const uint8_t* data;  // the container
  uint64_t size;        // bytes of the container
  const ColumnTile* tiles;
  uint32_t* words;                 // [segments]: bytes from the stream's first word to their own
  uint32_t* states;                // [segments][32]: rANS states where segments begin
  uint8_t* trellis;                // [segments][32]: trellis states there; of several parts alone
  const uint32_t* first_outliers;  // [segments + 1]
  const ColumnOutlier* outliers;   // by segment, group and row
  const ClassTables* classes;
  const uint8_t* class_of_group;
  const uint32_t* column_order;  // [cols]: the column at each position of the coded order
  const float* row_scale;        // as in DeviceMatrix
  const float* col_scale;
  const float* zero_point;
  uint64_t rows;
  uint64_t cols;
  uint32_t row_stride;
  uint32_t col_stride;
  uint32_t feedback;
  uint32_t input;
  uint32_t groups;
  uint32_t set_groups;  // groups of a set; 1 where there are several parts
  uint32_t sets;
  uint32_t parts;
};

// First row of a part in a tile of so many rows.
__device__ uint32_t first_of_part(uint32_t height, uint32_t part, uint32_t parts) {
  return static_cast<uint32_t>(static_cast<uint64_t>(height) * part / parts);
}

// The rows that a warp decodes. A warp without any comes along for the sake of its block's barriers.
struct Strip {
  uint32_t tile = 0;
  uint32_t segment = 0;  // that of the first set
  uint32_t row = 0;      // the first, in the matrix
  uint32_t top = 0;      // the same in its tile
  uint32_t rows = 0;

  // A part of one of the tiles `first_tile` to `end_tile` − 1, of which each block numbered `band`
  // takes as many as it has warps. It has rows if some are among `first_row` to `end_row` − 1.
  __device__ Strip(const DeviceColumns& m, uint32_t band, uint64_t first_tile, uint64_t end_tile,
                   uint64_t first_row, uint64_t end_row) {
    const uint64_t item = static_cast<uint64_t>(band) * warps_of_block() + threadIdx.x / kLanes;
    const uint64_t index = first_tile + item / m.parts;
    if (index >= end_tile) return;
    const uint32_t first = m.tiles[index].row, height = m.tiles[index].height;
    const uint32_t part = static_cast<uint32_t>(item % m.parts);
    const uint32_t own = first_of_part(height, part, m.parts);
    const uint32_t last = first_of_part(height, part + 1, m.parts);
    if (first + static_cast<uint64_t>(own) >= end_row) return;
    if (first + static_cast<uint64_t>(last) <= first_row) return;
    tile = static_cast<uint32_t>(index);
    segment = tile * m.sets * m.parts + part;
    row = first + own;
    top = own;
    rows = last - own;
    // In a set of several groups, all rows lead to those of the next.
    if (m.set_groups == 1 && end_row - row < rows) rows = static_cast<uint32_t>(end_row - row);
  }
};

// A lane of a strip, from the beginning of a segment on.
template <bool kOdd>
class ColumnLane {
 public:
  __device__ ColumnLane(const DeviceColumns& m, const Shared& shared, const Strip& strip,
                        uint32_t segment)
      : lane_(shared,
              m.data + (strip.rows ? m.tiles[strip.tile].payload + kHead + m.words[segment] : 0),
              m.data + m.size) {
    const uint64_t place = static_cast<uint64_t>(segment) * kLanes + threadIdx.x % kLanes;
    lane_.x = strip.rows ? m.states[place] : 0;
    lane_.set_trellis(strip.top ? m.trellis[place] : 0);
  }

  // To the strip's first row in a group.
  __device__ void begin(const DeviceColumns& m, const Strip& strip, uint32_t group) {
    // Loaded for each group, as registers are few.
    const ColumnTile& tile = m.tiles[strip.tile];
    const uint32_t first = group * tile.height + strip.top;  // its step in the stream
    reading_ = first < tile.reading ? tile.reading - first : 0;
    if (!strip.top) lane_.set_trellis(0);
  }

  // Decodes the next `rows` rows and calls `use(r, z)` with each; all lanes together.
  template <uint32_t kTogether, typename Use>
  __device__ void decode(uint32_t rows, Use use) {
    decode_steps<kTogether>(lane_, rows, reading_, use);
  }

  // The same with at most kRows rows, and without a test in between if they are so many.
  template <uint32_t kRows, typename Use>
  __device__ void decode_batch(uint32_t rows, Use use) {
    if (rows == kRows && reading_ >= kRows && lane_.inside(kRows)) {
      reading_ -= kRows;
#pragma unroll
      for (uint32_t r = 0; r < kRows; ++r) use(r, lane_.template step<true>(true));
    } else {
      decode_steps<1>(lane_, rows, reading_, use);
    }
  }

 private:
  Lane<kOdd> lane_;
  uint32_t reading_ = 0;  // steps of the strip in this group in which words are read
};

// Decodes the strips of a block's warps in sets `first_set` to `end_set` − 1. All threads of a block
// call it together, and it calls
//
//     start(segment)       those of a warp together, before the first group of a segment
//     prepare(group)       the threads of a block together, between two barriers
//     decode(lane, group)  those of a warp together, to decode the rows of their strip
//     finish(segment)      the same, after the last group of a segment
template <bool kOdd, typename Start, typename Prepare, typename Decode, typename Finish>
__device__ void walk(const DeviceColumns& m, const Strip& strip, uint32_t first_set,
                     uint32_t end_set, Start start, Prepare prepare, Decode decode, Finish finish) {
  Shared& shared = shared_memory();
  uint32_t loaded = kNone;
  for (uint32_t set = first_set; set < end_set; ++set) {
    const uint32_t segment = strip.segment + set * m.parts;
    const uint32_t first = set * m.set_groups;
    const uint32_t end = first + m.set_groups < m.groups ? first + m.set_groups : m.groups;
    ColumnLane<kOdd> lane(m, shared, strip, segment);
    start(segment);
    for (uint32_t group = first; group < end; ++group) {
      const uint32_t own = m.class_of_group[group];
      __syncthreads();
      if (own != loaded) {
        fill_slots(m.classes[own], m.feedback, m.input, shared);
        loaded = own;
      }
      prepare(group);
      __syncthreads();
      lane.begin(m, strip, group);
      decode(lane, group);
    }
    finish(segment);
  }
}

// Rows `first_row` to `end_row` − 1 of the matrix, which are in tiles `first_tile` to `end_tile` − 1.
// A lane's column is the same down a group. The columns of a group lie anywhere in a row, so each lane
// writes to a place of its own. The blocks of all sets of a tile follow each other: what they write
// lies side by side, and meets in the second-level cache.
template <bool kOdd, typename Value>
__device__ void decode_columns(const DeviceColumns& m, Value* out, uint64_t first_tile,
                               uint64_t end_tile, uint64_t first_row, uint64_t end_row) {
  const uint32_t set = blockIdx.x % m.sets;
  const Strip strip(m, blockIdx.x / m.sets, first_tile, end_tile, first_row, end_row);
  const uint32_t number = threadIdx.x % kLanes;
  const Scales scales(m);
  const uint32_t first = first_row > strip.row ? static_cast<uint32_t>(first_row) - strip.row : 0;
  const uint32_t count = end_row > strip.row ? static_cast<uint32_t>(end_row) - strip.row : 0;
  const uint32_t cols = scales.cols;
  walk<kOdd>(
      m, strip, set, set + 1, [](uint32_t) {}, [](uint32_t) {},
      [&](ColumnLane<kOdd>& lane, uint32_t group) {
        const uint64_t position = static_cast<uint64_t>(group) * kLanes + number;
        const bool inside = position < scales.cols;
        const uint32_t col = inside ? m.column_order[position] : 0;
        const float scale = inside ? scales.col_scale(col) : 0.0f;
        Value* target = out +
                        (static_cast<int64_t>(strip.row) - static_cast<int64_t>(first_row)) *
                            static_cast<int64_t>(scales.cols) +
                        col;
        const uint32_t asked = inside && count > first ? count - first : 0;
        // A lane loads what is of a row, and the others get it from there.
        for (uint32_t top = 0; top < strip.rows; top += kLanes) {
          const float row_scale = scales.row_scale(strip.row + top + number);
          const float zero_point = scales.zero_point(strip.row + top + number);
          const uint32_t height = strip.rows - top < kLanes ? strip.rows - top : kLanes;
          const uint32_t r = top - first;
          lane.template decode<4>(height, [&](uint32_t k, float z) {
            Value weight;
            put(&weight, weight_of(z, __shfl_sync(kAll, row_scale, k), scale,
                                   __shfl_sync(kAll, zero_point, k)));
            if (r + k < asked) *target = weight;
            target += cols;
          });
        }
      },
      [&](uint32_t segment) {
        if (!strip.rows) return;
        __syncwarp();  // what follows overwrites what other lanes have written
        const uint32_t last = m.first_outliers[segment + 1];
        for (uint32_t i = m.first_outliers[segment] + number; i < last; i += kLanes) {
          const ColumnOutlier outlier = m.outliers[i];
          if (outlier.row >= first_row && outlier.row < end_row) {
            put(out + (outlier.row - first_row) * scales.cols + m.column_order[outlier.position],
                outlier.value);
          }
        }
      });
}

// d += a · b on tensor cores, in TF32: of a and b, the lower 13 bits are ignored. With lane 4g + t, a
// is of 16 × 8, [g][t], [g + 8][t], [g][t + 4], [g + 8][t + 4]; b is of 8 × 8, [t][g], [t + 4][g]; and d
// is of 16 × 8, [g][2t], [g][2t + 1], [g + 8][2t], [g + 8][2t + 1].
__device__ void multiply_add(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
#if !defined(__CUDA_ARCH__)
  cuda_host::multiply_add(d, a, b);
#elif __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#else
  __trap();  // gpu_columns.py asks no such chip
#endif
}

// The upper bits of a float, which TF32 has.
__device__ float upper(float value) { return __uint_as_float(__float_as_uint(value) & 0xFFFFE000); }

struct alignas(16) Four {
  float values[4];
};

// A group's 32 columns of some rows. In every second row the halves have changed places, so that
// lanes that read four columns each of two rows find them in different banks. (Longer rows would do the
// same, but then a block has more shared memory than some chips allow.)
template <uint32_t kRows>
struct GroupOfRows {
  alignas(16) float values[kRows][kLanes];

  __device__ float& at(uint32_t row, uint32_t col) {
    return values[row][col ^ row % 2 * (kLanes / 2)];
  }

  // Columns `col` to `col` + 3; a multiple of 4.
  __device__ const Four& four(uint32_t row, uint32_t col) const {
    return *reinterpret_cast<const Four*>(&values[row][col ^ row % 2 * (kLanes / 2)]);
  }
};

// What a block of a product shares, behind the slots: x times the columns' scales, and of each warp Z
// of a batch of rows.
struct SharedProduct {
  GroupOfRows<kMostTokens> x;
  GroupOfRows<kBatch> z[kWarps];
};

// Sums over a group's columns of x · Wᵀ for a batch of rows, in tensor cores. Nothing is lost to TF32:
// numbers are handed over in two parts, the upper bits and the rest. An infinity in x gives NaN.
class BatchSums {
 public:
  __device__ BatchSums(SharedProduct& product)
      : x_(product.x), z_(product.z[threadIdx.x / kLanes]), number_(threadIdx.x % kLanes) {}

  // Z of this lane's column, in a row of the batch.
  __device__ float& z(uint32_t row) { return z_.at(row, number_); }

  // Sums of lane 4g + t, of rows g and g + 8 and tokens 2t and 2t + 1: [g][2t], [g][2t + 1],
  // [g + 8][2t], [g + 8][2t + 1].
  __device__ void add_up(float (&sums)[4]) {
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) sums[i] = 0;
    __syncwarp();
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      // A lane takes four columns of each half that lie side by side: a sum's order is free.
      const uint32_t col = half * (kLanes / 2) + number_ % 4 * 4, row = number_ / 4;
      const Four low = z_.four(row, col), high = z_.four(row + kHalf, col), x = x_.four(row, col);
#pragma unroll
      for (uint32_t i = 0; i < 4; i += 2) {
        const float z[4] = {low.values[i], high.values[i], low.values[i + 1], high.values[i + 1]};
        const float z_upper[4] = {upper(z[0]), upper(z[1]), upper(z[2]), upper(z[3])};
        const float z_rest[4] = {z[0] - z_upper[0], z[1] - z_upper[1], z[2] - z_upper[2],
                                 z[3] - z_upper[3]};
        const float x_upper[2] = {upper(x.values[i]), upper(x.values[i + 1])};
        multiply_add(sums, z_upper, x_upper);
        multiply_add(sums, z_upper, {x.values[i] - x_upper[0], x.values[i + 1] - x_upper[1]});
        multiply_add(sums, z_rest, x_upper);
      }
    }
    __syncwarp();  // what was read is overwritten
  }

 private:
  const GroupOfRows<kMostTokens>& x_;
  GroupOfRows<kBatch>& z_;
  const uint32_t number_;
};

// Sums over some columns of x · Wᵀ, for rows `first_row` to `end_row` − 1 of W: one for each
// chunk of `chunk_sets` sets, [chunk][token][row], not yet multiplied by the rows' scales. Each is
// added up by one thread in the order of the groups, so that results do not change from run to run.
//
// Columns of x, of `type` and (tokens, width), are those of the matrix from `first_col` on; others
// count as zero.
template <bool kOdd>
__device__ void multiply_columns(const DeviceColumns& m, const void* x, uint64_t type_of_x,
                                 uint64_t tokens, uint64_t first_col, uint64_t width, float* sums,
                                 uint64_t sets_of_chunk, uint64_t first_tile, uint64_t end_tile,
                                 uint64_t first_row, uint64_t end_row) {
  const uint32_t type = static_cast<uint32_t>(type_of_x);
  const uint32_t chunk_sets = static_cast<uint32_t>(sets_of_chunk);
  SharedProduct& product = *reinterpret_cast<SharedProduct*>(dynamic_shared + sizeof(Shared));
  const uint32_t chunks = (m.sets + chunk_sets - 1) / chunk_sets;
  const uint32_t chunk = blockIdx.x % chunks;
  const Strip strip(m, blockIdx.x / chunks, first_tile, end_tile, first_row, end_row);
  const uint32_t first_set = chunk * chunk_sets;
  const uint32_t end_set = m.sets - first_set < chunk_sets ? m.sets : first_set + chunk_sets;
  const uint32_t number = threadIdx.x % kLanes;
  const uint32_t count = static_cast<uint32_t>(end_row - first_row);
  // The first of this lane's four sums in a batch: its token, its row among those asked for, which is
  // more than `count` before the first of them, and in its strip.
  const uint32_t token = number % 4 * 2, own_row = number / 4;
  const uint32_t asked_row = strip.row - static_cast<uint32_t>(first_row) + own_row;
  const uint32_t own = (chunk * static_cast<uint32_t>(tokens) + token) * count + asked_row;
  const uint32_t own_tokens = tokens > token ? static_cast<uint32_t>(tokens) - token : 0;
  uint32_t outlier = 0, end_outlier = 0;  // of the segment
  walk<kOdd>(
      m, strip, first_set, end_set,
      [&](uint32_t segment) {
        if (!strip.rows) return;
        outlier = m.first_outliers[segment];
        end_outlier = m.first_outliers[segment + 1];
      },
      [&](uint32_t group) {
        const Scales scales(m);
        for (uint32_t i = threadIdx.x; i < kLanes * kMostTokens; i += blockDim.x) {
          const uint32_t t = i / kLanes;
          const uint64_t position = static_cast<uint64_t>(group) * kLanes + i % kLanes;
          const uint32_t col = position < scales.cols ? m.column_order[position] : 0;
          const bool inside =
              position < scales.cols && t < tokens && col >= first_col && col - first_col < width;
          product.x.at(t, i % kLanes) =
              inside ? get(x, t * width + (col - first_col), type) * scales.col_scale(col) : 0.0f;
        }
      },
      [&](ColumnLane<kOdd>& lane, uint32_t group) {
        BatchSums batch(product);
#pragma unroll 1
        for (uint32_t top = 0; top < strip.rows; top += kBatch) {
          const uint32_t left = strip.rows - top;
          lane.template decode_batch<kBatch>(left < kBatch ? left : kBatch,
                                             [&](uint32_t r, float z) { batch.z(r) = z; });
#pragma unroll 1
          for (; outlier < end_outlier; ++outlier) {
            const ColumnOutlier exact = m.outliers[outlier];
            // Its row in the batch, from numbers that are in registers anyway.
            const uint32_t r =
                exact.row - static_cast<uint32_t>(first_row) - (asked_row - own_row) - top;
            if (exact.position / kLanes != group || r >= kBatch) break;
            if (exact.position % kLanes == number) {
              const uint32_t col = m.column_order[exact.position];
              batch.z(r) = outlier_z(Scales(m), exact.value, exact.row, col);
            }
          }
          float found[4];
          batch.add_up(found);
#pragma unroll
          for (uint32_t i = 0; i < 4; ++i) {
            const uint32_t below = top + i / 2 * kHalf, other = i % 2;
            if (own_row + below < strip.rows && asked_row + below < count && other < own_tokens) {
              float* const to = sums + (own + other * count + below);
              *to = group == chunk * chunk_sets * m.set_groups ? found[i] : *to + found[i];
            }
          }
        }
      },
      [](uint32_t) {});
}

}  // namespace

extern "C" {

// Fills in the segments of all tiles and the changes of outliers. A status for each tile.
__global__ void __launch_bounds__(kWarps* kLanes, 2)
    ectcq_index(const DeviceMatrix* matrix, uint64_t tiles, uint32_t* status) {
  const DeviceMatrix& m = *matrix;
  const Shared& shared = begin(m);
  const Scales scales(m);
  const uint32_t number = threadIdx.x % kLanes;
  share_among_warps(0, tiles, [&](uint32_t index) {
    const Tile tile = m.tiles[index];
    // Single bytes, as nothing is known yet of where a stream lies.
    const uint8_t* const end = m.data + tile.end;
    Lane<true> lane(shared, m.data + tile.payload + kHead, end);
    lane.x = load_bytes(m.data, tile.payload + 4 + 4 * number, tile.end);
    lane.set_trellis(0);
    for (uint32_t s = tile.first; s < tile.last; ++s) {
      m.states[static_cast<uint64_t>(s) * kLanes + number] = lane.x;
      m.trellis[static_cast<uint64_t>(s) * kLanes + number] =
          static_cast<uint8_t>(lane.trellis_state());
      if (number == 0) m.segments[s].words = static_cast<uint32_t>(lane.next - m.data);
      const Segment segment = m.segments[s];
      const uint32_t end_outlier = m.segments[s + 1].outliers;
      const uint32_t steps = steps_of(segment.count);
      uint32_t outlier = segment.outliers;
      for (uint32_t t = 0; t < steps; ++t) {
        const float z = lane.step<false>(t < segment.reading);
        for (; outlier < end_outlier; ++outlier) {
          const uint64_t place = m.outlier_places[outlier];
          const uint64_t i = place - segment.place;
          if (i >= static_cast<uint64_t>(t + 1) * kLanes) break;
          if (i % kLanes == number) {
            const uint32_t row = static_cast<uint32_t>(place / scales.cols);
            const uint32_t col = static_cast<uint32_t>(place % scales.cols);
            m.outlier_changes[outlier] = outlier_z(scales, m.outlier_values[outlier], row, col) - z;
          }
        }
      }
      if (lane.next > end) break;
    }
    if (number == 0) {
      status[index] = lane.next == end ? kOk : lane.next > end ? kTooShort : kTooLong;
    }
  });
}

#define DECODE(name, Value)                                                                   \
  __global__ void __launch_bounds__(kWarps* kLanes, 2)                                        \
      ectcq_decode_##name(const DeviceMatrix* matrix, Value* out, uint64_t first_segment,     \
                          uint64_t end_segment, uint64_t first, uint64_t end) {               \
    decode(*matrix, out, first_segment, end_segment, first, end);                             \
  }                                                                                           \
  __global__ void __launch_bounds__(kWarps* kLanes, 2)                                        \
      ectcq_gather_##name(const DeviceMatrix* matrix, const int64_t* numbers, uint64_t count, \
                          Value* out, uint64_t segments, uint64_t first_row, uint64_t rows) { \
    gather(*matrix, numbers, count, out, segments, first_row, rows);                          \
  }
DECODE(float32, float)
DECODE(float16, Float16)
DECODE(bfloat16, BFloat16)

#define MULTIPLY(tokens_at_most)                                                              \
  __global__ void __launch_bounds__(kWarps* kLanes, 2) ectcq_multiply_##tokens_at_most(       \
      const DeviceMatrix* matrix, const float* scaled, const float* totals, const void* bias, \
      void* y, uint64_t type, uint64_t tokens, uint64_t first_segment, uint64_t end_segment,  \
      uint64_t first_row, uint64_t end_row) {                                                 \
    const Product product = {scaled,                                                          \
                             totals,                                                          \
                             bias,                                                            \
                             y,                                                               \
                             static_cast<uint32_t>(type),                                     \
                             static_cast<uint32_t>(tokens),                                   \
                             static_cast<uint32_t>(first_row),                                \
                             static_cast<uint32_t>(end_row)};                                 \
    multiply<tokens_at_most>(*matrix, product, first_segment, end_segment);                   \
  }
MULTIPLY(1)
MULTIPLY(2)
MULTIPLY(4)
MULTIPLY(8)

// x, of `type` and (tokens, width), to what `multiply` takes for up to `padded` tokens. Its columns
// are those of the matrix from `first_col` on; all other columns become zero.
__global__ void ectcq_scale(const DeviceMatrix* matrix, const void* x, float* scaled, uint64_t type,
                            uint64_t tokens, uint64_t padded, uint64_t first_col, uint64_t width) {
  let_next_kernel_start();
  const DeviceMatrix& m = *matrix;
  const uint64_t col = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (col >= m.cols) return;
  const bool inside = col >= first_col && col - first_col < width;
  const float scale = inside ? Scales(m).col_scale(static_cast<uint32_t>(col)) : 0.0f;
  const uint64_t group = padded < 4 ? padded : 4;
  for (uint64_t t = 0; t < padded; ++t) {
    const float value =
        inside && t < tokens
            ? get(x, t * width + (col - first_col), static_cast<uint32_t>(type)) * scale
            : 0.0f;
    scaled[(t / group * m.cols + col) * group + t % group] = value;
  }
}

// As ectcq_index, for streams by columns.
__global__ void __launch_bounds__(kWarps* kLanes, 2)
    ectcq_columns_index(const DeviceColumns* matrix, uint64_t tiles, uint32_t* status) {
  const DeviceColumns& m = *matrix;
  Shared& shared = shared_memory();
  const uint64_t index =
      static_cast<uint64_t>(blockIdx.x) * warps_of_block() + threadIdx.x / kLanes;
  const uint32_t number = threadIdx.x % kLanes;
  ColumnTile tile = {};
  if (index < tiles) tile = m.tiles[index];
  const uint8_t* const words = m.data + tile.payload + kHead;
  const uint8_t* const end = m.data + tile.end;
  // Single bytes, as nothing is known yet of where a stream lies.
  Lane<true> lane(shared, words, end);
  lane.x = load_bytes(m.data, tile.payload + 4 + 4 * number, tile.end);
  bool reads = index < tiles;
  uint32_t segment = static_cast<uint32_t>(index * m.sets * m.parts);
  uint32_t step = 0, loaded = kNone;
  for (uint32_t group = 0; group < m.groups; ++group) {
    const uint32_t own = m.class_of_group[group];
    if (own != loaded) {
      __syncthreads();
      fill_slots(m.classes[own], m.feedback, m.input, shared);
      loaded = own;
      __syncthreads();
    }
    lane.set_trellis(0);
    for (uint32_t part = 0; part < m.parts && reads; ++part) {
      if (group % m.set_groups == 0) {
        const uint64_t place = static_cast<uint64_t>(segment) * kLanes + number;
        m.states[place] = lane.x;
        if (m.parts > 1) m.trellis[place] = static_cast<uint8_t>(lane.trellis_state());
        if (number == 0) m.words[segment] = static_cast<uint32_t>(lane.next - words);
        ++segment;
      }
      const uint32_t rows =
          first_of_part(tile.height, part + 1, m.parts) - first_of_part(tile.height, part, m.parts);
      for (uint32_t r = 0; r < rows; ++r, ++step) lane.step<false>(step < tile.reading);
      reads = lane.next <= end;  // before the number overflows
    }
  }
  if (index < tiles && number == 0) {
    status[index] = lane.next == end ? kOk : lane.next > end ? kTooShort : kTooLong;
  }
}

#define DECODE_COLUMNS(name, Value)                                                             \
  __global__ void __launch_bounds__(kWarps* kLanes, 2)                                          \
      ectcq_columns_decode_##name(const DeviceColumns* matrix, Value* out, uint64_t first_tile, \
                                  uint64_t end_tile, uint64_t first_row, uint64_t end_row) {    \
    if (is_odd(matrix->data, matrix->tiles->payload)) {                                         \
      decode_columns<true>(*matrix, out, first_tile, end_tile, first_row, end_row);             \
    } else {                                                                                    \
      decode_columns<false>(*matrix, out, first_tile, end_tile, first_row, end_row);            \
    }                                                                                           \
  }
DECODE_COLUMNS(float32, float)
DECODE_COLUMNS(float16, Float16)
DECODE_COLUMNS(bfloat16, BFloat16)

// As multiply_columns.
__global__ void __launch_bounds__(kWarps* kLanes, 2)
    ectcq_columns_multiply(const DeviceColumns* matrix, const void* x, uint64_t type,
                           uint64_t tokens, uint64_t first_col, uint64_t width, float* sums,
                           uint64_t chunk_sets, uint64_t first_tile, uint64_t end_tile,
                           uint64_t first_row, uint64_t end_row) {
  if (is_odd(matrix->data, matrix->tiles->payload)) {
    multiply_columns<true>(*matrix, x, type, tokens, first_col, width, sums, chunk_sets, first_tile,
                           end_tile, first_row, end_row);
  } else {
    multiply_columns<false>(*matrix, x, type, tokens, first_col, width, sums, chunk_sets,
                            first_tile, end_tile, first_row, end_row);
  }
}

// y, of `type` and (tokens, rows), from the sums of all chunks, added up in their order. Rows of the
// matrix from `first_row` on; `totals` as in `multiply`.
__global__ void ectcq_columns_sum(const DeviceColumns* matrix, const float* sums, uint64_t chunks,
                                  const float* totals, const void* bias, void* y, uint64_t type,
                                  uint64_t tokens, uint64_t first_row, uint64_t rows) {
  const uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= tokens * rows) return;
  const Scales scales(*matrix);
  const uint32_t row = static_cast<uint32_t>(first_row + i % rows);
  float sum = 0;
  for (uint64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[chunk * tokens * rows + i];
  float result = sum * scales.row_scale(row);
  if (totals) result += scales.zero_point(row) * totals[i / rows];
  if (bias) result += get(bias, i % rows, static_cast<uint32_t>(type));
  put(y, i, static_cast<uint32_t>(type), result);
}

}  // extern "C"
