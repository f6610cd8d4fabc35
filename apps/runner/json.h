// A JSON writer just large enough for the runner's one line.
#pragma once
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

namespace runner {

inline std::string quote(const std::string& text) {
  std::string out = "\"";
  for (unsigned char c : text) {
    char buffer[8];
    if (c == '"' || c == '\\') {
      out += '\\', out += (char)c;
    } else if (c < 0x20) {
      snprintf(buffer, sizeof buffer, "\\u%04x", c);
      out += buffer;
    } else {
      out += (char)c;
    }
  }
  return out + '"';
}

inline std::string number(double value) {
  if (!std::isfinite(value)) return "null";
  char buffer[32];
  snprintf(buffer, sizeof buffer, "%.6g", value);
  return buffer;
}

inline std::string array(const std::vector<std::string>& items) {
  std::string out = "[";
  for (size_t i = 0; i < items.size(); ++i) out += (i ? "," : "") + items[i];
  return out + "]";
}

inline std::string numbers(const std::vector<double>& values) {
  std::vector<std::string> items;
  for (double value : values) items.push_back(number(value));
  return array(items);
}

class Object {
 public:
  Object& add(const std::string& key, const std::string& json) {
    body_ += (body_.empty() ? "" : ",") + quote(key) + ":" + json;
    return *this;
  }
  std::string str() const { return "{" + body_ + "}"; }

 private:
  std::string body_;
};

}  // namespace runner
