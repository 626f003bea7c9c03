// The private data of a container, as model.py and columns.py read it, for processes without Python.

#pragma once

#include <string>
#include <vector>

#include "ectcq.h"

namespace ectcq {

// What the decoder of a matrix needs of its private data: tables of a stream by rows, or classes of
// one by columns.
struct EntropyModels {
  std::vector<Tables> tables;        // one, or none where the stream is by columns
  std::vector<ColumnClass> classes;  // none where the stream is by rows
  std::vector<uint8_t> of_group;     // the class of each group of 32 columns
  int32_t states;                    // of the trellis

  // Of a matrix of `cols` columns and the step `unit`. Returns what is wrong, in a message for users;
  // empty if nothing is.
  std::string read(const uint8_t* data, size_t size, size_t cols, float unit);
};

}  // namespace ectcq
