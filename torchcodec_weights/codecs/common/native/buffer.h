// Memory that is kept from call to call, as new memory costs as much time as decoding into it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace codecs {

class Buffer {
 public:
  // At least so many bytes, aligned to 64, of whatever they held; null if there is no memory.
  uint8_t* reserve(size_t bytes) {
    if (size_ < bytes) {
      size_ = 0;
      memory_.reset();
      const size_t whole = (bytes + 63) / 64 * 64;
      memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, whole)));
      if (memory_) size_ = whole;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
  size_t size_ = 0;
};

}  // namespace codecs
