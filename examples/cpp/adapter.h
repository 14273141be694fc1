// A PEFT adapter directory: its tensors, and the scale that its config gives to every site.
// Only plain LoRA is understood. What would change its meaning is refused by name.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>

#include "json.h"

using Tensors = std::map<std::string, at::Tensor>;

inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  std::ostringstream out;
  out << file.rdbuf();
  return out.str();
}

inline Tensors read_safetensors(const std::string& path) {
  static const std::map<std::string, at::ScalarType> dtypes = {
      {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf}, {"BF16", at::kBFloat16},
      {"I64", at::kLong},   {"I32", at::kInt},   {"U8", at::kByte},  {"BOOL", at::kBool}};
  const std::string bytes = read_file(path);
  uint64_t length = 0;
  if (bytes.size() < 8) throw std::runtime_error(path + " is no safetensors file");
  std::memcpy(&length, bytes.data(), 8);  // little-endian, as all machines are that torch has wheels for
  if (length > bytes.size() - 8) throw std::runtime_error(path + " is cut off, or no safetensors file");
  const size_t start = 8 + length;
  Tensors out;
  for (const auto& [name, entry] : JsonReader::read(bytes.substr(8, length)).object) {
    if (name == "__metadata__") continue;
    auto dtype = dtypes.find(entry.at("dtype").text);
    if (dtype == dtypes.end()) throw std::runtime_error(path + ": '" + name + "' has an unknown dtype");
    std::vector<int64_t> shape;
    for (const Json& n : entry.at("shape").list) shape.push_back(static_cast<int64_t>(n.as_number()));
    const auto& offsets = entry.at("data_offsets").list;
    if (offsets.size() != 2) throw std::runtime_error(path + ": '" + name + "' has no data_offsets");
    const double begin = offsets[0].as_number(), end = offsets[1].as_number();
    if (!(0 <= begin && begin <= end && end <= static_cast<double>(bytes.size() - start)))
      throw std::runtime_error(path + ": '" + name + "' lies outside the file");
    at::Tensor tensor = at::empty(shape, dtype->second);
    if (static_cast<double>(tensor.nbytes()) != end - begin)
      throw std::runtime_error(path + ": '" + name + "' has another size than its shape says");
    std::memcpy(tensor.data_ptr(), bytes.data() + start + static_cast<size_t>(begin), tensor.nbytes());
    out[name] = tensor;
  }
  return out;
}

struct Adapter {
  Tensors tensors;  // by PEFT's keys, without "base_model.model."
  double scale = 1;
};

inline Adapter read_adapter(const std::string& directory) {
  // Fields that say how the adapter was made, or where it goes; its keys tell where it goes, too.
  static const std::set<std::string> of_no_matter = {
      "auto_mapping",   "base_model_name_or_path", "peft_version",    "revision",        "task_type",
      "inference_mode", "lora_dropout",            "target_modules",  "target_parameters", "exclude_modules",
      "layers_pattern", "layers_to_transform",     "modules_to_save", "fan_in_fan_out",  "megatron_core",
      "qalora_group_size"};
  const std::string path = directory + "/adapter_config.json";
  const Json config = JsonReader::read(read_file(path));
  if (config.at("peft_type").text != "LORA") throw std::runtime_error(path + ": only LORA is understood here");
  const double r = config.at("r").as_number(), alpha = config.at("lora_alpha").as_number();
  if (r < 1) throw std::runtime_error(path + ": r must be at least 1");
  bool rslora = false;
  for (const auto& [name, value] : config.object) {
    if (name == "peft_type" || name == "r" || name == "lora_alpha" || of_no_matter.count(name)) continue;
    if (name == "use_rslora") {
      rslora = value.truth;
    } else if (name == "bias" && value.text == "none") {
    } else if (name == "init_lora_weights" && (value.kind == Json::Bool || value.text == "gaussian")) {
      // first values that leave the base as it was
    } else if (!value.unused()) {
      throw std::runtime_error(path + ": the option '" + name + "' is not understood here");
    }
  }
  Adapter out;
  out.scale = alpha / (rslora ? std::sqrt(r) : r);
  const std::string prefix = "base_model.model.";
  for (const auto& [name, tensor] : read_safetensors(directory + "/adapter_model.safetensors")) {
    if (name.compare(0, prefix.size(), prefix) != 0)
      throw std::runtime_error(directory + ": the key '" + name + "' does not begin with " + prefix);
    if (tensor.is_floating_point() && !at::isfinite(tensor).all().item<bool>())
      throw std::runtime_error(directory + ": '" + name + "' has values that are not finite");
    out.tensors[name.substr(prefix.size())] = tensor;
  }
  return out;
}
