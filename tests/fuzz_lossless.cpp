// Damaged payloads, tables and random bytes through the lossless decoders of this machine, under the
// sanitizers that tests/test_sanitizer.py compiles this with. Reads private data and payload from
// files, mutates them, and decodes into a buffer of exactly the tile's size.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

extern "C" {
int codecs_best_level();
int lossless_decode(int, int, const uint8_t*, size_t, const uint8_t*, size_t, size_t, void*);
size_t lossless_bound(size_t);
size_t lossless_encode(int, const uint8_t*, size_t, const void*, size_t, uint8_t*, uint32_t*,
                       size_t*);
}

namespace {

using Bytes = std::vector<uint8_t>;

std::mt19937 random_number(1);

Bytes read(const char* path) {
  Bytes bytes(1 << 20);
  std::FILE* file = std::fopen(path, "rb");
  if (!file) std::exit(2);
  bytes.resize(std::fread(bytes.data(), 1, bytes.size(), file));
  std::fclose(file);
  return bytes;
}

// A buffer of its own size, so that one byte too far is found.
Bytes damaged(const Bytes& good, int trial) {
  Bytes bad(good);
  if (trial % 4 == 0) bad.resize(random_number() % (good.size() + 1));
  if (trial % 4 == 1) bad.resize(good.size() + random_number() % 70, 0xA5);
  const unsigned changes = trial % 3 == 0 ? random_number() % 400 : random_number() % 4;
  for (unsigned i = 0; i < changes && !bad.empty(); ++i) {
    bad[random_number() % bad.size()] = static_cast<uint8_t>(random_number());
  }
  bad.shrink_to_fit();
  return bad;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const Bytes good_private = read(argv[1]), good_payload = read(argv[2]);
  const size_t count = std::strtoul(argv[3], nullptr, 10);
  const int type = std::atoi(argv[4]);
  const size_t width = type == 0 ? 4 : 2;

  int results = 0, errors = 0;
  for (int trial = 0; trial < 20000; ++trial) {
    const Bytes shared = trial % 5 == 0 ? damaged(good_private, trial / 5) : good_private;
    Bytes payload = trial % 5 == 0 ? good_payload : damaged(good_payload, trial);
    // Another mode for a plane, which its bytes do not fit, mostly.
    if (trial % 7 == 0 && !payload.empty()) payload[0] = static_cast<uint8_t>(random_number() % 5);
    int first = -1;
    Bytes expected;
    for (int level = 0; level <= codecs_best_level(); ++level) {
      Bytes out(count * width);
      const int status = lossless_decode(level, type, shared.data(), shared.size(), payload.data(),
                                         payload.size(), count, out.data());
      if (level == 0) {
        first = status;
        expected = out;
      } else if (status != first || (status == 0 && out != expected)) {
        std::printf("level %d: status %d, scalar %d\n", level, status, first);
        return 1;
      }
    }
    first == 0 ? ++results : ++errors;
    if (trial % 10 == 0) {
      // The encoder takes any bits, and any private data that the decoder takes.
      Bytes weights(count * width), buffer(lossless_bound(count));
      for (uint8_t& byte : weights) byte = static_cast<uint8_t>(random_number());
      std::vector<uint32_t> outliers(count);
      size_t found = 0;
      lossless_encode(type, shared.data(), shared.size(), weights.data(), count, buffer.data(),
                      outliers.data(), &found);
    }
  }
  std::printf("%d results, %d errors\n", results, errors);
  return results > 0 && errors > 0 ? 0 : 1;
}
