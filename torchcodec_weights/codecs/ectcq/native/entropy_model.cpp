#include "entropy_model.h"

#include <cstring>
#include <iterator>

#include "columns.h"
#include "trellis.h"

namespace ectcq {
namespace {

constexpr uint8_t kByColumns = 0x80;
constexpr size_t kMostMagnitudes = 127, kMostClasses = 16;
constexpr int kZero = 128;  // the symbol of level 0

const Trellis* trellis_of(unsigned log2_states) {
  for (const Trellis& trellis : kTrellises) {
    if (log2_states < 31 && trellis.states == int32_t{1} << log2_states) return &trellis;
  }
  return nullptr;
}

// Frequencies and values of a model whose numbers of magnitudes begin at `p`; it has `size` bytes.
std::string read_model(const uint8_t* p, size_t size, float unit, ColumnClass* model) {
  if (size < 2) return "ectcq: entropy model is cut short";
  const size_t counts[] = {p[0], p[1]};
  for (const size_t count : counts) {
    if (count < 1 || count > kMostMagnitudes) return "ectcq: entropy model is malformed";
  }
  if (size != 2 + 3 * (counts[0] + counts[1]) - 1) return "ectcq: entropy model is malformed";
  const uint8_t* words = p + 2;
  const auto* shifts = reinterpret_cast<const int8_t*>(words + 2 * (counts[0] + counts[1]));
  std::memset(model, 0, sizeof(*model));
  for (int q = 0; q < 2; ++q) {
    uint32_t sum = 0;
    for (size_t i = 0; i < counts[q]; ++i, words += 2) {
      uint16_t frequency;
      std::memcpy(&frequency, words, 2);
      if (frequency == 0) return "ectcq: frequencies do not add up";
      sum += frequency;
      const bool middle = q == 0 && i == 0;  // level 0, of value 0 and twice the frequency
      const int shift = middle ? 0 : *shifts++;
      const double magnitude = 2.0 * static_cast<double>(i) + q + shift / 128.0;
      const float value = middle ? 0.0f : static_cast<float>(magnitude * unit);
      const int up = kZero + static_cast<int>(i), down = kZero - q - static_cast<int>(i);
      model->frequency[q][up] = static_cast<uint16_t>(middle ? 2 * frequency : frequency);
      model->values[q][up] = value;
      if (middle) continue;
      model->frequency[q][down] = frequency;
      model->values[q][down] = -value;
    }
    if (sum != kSlots / 2) return "ectcq: frequencies do not add up";
  }
  if (counts[0] == 1) return "ectcq: entropy model has a single level";
  return {};
}

void fill_tables(const ColumnClass& model, const Trellis& trellis, float unit, Tables* tables) {
  tables->feedback = trellis.h0 >> 1;
  tables->input = trellis.h1 >> 1;
  tables->unit = unit;
  for (uint32_t q = 0; q < 2; ++q) {
    uint32_t* slot = tables->slots + q * kSlots;
    for (uint32_t symbol = 0; symbol < kSymbols; ++symbol) {
      const uint32_t frequency = model.frequency[q][symbol];
      for (uint32_t offset = 0; offset < frequency; ++offset) {
        *slot++ = slot_entry(frequency, offset, symbol);
      }
    }
  }
  std::memcpy(tables->values, model.values, sizeof(tables->values));
}

}  // namespace

std::string EntropyModels::read(const uint8_t* data, size_t size, size_t cols, float unit) {
  tables.clear(), classes.clear(), of_group.clear();
  if (size < 2) return "ectcq: entropy model is cut short";
  const bool by_columns = data[0] >= kByColumns;
  const Trellis* trellis = trellis_of(data[0] & ~kByColumns);
  if (!trellis) return "ectcq: entropy model is malformed";
  states = trellis->states;
  const uint8_t* p = data + 1;
  const uint8_t* end = data + size;
  const size_t count = by_columns ? *p++ : 1;
  if (count < 1 || count > kMostClasses) return "ectcq: classes of columns: allowed: 1 to 16";
  classes.resize(count);
  for (ColumnClass& model : classes) {
    const auto left = static_cast<size_t>(end - p);
    if (left < 2) return "ectcq: entropy models of columns are cut short";
    const size_t needed = 2 + 3 * (size_t{p[0]} + p[1]) - 1;
    // Of a stream by rows the model is all that is left.
    const size_t own = by_columns && needed < left ? needed : left;
    const std::string error = read_model(p, own, unit, &model);
    if (!error.empty()) return error;
    p += own;
  }
  if (!by_columns) {
    tables.resize(1);
    fill_tables(classes[0], *trellis, unit, tables.data());
    classes.clear();
    return {};
  }
  const size_t groups = groups_of(cols);
  if (static_cast<size_t>(end - p) != (groups + 1) / 2) {
    return "ectcq: classes of columns do not fit their groups";
  }
  for (size_t i = 0; i < 2 * ((groups + 1) / 2); ++i) {
    const uint8_t own = i % 2 ? p[i / 2] >> 4 : p[i / 2] & 15;
    if (i < groups ? own >= count : own != 0) {
      return "ectcq: a group of columns has a class that is not there";
    }
    if (i < groups) of_group.push_back(own);
  }
  return {};
}

}  // namespace ectcq
