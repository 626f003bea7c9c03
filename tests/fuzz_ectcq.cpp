// Damaged payloads and random bytes through every decoder of this machine, under the sanitizers that
// tests/test_sanitizer.py compiles this with. Reads payload and tables from a file, mutates the
// payload, and decodes into a buffer of exactly the tile's size.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "ectcq/native/ectcq.h"

extern "C" {
int codecs_best_level();
int ectcq_decode(int, const ectcq::Tables*, const uint8_t*, size_t, size_t, float*);
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const size_t count = std::strtoul(argv[2], nullptr, 10);
  std::FILE* file = std::fopen(argv[1], "rb");
  if (!file) return 2;
  const auto tables = std::make_unique<ectcq::Tables>();
  if (std::fread(tables.get(), sizeof(ectcq::Tables), 1, file) != 1) return 2;
  std::vector<uint8_t> good(1 << 20);
  good.resize(std::fread(good.data(), 1, good.size(), file));
  std::fclose(file);

  const int levels = codecs_best_level();
  std::mt19937 random(1);
  int results = 0, errors = 0;
  for (int trial = 0; trial < 20000; ++trial) {
    // A buffer of its own size, so that one byte too far is found.
    std::vector<uint8_t> bad(good);
    if (trial % 4 == 0) bad.resize(random() % (good.size() + 1));
    if (trial % 4 == 1) bad.resize(good.size() + random() % 70, 0xA5);
    const unsigned changes = trial % 3 == 0 ? random() % 400 : random() % 4;
    for (unsigned i = 0; i < changes && !bad.empty(); ++i) bad[random() % bad.size()] = random();
    if (trial % 7 == 0 && bad.size() >= 4) std::memset(bad.data(), trial & 8 ? 0 : 255, 4);
    bad.shrink_to_fit();
    int first = -1;
    std::vector<float> expected;
    for (int level = 0; level <= levels; ++level) {
      std::vector<float> out(count);
      const int status =
          ectcq_decode(level, tables.get(), bad.data(), bad.size(), count, out.data());
      if (level == 0) {
        first = status;
        expected = out;
      } else if (status != first || (status == 0 && out != expected)) {
        std::printf("level %d: status %d, scalar %d\n", level, status, first);
        return 1;
      }
    }
    first == 0 ? ++results : ++errors;
  }
  std::printf("%d results, %d errors\n", results, errors);
  return results > 0 && errors > 0 ? 0 : 1;
}
