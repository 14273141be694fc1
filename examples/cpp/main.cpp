// Run a package of adaptc.package with adapters that PEFT wrote, without Python:
//
//     run_package PACKAGE.pt2 INPUTS.safetensors [ADAPTER_DIRECTORY ...]
//
// Runs the adapter that the package was made with, then each of the others, and prints every output: a line with the
// adapter, the number of the output and its shape, and a line with its values. Inputs are named as in the program.
#include <iostream>

#include <c10/core/InferenceMode.h>

#include "package.h"

static void print(const std::string& adapter, const std::vector<at::Tensor>& outputs) {
  std::cout.precision(9);
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!outputs[i].defined()) continue;  // None in the program
    std::cout << adapter << " " << i;
    for (int64_t n : outputs[i].sizes()) std::cout << " " << n;
    std::cout << "\n";
    const at::Tensor flat = outputs[i].to(at::kCPU, at::kDouble).contiguous().flatten();
    for (int64_t n = 0; n < flat.numel(); ++n) std::cout << (n ? " " : "") << flat.data_ptr<double>()[n];
    std::cout << "\n";
  }
}

int main(int count, char** words) {
  if (count < 3) {
    std::cerr << "usage: run_package PACKAGE.pt2 INPUTS.safetensors [ADAPTER_DIRECTORY ...]\n";
    return 2;
  }
  try {
    c10::InferenceMode guard;  // what the code gives are plain tensors, which autograd refuses
    Package package(words[1]);
    const Tensors inputs = read_safetensors(words[2]);
    print("packaged", package.run(inputs));
    for (int i = 3; i < count; ++i) {
      package.set(read_adapter(words[i]));
      print(words[i], package.run(inputs));
    }
  } catch (const std::exception& error) {
    const std::string said = error.what();  // torch's own go on with a stack
    std::cerr << "error: " << said.substr(0, said.find('\n')) << "\n";
    return 1;
  }
}
