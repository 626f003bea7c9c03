// Generates text, greedily, by a model with encoded weights in an AOTInductor package. There is no
// Python in this program: the operators of encoded weights are in libcodecs.so.
//
//     generate model.pt2 prompt.txt tokens libcodecs.so [threads]
//
// prompt.txt has the ids of the prompt's tokens, separated by spaces. Prints those of the answer, and
// to the error output the tokens per second.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <chrono>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// Operators of encoded weights: before a package is loaded, which looks for them.
void register_operators(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  using Register = const char* (*)();
  const auto registered = reinterpret_cast<Register>(dlsym(library, "torchcodec_weights_register"));
  if (!registered) throw std::runtime_error(dlerror());
  if (const char* message = registered()) throw std::runtime_error(message);
}

std::vector<int64_t> read_ids(const char* path) {
  std::ifstream file(path);
  std::vector<int64_t> ids;
  for (int64_t id; file >> id;) ids.push_back(id);
  if (ids.empty()) throw std::runtime_error(std::string(path) + ": no ids of tokens");
  return ids;
}

void generate(int argc, char** argv) {
  if (argc < 5) {
    throw std::runtime_error("usage: generate model.pt2 prompt.txt tokens libcodecs.so [threads]");
  }
  const c10::InferenceMode mode;
  if (argc > 5) at::set_num_threads(std::atoi(argv[5]));
  register_operators(argv[4]);
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  std::vector<int64_t> ids = read_ids(argv[2]);
  const size_t prompt = ids.size(), tokens = std::strtoul(argv[3], nullptr, 10);

  using Clock = std::chrono::steady_clock;
  auto started = Clock::now();
  for (size_t position = 0; position + 1 < prompt + tokens; ++position) {
    if (position + 1 == prompt) started = Clock::now();
    const std::vector<at::Tensor> inputs{at::full({1, 1}, ids[position], at::kLong),
                                         at::full({1}, static_cast<int64_t>(position), at::kLong)};
    const at::Tensor logits = model.run(inputs).at(0);
    if (position + 1 < prompt) continue;
    ids.push_back(logits.argmax().item<int64_t>());
    std::cout << ids.back() << ' ' << std::flush;
  }
  std::cout << '\n';
  const std::chrono::duration<double> seconds = Clock::now() - started;
  std::cerr << static_cast<double>(tokens) / seconds.count() << " tokens/s\n";
}

}  // namespace

int main(int argc, char** argv) {
  try {
    generate(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
