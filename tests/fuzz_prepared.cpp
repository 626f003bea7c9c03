// Damaged weights, checksums right, prepared and used by compiled code alone, under the sanitizers that
// tests/test_sanitizer.py compiles this with. Reads the arrays of a weight, the three of bytes first.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "common/native/crc32c.h"
#include "common/native/level.h"
#include "ectcq/native/prepared.h"
#include "ectcq/native/products.h"

using Bytes = std::vector<uint8_t>;

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  std::FILE* file = std::fopen(argv[1], "rb");
  if (!file) return 2;
  const auto read = [&](const char* count) {
    Bytes bytes(std::strtoul(count, nullptr, 10));
    if (!bytes.empty() && std::fread(bytes.data(), bytes.size(), 1, file) != 1) std::exit(2);
    return bytes;
  };
  const Bytes good = read(argv[2]), scale = read(argv[3]), columns = read(argv[4]);
  const Bytes zeros = read(argv[5]);
  std::fclose(file);
  std::vector<float> zero(zeros.size() / 4);
  if (!zeros.empty()) std::memcpy(zero.data(), zeros.data(), zeros.size());
  uint32_t header = 0;
  std::memcpy(&header, good.data() + 8, 4);

  std::mt19937 random(1);
  int results = 0, errors = 0, used = 0;
  for (int trial = 0; trial < 6000; ++trial) {
    Bytes bad(good), rows(scale), cols(columns);
    for (unsigned i = random() % 4; i > 0; --i) bad[random() % header] = random() & 255;
    if (trial % 3 == 0) bad[random() % bad.size()] ^= 1 + random() % 255;
    if (trial % 5 == 0) bad.resize(random() % bad.size());
    if (trial % 9 == 0) rows.resize(1 + random() % rows.size());
    bad.shrink_to_fit(), rows.shrink_to_fit();
    uint32_t size = 0;
    if (bad.size() >= 52) std::memcpy(&size, bad.data() + 8, 4);
    if (size >= 56 && size <= bad.size()) {
      Bytes vectors(rows);
      vectors.insert(vectors.end(), zeros.begin(), zeros.end());
      vectors.insert(vectors.end(), cols.begin(), cols.end());
      const uint32_t ours = codecs::crc32c(vectors.data(), vectors.size());
      std::memcpy(bad.data() + 36, &ours, 4);
      const uint32_t all = codecs::crc32c(bad.data(), size - 4);
      std::memcpy(bad.data() + size - 4, &all, 4);
    }
    const codecs::WeightArrays arrays{
        bad.data(),  bad.size(),  rows.data(), rows.size(), zero.empty() ? nullptr : zero.data(),
        zero.size(), cols.data(), cols.size()};
    ectcq::Prepared weight;
    const int64_t height = 1 + random() % 30;
    const ectcq::Window window{0, height, 0, 33};
    if (!weight.open(arrays, window, trial % (codecs::best_level() + 1)).empty()) {
      ++errors;
      continue;
    }
    ++results;
    if (!weight.is_of(arrays)) return 1;
    const ectcq::Linear linear = weight.at(bad.data());
    const std::vector<float> x(33, 1.0f);
    std::vector<float> y(height);
    if (linear.matrix.rows * linear.matrix.cols > 1 << 20) continue;
    used += ectcq_linear(weight.level(), &linear, x.data(), 0, 1, nullptr, y.data(), 1) == 0;
    const auto& m = linear.matrix;
    std::vector<uint16_t> decoded((m.first_row(m.end) - m.first_row(m.first)) * m.cols);
    weight.decode(bad.data(), m.first, m.end, 2, decoded.data(), 1);
  }
  std::printf("%d results, %d of them used, %d errors\n", results, used, errors);
  return results > 0 && used > 0 && errors > 0 ? 0 : 1;
}
