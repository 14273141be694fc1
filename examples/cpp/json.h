// A reader for the JSON in adapter_config.json and in the headers of safetensors files, since torch ships none.
// It takes JSON as it is defined, and throws std::runtime_error for anything else.
#pragma once

#include <cctype>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

struct Json {
  enum Kind { Null, Bool, Number, Text, List, Object } kind = Null;
  bool truth = false;
  double number = 0;
  std::string text;
  std::vector<Json> list;
  std::map<std::string, Json> object;

  // null, false, 0, "", [] and {}: what a config has for options that are not used
  bool unused() const {
    return kind == Null || (kind == Bool && !truth) || (kind == Number && number == 0) ||
           (kind == Text && text.empty()) || (kind == List && list.empty()) || (kind == Object && object.empty());
  }
  const Json& at(const std::string& key) const {
    auto found = object.find(key);
    if (kind != Object || found == object.end()) throw std::runtime_error("JSON: there is no field '" + key + "'");
    return found->second;
  }
  double as_number() const {
    if (kind != Number) throw std::runtime_error("JSON: expected a number");
    return number;
  }
};

class JsonReader {
 public:
  static Json read(const std::string& text) {
    JsonReader reader(text);
    Json value = reader.value(0);
    reader.space();
    if (reader.at_ != text.size()) reader.fail("more after the end");
    return value;
  }

 private:
  explicit JsonReader(const std::string& text) : text_(text) {}

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error("JSON, byte " + std::to_string(at_) + ": " + what);
  }
  void space() {
    while (at_ < text_.size() && std::string(" \t\r\n").find(text_[at_]) != std::string::npos) ++at_;
  }
  bool take(const std::string& word) {
    if (text_.compare(at_, word.size(), word) != 0) return false;
    at_ += word.size();
    return true;
  }
  void need(const std::string& word) {
    space();
    if (!take(word)) fail("expected '" + word + "'");
  }

  Json value(int depth) {
    if (depth > 64) fail("too deep");
    space();
    Json out;
    if (take("null")) return out;
    if (take("true") || take("false")) {
      out.kind = Json::Bool;
      out.truth = text_[at_ - 2] == 'u';
    } else if (at_ < text_.size() && text_[at_] == '"') {
      out.kind = Json::Text;
      out.text = string();
    } else if (take("[")) {
      out.kind = Json::List;
      space();
      if (take("]")) return out;
      do out.list.push_back(value(depth + 1));
      while (space(), take(","));
      need("]");
    } else if (take("{")) {
      out.kind = Json::Object;
      space();
      if (take("}")) return out;
      do {
        space();
        std::string key = string();
        need(":");
        if (!out.object.emplace(key, value(depth + 1)).second) fail("the field '" + key + "' twice");
      } while (space(), take(","));
      need("}");
    } else {
      const char* begin = text_.c_str() + at_;
      char* end = nullptr;
      if (*begin != '-' && !std::isdigit(static_cast<unsigned char>(*begin))) fail("expected a value");
      out.kind = Json::Number;
      out.number = std::strtod(begin, &end);
      at_ += end - begin;
    }
    return out;
  }

  std::string string() {
    if (!take("\"")) fail("expected a string");
    std::string out;
    while (true) {
      if (at_ >= text_.size()) fail("a string without end");
      char c = text_[at_++];
      if (c == '"') return out;
      if (c != '\\') {
        out += c;
        continue;
      }
      char e = at_ < text_.size() ? text_[at_++] : '\0';
      const std::string from = "\"\\/bfnrt", to = "\"\\/\b\f\n\r\t";
      size_t place = from.find(e);
      if (e == 'u') {
        // Names of modules have none of these; what the others hold is not looked at.
        if (at_ + 4 > text_.size()) fail("a string without end");
        at_ += 4;
        out += '?';
      } else if (place == std::string::npos || e == '\0') {
        fail("an unknown escape");
      } else {
        out += to[place];
      }
    }
  }

  const std::string& text_;
  size_t at_ = 0;
};
