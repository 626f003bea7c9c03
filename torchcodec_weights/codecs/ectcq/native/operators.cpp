// PyTorch's operators `torchcodec_weights::linear_inference` and `embedding` for the CPU, without
// Python: of compiled graphs, and of AOTInductor packages in programs that have no Python.
//
// In a Python process Python decides first: what is not known from `codecs_know` or `keep_levels` goes to
// the operator that does everything, and what changes that decision calls `codecs_forget`. In a process
// without Python a weight is prepared at its first use.

#include <algorithm>
#include <cstring>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <unordered_map>

#include "common/native/int8.h"
#include "common/native/libtorch.h"
#include "common/native/matrix.h"
#include "prepared.h"
#include "products.h"

namespace ectcq {
namespace {

// Most tokens that are multiplied as the weight is decoded; as FUSED_TOKENS of decoders/cpu.py.
constexpr int64_t kFusedTokens = 16;
// Tiles for each thread that are decoded before a matrix product.
constexpr size_t kTilesPerThread = 4;

constexpr char kWithPython[] = "torchcodec_weights::linear_python";

const LibTorch* torch_ = nullptr;
bool python_ = false;  // whether Python answers for what is not known here

[[noreturn]] void fail(const std::string& message) {
  throw std::runtime_error("torchcodec_weights: " + message);
}

void check(TorchError error, const char* what) {
  if (error) fail(std::string(what) + " failed");
}

#define CHECKED(name, ...) check(torch_->name(__VA_ARGS__), #name)

// A tensor that someone else owns, or none.
class Tensor {
 public:
  explicit Tensor(TensorHandle handle = nullptr) : handle_(handle) {}

  explicit operator bool() const { return handle_; }
  TensorHandle get() const { return handle_; }

  // An owned handle of it.
  TensorHandle share() const {
    TensorHandle other;
    CHECKED(aoti_torch_new_tensor_handle, handle_, &other);
    return other;
  }

  int64_t dim() const {
    int64_t dim;
    CHECKED(aoti_torch_get_dim, handle_, &dim);
    return dim;
  }
  int64_t numel() const {
    int64_t numel;
    CHECKED(aoti_torch_get_numel, handle_, &numel);
    return numel;
  }
  const int64_t* sizes() const {
    int64_t* sizes;
    CHECKED(aoti_torch_get_sizes, handle_, &sizes);
    return sizes;
  }
  int32_t dtype() const {
    int32_t dtype;
    CHECKED(aoti_torch_get_dtype, handle_, &dtype);
    return dtype;
  }
  // Whether it is contiguous on the CPU.
  bool plain() const {
    int32_t device;
    bool contiguous;
    CHECKED(aoti_torch_get_device_type, handle_, &device);
    CHECKED(aoti_torch_is_contiguous, handle_, &contiguous);
    return contiguous && device == torch_->cpu;
  }
  const void* data() const {
    const void* data;
    CHECKED(torch_get_const_data_ptr, handle_, &data);
    return data;
  }
  void* mutable_data() const {
    void* data;
    CHECKED(torch_get_mutable_data_ptr, handle_, &data);
    return data;
  }

 private:
  TensorHandle handle_;
};

// A tensor of our own.
class OwnTensor : public Tensor {
 public:
  explicit OwnTensor(TensorHandle handle) : Tensor(handle) {}
  OwnTensor(OwnTensor&& other) noexcept : Tensor(other) { other.owned_ = false; }
  ~OwnTensor() {
    if (owned_) torch_->aoti_torch_delete_tensor_object(get());
  }
  // As an argument or result.
  StableIValue give() {
    owned_ = false;
    return reinterpret_cast<StableIValue>(get());
  }

 private:
  bool owned_ = true;
};

// What an operator was called with. Freed at the end, unless another operator takes it.
class Arguments {
 public:
  // `schema` has a letter for each: t tensor, o optional tensor, l list of integers, n number.
  Arguments(StableIValue* stack, const char* schema) : schema_(schema) {
    std::copy(stack, stack + std::strlen(schema), values_);
  }
  Arguments(const Arguments&) = delete;
  ~Arguments() {
    for (size_t i = 0; schema_[i]; ++i) {
      if (schema_[i] == 't' || (schema_[i] == 'o' && values_[i])) {
        torch_->aoti_torch_delete_tensor_object(tensor(i).get());
      }
      if (schema_[i] == 'o') delete reinterpret_cast<StableIValue*>(values_[i]);
      if (schema_[i] == 'l') torch_->torch_delete_list(reinterpret_cast<ListHandle>(values_[i]));
    }
  }

  Tensor tensor(size_t i) const {
    StableIValue value = values_[i];
    if (schema_[i] == 'o' && value) value = *reinterpret_cast<StableIValue*>(value);
    return Tensor(reinterpret_cast<TensorHandle>(value));
  }
  StableIValue number(size_t i) const { return values_[i]; }
  Window window(size_t i) const {
    const auto list = reinterpret_cast<ListHandle>(values_[i]);
    size_t size;
    CHECKED(torch_list_size, list, &size);
    if (size != 4) fail("window: allowed: four integers");
    int64_t items[4];
    for (size_t k = 0; k < 4; ++k) {
      StableIValue item;
      CHECKED(torch_list_get_item, list, k, &item);
      items[k] = static_cast<int64_t>(item);
    }
    return {items[0], items[1], items[2], items[3]};
  }

  // Have another operator of the same schema do it, with its result on the stack.
  void hand_over(const char* operator_name, StableIValue* stack) {
    schema_ = "";
    check(torch_->torch_call_dispatcher(operator_name, "", stack, kTorchVersion), operator_name);
  }

 private:
  static constexpr size_t kMost = 14;
  const char* schema_;
  StableIValue values_[kMost];
};

// Of a dtype (floats.h), or -1.
int type_of(int32_t dtype) {
  if (dtype == torch_->float32) return kFloat32;
  if (dtype == torch_->bfloat16) return kBfloat16;
  if (dtype == torch_->float16) return kFloat16;
  return -1;
}

OwnTensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) {
    strides[i] = stride;
  }
  TensorHandle handle;
  CHECKED(aoti_torch_empty_strided, static_cast<int64_t>(sizes.size()), sizes.data(),
          strides.data(), dtype, torch_->cpu, 0, &handle);
  return OwnTensor(handle);
}

int threads() {
  uint32_t count;
  CHECKED(torch_get_num_threads, &count);
  return static_cast<int>(count);
}

// The four tensors of a weight.
struct Weight {
  Tensor qdata, scale, zero_point, act_pre_scale;

  Weight(const Arguments& arguments, size_t first)
      : qdata(arguments.tensor(first)),
        scale(arguments.tensor(first + 1)),
        zero_point(arguments.tensor(first + 2)),
        act_pre_scale(arguments.tensor(first + 3)) {}

  // The memory of the tensors. False where one is not what a weight has: not on the CPU, of another
  // dtype, with gaps, or released.
  bool arrays(WeightArrays* to) const {
    const auto get = [](const Tensor& tensor, int32_t dtype, int64_t item, const auto** data,
                        size_t* count) {
      int64_t stored, offset;
      CHECKED(aoti_torch_get_storage_size, tensor.get(), &stored);
      CHECKED(aoti_torch_get_storage_offset, tensor.get(), &offset);
      if (!tensor.plain() || tensor.dim() != 1 || tensor.dtype() != dtype) return false;
      *count = static_cast<size_t>(tensor.numel());
      if ((offset + tensor.numel()) * item > stored) return false;
      *data = static_cast<std::remove_reference_t<decltype(*data)>>(tensor.data());
      return true;
    };
    *to = {};
    return get(qdata, torch_->uint8, 1, &to->data, &to->size) &&
           get(scale, torch_->uint8, 1, &to->scale, &to->scales) &&
           get(act_pre_scale, torch_->uint8, 1, &to->act_pre_scale, &to->act_pre_scales) &&
           (!zero_point ||
            (get(zero_point, torch_->float32, 4, &to->zero_point, &to->zero_points) &&
             to->zero_points > 0));
  }
};

// A weight as int8 levels, which Python made. Their tensors are held, as Python may drop them while they
// are multiplied by.
class Levels {
 public:
  Levels(const WeightCopy& copy, const Int8Matrix& matrix, std::vector<OwnTensor> tensors)
      : copy_(copy), matrix_(matrix), tensors_(std::move(tensors)) {}

  bool is_of(const WeightArrays& weight) const { return copy_.is_of(weight); }
  const Int8Matrix& matrix() const { return matrix_; }

 private:
  WeightCopy copy_;
  Int8Matrix matrix_;
  std::vector<OwnTensor> tensors_;
};

// Weights in a form, by where their containers lie and their windows. An entry counts only where what it
// was made from is still what lies there.
template <typename Form>
class Table {
 public:
  std::shared_ptr<const Form> find(const WeightArrays& weight, const Window& window) const {
    std::shared_ptr<const Form> found;
    {
      const std::shared_lock<std::shared_mutex> lock(mutex_);
      const auto entry = entries_.find({weight.data, window});
      if (entry != entries_.end()) found = entry->second;
    }
    return found && found->is_of(weight) ? found : nullptr;
  }

  void add(const uint8_t* data, const Window& window, std::shared_ptr<const Form> form) {
    const std::lock_guard<std::shared_mutex> lock(mutex_);
    entries_[{data, window}] = std::move(form);
  }

  // All weights, if `data` is null.
  void forget(const uint8_t* data) {
    Entries freed;  // without the lock
    const std::lock_guard<std::shared_mutex> lock(mutex_);
    for (auto entry = entries_.begin(); entry != entries_.end();) {
      const auto here = entry++;
      if (!data || here->first.data == data) freed.insert(entries_.extract(here));
    }
  }

 private:
  struct Key {
    const uint8_t* data;
    Window window;
    bool operator==(const Key& o) const {
      return data == o.data && window.first_row == o.window.first_row &&
             window.rows == o.window.rows && window.first_col == o.window.first_col &&
             window.cols == o.window.cols;
    }
  };
  struct Hash {
    size_t operator()(const Key& key) const {
      return std::hash<const void*>()(key.data) ^
             static_cast<size_t>(key.window.first_row * 31 + key.window.first_col);
    }
  };
  using Entries = std::unordered_map<Key, std::shared_ptr<const Form>, Hash>;

  mutable std::shared_mutex mutex_;
  Entries entries_;
};

template <typename Form>
Table<Form>& table() {
  static Table<Form>* const kept = new Table<Form>;  // threads may use it until the process ends
  return *kept;
}

void forget(const uint8_t* data) {
  table<Prepared>().forget(data);
  table<Levels>().forget(data);
}

// Prepares a weight, and puts it into the table. Returns what is wrong with it; empty if nothing is.
std::string prepare(const WeightArrays& weight, const Window& window,
                    std::shared_ptr<const Prepared>* prepared) {
  auto made = std::make_shared<Prepared>();
  std::string error = made->open(weight, window, best_level());
  if (!error.empty()) return error;
  *prepared = made;
  table<Prepared>().add(weight.data, window, std::move(made));
  return {};
}

void check_status(int64_t status) {
  if (!status) return;
  const char* text = status_text(static_cast<int>(status & 0xFF));
  fail("ectcq: tile " + std::to_string(status >> 8) + " is corrupt: " + (text ? text : "error"));
}

// The weight, from the table or put there. Throws where it is corrupt.
std::shared_ptr<const Prepared> prepared(const Weight& weight, const Window& window,
                                         WeightArrays* arrays) {
  if (!weight.arrays(arrays)) {
    fail("qdata, scale, zero_point or act_pre_scale is not what a weight on the CPU has");
  }
  auto found = table<Prepared>().find(*arrays, window);
  if (!found) {
    const std::string error = prepare(*arrays, window, &found);
    if (!error.empty()) fail(error);
  }
  return found;
}

// The rows of some tiles, cut to the window's columns: (rows, cols) of `dtype`.
OwnTensor decoded(const Prepared& weight, const uint8_t* data, size_t first, size_t end,
                  int32_t dtype) {
  const Linear linear = weight.at(data);
  const MatrixView& m = linear.matrix;
  const size_t rows = m.first_row(end) - m.first_row(first),
               width = linear.end_col - linear.first_col;
  const auto sized = [rows](size_t cols) {
    return std::vector<int64_t>{static_cast<int64_t>(rows), static_cast<int64_t>(cols)};
  };
  const int type = type_of(dtype);
  OwnTensor all = empty(sized(m.cols), dtype);
  check_status(weight.decode(data, first, end, type, all.mutable_data(), threads()));
  if (width == m.cols) return all;
  OwnTensor cut = empty(sized(width), dtype);
  const size_t item = item_size(type);
  const auto* from = static_cast<const uint8_t*>(all.data()) + linear.first_col * item;
  auto* to = static_cast<uint8_t*>(cut.mutable_data());
  for (size_t i = 0; i < rows; ++i) {
    std::memcpy(to + i * width * item, from + i * m.cols * item, width * item);
  }
  return cut;
}

// y = x · Wᵀ + bias for many tokens: a few tiles are decoded at a time, and go through PyTorch's
// product.
void multiply_groups(const Prepared& weight, const uint8_t* data, const Tensor& x, int64_t tokens,
                     const Tensor& bias, void* y) {
  const Linear linear = weight.at(data);
  const MatrixView& m = linear.matrix;
  const int32_t dtype = x.dtype();
  const int type = type_of(dtype);
  const size_t item = item_size(type), rows = linear.end_row - linear.first_row;
  const size_t step = kTilesPerThread * static_cast<size_t>(threads());
  for (size_t tile = m.first; tile < m.end; tile += step) {
    const size_t last = std::min(tile + step, m.end);
    OwnTensor part = decoded(weight, data, tile, last, dtype);
    StableIValue stack[] = {reinterpret_cast<StableIValue>(x.share()), part.give(), 0};
    CHECKED(torch_call_dispatcher, "aten::linear", "", stack, kTorchVersion);
    const OwnTensor product(reinterpret_cast<TensorHandle>(stack[0]));
    if (!product.plain()) fail("aten::linear returned a tensor with gaps");
    const size_t begin = m.first_row(tile), end = m.first_row(last);
    const size_t from = std::max(begin, linear.first_row), to = std::min(end, linear.end_row);
    for (int64_t t = 0; t < tokens; ++t) {
      const size_t row = static_cast<size_t>(t);
      std::memcpy(
          static_cast<uint8_t*>(y) + (row * rows + from - linear.first_row) * item,
          static_cast<const uint8_t*>(product.data()) + (row * (end - begin) + from - begin) * item,
          (to - from) * item);
    }
  }
  if (!bias) return;
  std::vector<float> sum(rows);
  const auto* added = static_cast<const uint8_t*>(bias.data());
  for (int64_t t = 0; t < tokens; ++t) {
    uint8_t* own = static_cast<uint8_t*>(y) + static_cast<size_t>(t) * rows * item;
    for (size_t i = 0; i < rows; ++i) {
      sum[i] = stored_value(own + i * item, type) + stored_value(added + i * item, type);
    }
    if (type == kFloat32) {
      std::memcpy(own, sum.data(), rows * sizeof(float));
    } else {
      narrow(weight.level(), sum.data(), rows, type, reinterpret_cast<uint16_t*>(own));
    }
  }
}

// (x, qdata, scale, zero_point?, act_pre_scale, bias?, window, transposed)
void linear_inference(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack, "tttotoln");
  const Tensor x = arguments.tensor(0), bias = arguments.tensor(5);
  const Weight weight(arguments, 1);
  const Window window = arguments.window(6);
  const bool transposed = arguments.number(7) & 1;
  const int32_t dtype = x.dtype();
  const int type = type_of(dtype);
  const int64_t dims = x.dim(), cols = window.cols, rows = window.rows;
  const int64_t* sizes = x.sizes();
  const bool fits = !transposed && type >= 0 && dims > 0 && cols > 0 && rows > 0 &&
                    sizes[dims - 1] == cols && x.plain() &&
                    (!bias || (bias.plain() && bias.dtype() == dtype && bias.numel() == rows));
  const int64_t tokens = fits ? x.numel() / cols : 0;
  WeightArrays arrays;
  std::shared_ptr<const Prepared> found;
  std::shared_ptr<const Levels> levels;
  if (!python_) {
    if (!fits)
      fail(
          "linear: allowed without Python: x and bias of one dtype, float32, float16 or "
          "bfloat16, contiguous on the CPU, that fit the weight, which is not transposed");
    found = prepared(weight, window, &arrays);
  } else if (tokens > 0 && tokens <= kFusedTokens && weight.arrays(&arrays)) {
    levels = table<Levels>().find(arrays, window);
    if (!levels) found = table<Prepared>().find(arrays, window);
  }
  if (!found && !levels) return arguments.hand_over(kWithPython, stack);
  std::vector<int64_t> shape(sizes, sizes + dims);
  shape.back() = rows;
  OwnTensor y = empty(shape, dtype);
  const void* added = bias ? bias.data() : nullptr;
  const auto count = static_cast<size_t>(tokens);
  if (levels) {
    if (codecs_int8_multiply(best_level(), &levels->matrix(), x.data(), type, count, added,
                             y.mutable_data(), threads()) != kOk) {
      fail("int8: no memory");
    }
  } else if (tokens > kFusedTokens) {
    multiply_groups(*found, arrays.data, x, tokens, bias, y.mutable_data());
  } else if (tokens > 0) {
    const Linear linear = found->at(arrays.data);
    check_status(ectcq_linear(found->level(), &linear, x.data(), type, count, added,
                              y.mutable_data(), threads()));
  }
  stack[0] = y.give();
}

// (qdata, scale, zero_point?, act_pre_scale, window, levels, stride, row_scale, col_scale?, shift?,
// exact_starts, exact_columns, exact_values, first_col): the parts of Int8Matrix, which Python has
// checked, and the weight that it was made of.
void keep_levels(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack, "ttotltntootttn");
  WeightArrays arrays;
  Container container;
  const Window window = arguments.window(4);
  if (!Weight(arguments, 0).arrays(&arrays) || !container.open(arrays).empty()) {
    fail("keep_levels: allowed: a weight on the CPU that is not corrupt");
  }
  std::vector<OwnTensor> tensors;
  const auto held = [&](size_t i) -> const void* {
    const Tensor tensor = arguments.tensor(i);
    if (!tensor) return nullptr;
    tensors.emplace_back(tensor.share());
    return tensors.back().data();
  };
  const Int8Matrix matrix = {
      static_cast<const int8_t*>(held(5)),      static_cast<size_t>(arguments.number(6)),
      static_cast<size_t>(window.rows),         static_cast<size_t>(window.cols),
      static_cast<const float*>(held(7)),       static_cast<const float*>(held(8)),
      static_cast<const float*>(held(9)),       static_cast<const uint32_t*>(held(10)),
      static_cast<const uint32_t*>(held(11)),   static_cast<const float*>(held(12)),
      static_cast<size_t>(arguments.number(13))};
  table<Levels>().add(arrays.data, window,
                      std::make_shared<Levels>(WeightCopy(arrays, container.header_size), matrix,
                                               std::move(tensors)));
}

// (indices, qdata, scale, zero_point?, act_pre_scale, window, dtype)
void embedding(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack, "tttotln");
  const Tensor indices = arguments.tensor(0);
  const Weight weight(arguments, 1);
  const Window window = arguments.window(5);
  const auto dtype = static_cast<int32_t>(arguments.number(6));
  const int type = type_of(dtype);
  const int32_t kind = indices.dtype();
  if (type < 0) fail("dtype: allowed: float32, float16, bfloat16");
  if ((kind != torch_->int64 && kind != torch_->int32) || !indices.plain()) {
    fail("indices: allowed: int64 or int32, contiguous on the CPU");
  }
  WeightArrays arrays;
  const auto found = prepared(weight, window, &arrays);
  const Linear linear = found->at(arrays.data);
  const MatrixView& m = linear.matrix;
  const auto count = static_cast<size_t>(indices.numel());
  const void* numbers = indices.data();
  const auto index = [&](size_t i) {
    return kind == torch_->int64 ? static_cast<const int64_t*>(numbers)[i]
                                 : int64_t{static_cast<const int32_t*>(numbers)[i]};
  };
  // By tile, so that each is decoded once.
  std::vector<std::pair<size_t, size_t>> wanted(count);  // row of the matrix, place in the output
  for (size_t i = 0; i < count; ++i) {
    const int64_t row = index(i);
    if (row < 0 || row >= window.rows) {
      fail("index " + std::to_string(row) + " into a weight of " + std::to_string(window.rows) +
           " rows");
    }
    wanted[i] = {linear.first_row + static_cast<size_t>(row), i};
  }
  std::sort(wanted.begin(), wanted.end());
  std::vector<int64_t> shape(indices.sizes(), indices.sizes() + indices.dim());
  shape.push_back(window.cols);
  OwnTensor out = empty(shape, dtype);
  auto* to = static_cast<uint8_t*>(out.mutable_data());
  const size_t bytes = static_cast<size_t>(window.cols) * item_size(type);
  for (size_t i = 0; i < count;) {
    const size_t tile = tile_of(wanted[i].first, m.tiles, m.rows);
    const OwnTensor rows = decoded(*found, arrays.data, tile, tile + 1, dtype);
    const auto* from = static_cast<const uint8_t*>(rows.data());
    for (; i < count && wanted[i].first < m.first_row(tile + 1); ++i) {
      const size_t row = wanted[i].first - m.first_row(tile);
      std::memcpy(to + wanted[i].second * bytes, from + row * bytes, bytes);
    }
  }
  stack[0] = out.give();
}

#undef CHECKED

constexpr char kNamespace[] = "torchcodec_weights";
#define WEIGHT "Tensor qdata, Tensor scale, Tensor? zero_point, Tensor act_pre_scale"
#define LINEAR "(Tensor x, " WEIGHT ", Tensor? bias, int[] window, bool transposed) -> Tensor"
constexpr char kLinear[] = "linear" LINEAR;
constexpr char kLinearInference[] = "linear_inference" LINEAR;
constexpr char kEmbedding[] =
    "embedding(Tensor indices, " WEIGHT ", int[] window, ScalarType dtype) -> Tensor";
#undef LINEAR
#undef WEIGHT

// Returns a message for users; empty if it worked. What is registered stays until the process ends.
std::string register_kernels(bool python) {
  std::string message;
  torch_ = libtorch(&message);
  if (!torch_) return message;
  python_ = python;
  LibraryHandle schemas, kernels;
  bool good =
      torch_->aoti_torch_library_init_impl(kNamespace, "CPU", __FILE__, __LINE__, &kernels) == 0;
  const auto define = [&](const char* schema) {
    good = good && torch_->aoti_torch_library_def(schemas, schema) == 0;
  };
  const auto implement = [&](const char* name, Kernel kernel) {
    good = good && torch_->torch_library_impl(kernels, name, kernel, kTorchVersion) == 0;
  };
  if (!python) {
    if (torch_->parallel) codecs_use_openmp(torch_->parallel);
    good = good &&
           torch_->aoti_torch_library_init_fragment(kNamespace, __FILE__, __LINE__, &schemas) == 0;
    define(kLinear);
    define(kLinearInference);
    define(kEmbedding);
    implement("linear", linear_inference);
    implement("embedding", embedding);
  }
  implement("linear_inference", linear_inference);
  if (python) implement("keep_levels", keep_levels);
  return good ? "" : "libtorch did not take the operators of torchcodec_weights";
}

const char* register_once(bool python) {
  static const std::string message = register_kernels(python);
  return message.empty() ? nullptr : message.c_str();
}

}  // namespace
}  // namespace ectcq

#pragma GCC visibility push(default)
extern "C" {

// For programs without Python, once libtorch is loaded and before a package is: define the operators
// of encoded weights. Returns null, or what is wrong.
const char* torchcodec_weights_register() { return ectcq::register_once(false); }

// Free what was prepared of weights; it is made again where it is needed.
void torchcodec_weights_forget() { ectcq::forget(nullptr); }

// For Python, which has defined the operators: take over `linear_inference` for what is known. Returns
// null, or what is wrong.
const char* codecs_register() { return ectcq::register_once(true); }

// For Python: multiply by this weight here from now on, as long as its arrays stay as they are, the
// tiles apart. False where it is none of ours.
bool codecs_know(const uint8_t* data, size_t size, const uint8_t* scale, size_t scales,
                 const float* zero_point, size_t zero_points, const uint8_t* act_pre_scale,
                 size_t act_pre_scales, const int64_t* window) {
  const codecs::WeightArrays arrays{data,       size,        scale,         scales,
                                    zero_point, zero_points, act_pre_scale, act_pre_scales};
  std::shared_ptr<const ectcq::Prepared> made;
  return ectcq::prepare(arrays, {window[0], window[1], window[2], window[3]}, &made).empty();
}

// For tests: what a weight is prepared to, valid until the thread's next call. Returns null, or what is
// wrong with the weight.
const char* ectcq_prepare(const uint8_t* data, size_t size, const uint8_t* scale, size_t scales,
                          const float* zero_point, size_t zero_points, const uint8_t* act_pre_scale,
                          size_t act_pre_scales, const int64_t* window, int level,
                          ectcq::Linear* linear) {
  thread_local std::unique_ptr<ectcq::Prepared> made;
  thread_local std::string message;
  made = std::make_unique<ectcq::Prepared>();
  const codecs::WeightArrays arrays{data,       size,        scale,         scales,
                                    zero_point, zero_points, act_pre_scale, act_pre_scales};
  message = made->open(arrays, {window[0], window[1], window[2], window[3]}, level);
  if (!message.empty()) return message.c_str();
  *linear = made->at(data);
  return nullptr;
}

// For Python: take back `codecs_know` and `keep_levels` of the weight whose container lies there, or of
// all if it is null.
void codecs_forget(const uint8_t* data) { ectcq::forget(data); }

}  // extern "C"
#pragma GCC visibility pop
