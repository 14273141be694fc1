// A package of adaptc.package: what its metadata says of inputs and slots, and one adapter's values in its constants.
// The compiled code checks no shapes and would read past the end of a tensor, so all is checked here.
#pragma once

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <unordered_map>

#include "adapter.h"

using Fields = std::vector<std::string>;

inline Fields split(const std::string& text, char by) {
  Fields out(1);
  for (char c : text)
    if (c == by) out.emplace_back();
    else out.back() += c;
  return out;
}

inline std::vector<int64_t> numbers(const std::string& text) {
  std::vector<int64_t> out;
  if (text != "-")
    for (const std::string& n : split(text, ',')) out.push_back(std::stoll(n));
  return out;
}

inline at::ScalarType dtype_of(const std::string& name) {
  static const std::map<std::string, at::ScalarType> known = {
      {"float64", at::kDouble}, {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16},
      {"int64", at::kLong},     {"int32", at::kInt},     {"uint8", at::kByte},   {"bool", at::kBool}};
  auto found = known.find(name);
  if (found == known.end()) throw std::runtime_error("the dtype " + name + " is not understood here");
  return found->second;
}

struct Input {
  std::string name;
  at::ScalarType dtype;
  Fields sizes;                // numbers, and names of sizes that may differ
  std::vector<int64_t> order;  // axes from the outermost in memory
};

struct Slot {
  std::string key, constant;
  at::ScalarType dtype;
  std::vector<int64_t> shape, padded;
  int64_t blocks = 1;
  double fill = 0;
  std::optional<double> identity;

  // The tensor of a file, padded to the shape of the constant.
  at::Tensor fitted(at::Tensor value) const {
    value = value.to(dtype);
    if (value.dim() != static_cast<int64_t>(shape.size())) refuse(value);
    for (int64_t axis = 0; axis < value.dim(); ++axis) {
      const int64_t have = value.size(axis), want = shape[axis];
      if (have == want) continue;
      const bool may = std::count(padded.begin(), padded.end(), axis) > 0;
      if (!may || have > want || have % blocks || want % blocks) refuse(value);
      at::Tensor apart = value.unflatten(axis, {blocks, have / blocks});
      std::vector<int64_t> room = apart.sizes().vec();
      room[axis + 1] = (want - have) / blocks;
      value = at::cat({apart, at::full(room, fill, apart.options())}, axis + 1).flatten(axis, axis + 1);
    }
    return value.contiguous();
  }

  [[noreturn]] void refuse(const at::Tensor& value) const {
    std::ostringstream said;
    said << "'" << key << "' has shape " << value.sizes() << ", and the package has room for " << at::IntArrayRef(shape);
    throw std::runtime_error(said.str());
  }
};

struct Site {
  std::string fqn, method, scale;
  at::ScalarType scale_dtype = at::kFloat;
  std::vector<Slot> slots;
};

class Package {
 public:
  explicit Package(const std::string& path) : loader_(path) {
    const auto metadata = loader_.get_metadata();
    auto table = metadata.find("adaptc_slots");
    if (table == metadata.end()) throw std::runtime_error(path + " has no table of slots; adaptc.package writes one");
    auto device = metadata.find("AOTI_DEVICE_KEY");
    device_ = at::Device(device == metadata.end() ? "cpu" : device->second);
    std::istringstream lines(table->second);
    std::string line;
    std::getline(lines, line);
    if (line != "adaptc_slots\t1") throw std::runtime_error(path + ": a table of another version: " + line);
    while (std::getline(lines, line)) read(split(line, '\t'), line);
  }

  // Every value is made and checked before the code sees one: what is refused changes nothing.
  void set(const Adapter& adapter) {
    std::unordered_map<std::string, at::Tensor> values;
    std::set<std::string> used;
    for (const Site& site : sites_) {
      size_t found = 0;
      for (const Slot& slot : site.slots) found += adapter.tensors.count(slot.key);
      if (found && found != site.slots.size()) throw std::runtime_error("the adapter has a part of " + site.fqn);
      if (found && site.method != "lora" && site.method != "whole")
        throw std::runtime_error(site.fqn + ": the method " + site.method + " is not understood here");
      for (const Slot& slot : site.slots) {
        if (found) {
          values[slot.constant] = slot.fitted(adapter.tensors.at(slot.key));
          used.insert(slot.key);
        } else if (slot.identity) {
          values[slot.constant] = at::full(slot.shape, *slot.identity, slot.dtype);
        } else {
          throw std::runtime_error("the adapter has no '" + slot.key + "', and the base's own value is not known here");
        }
      }
      if (site.scale != "-") values[site.scale] = at::full({}, found ? adapter.scale : 0.0, site.scale_dtype);
    }
    for (const auto& [key, tensor] : adapter.tensors)
      if (!used.count(key)) throw std::runtime_error("the package has no slot '" + key + "'");
    if (buffers_.empty()) {
      // The code keeps these tensors and reads them in each call. Later adapters are copied into them: what
      // load_constants(user_managed=true) replaces is never freed.
      for (auto& [name, value] : values) value = value.to(device_).clone();
      loader_.load_constants(values, false, false, /*user_managed=*/true);
      buffers_ = values;
    } else {
      for (const auto& [name, value] : values) buffers_.at(name).copy_(value);
    }
  }

  std::vector<at::Tensor> run(const Tensors& given) {
    std::vector<at::Tensor> inputs;
    std::map<std::string, int64_t> sizes;
    for (const Input& want : inputs_) {
      auto found = given.find(want.name);
      if (found == given.end()) throw std::runtime_error("the input '" + want.name + "' is missing");
      at::Tensor value = found->second.to(device_);
      bool fits = value.scalar_type() == want.dtype && value.dim() == static_cast<int64_t>(want.sizes.size());
      for (size_t axis = 0; fits && axis < want.sizes.size(); ++axis) {
        const std::string& size = want.sizes[axis];
        const int64_t have = value.size(static_cast<int64_t>(axis));
        const bool fixed = size.find_first_not_of("0123456789") == std::string::npos;
        fits = (fixed ? std::stoll(size) : sizes.emplace(size, have).first->second) == have;
      }
      if (!fits) throw std::runtime_error("the input '" + want.name + "' has another dtype or shape than the package takes");
      std::vector<int64_t> back(want.order.size());
      for (size_t i = 0; i < back.size(); ++i) back[want.order[i]] = static_cast<int64_t>(i);
      inputs.push_back(value.permute(want.order).contiguous().permute(back));
    }
    return loader_.run(inputs);
  }

 private:
  void read(const Fields& f, const std::string& line) {
    if (f[0] == "input" && f.size() == 5) {
      inputs_.push_back({f[1], dtype_of(f[2]), f[3] == "-" ? Fields() : split(f[3], ','), numbers(f[4])});
    } else if (f[0] == "site" && f.size() == 5) {
      sites_.push_back({f[1], f[2], f[3], f[4] == "-" ? at::kFloat : dtype_of(f[4]), {}});
    } else if (f[0] == "slot" && f.size() == 9 && !sites_.empty()) {
      Slot slot{f[1], f[2], dtype_of(f[3]), numbers(f[4]), numbers(f[5])};
      if (f[6] != "-") slot.blocks = std::stoll(f[6]);
      if (f[7] != "-") slot.fill = std::stod(f[7]);
      if (f[8] != "-") slot.identity = std::stod(f[8]);
      sites_.back().slots.push_back(slot);
    } else if (f[0] == "closed" && f.size() == 3) {
      throw std::runtime_error(f[1] + " cannot be filled here, since " + f[2] + ": use adaptc.load_package");
    } else if (f[0] != "constant") {
      throw std::runtime_error("the table of slots has a line that is not understood: " + line);
    }
  }

  torch::inductor::AOTIModelPackageLoader loader_;
  at::Device device_{at::kCPU};
  std::vector<Input> inputs_;
  std::vector<Site> sites_;
  std::unordered_map<std::string, at::Tensor> buffers_;
};
