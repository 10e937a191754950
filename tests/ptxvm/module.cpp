// SPDX-License-Identifier: BSD-3-Clause
#include "module.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cstring>
#include <stdexcept>

namespace ptxvm {
namespace {

bool starts(std::string_view text, std::string_view head) {
  return text.substr(0, head.size()) == head;
}

bool is_space(char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; }

// Comments become spaces; line ends stay, as .loc and .file end with the line.
std::string without_comments(std::string_view text) {
  std::string result(text);
  bool quoted = false;
  for (size_t i = 0; i + 1 < result.size(); ++i) {
    if (result[i] == '"') quoted = !quoted;
    if (quoted || result[i] != '/') continue;
    if (result[i + 1] == '/') {
      while (i < result.size() && result[i] != '\n') result[i++] = ' ';
    } else if (result[i + 1] == '*') {
      const size_t end = std::min(result.find("*/", i), result.size() - 2) + 2;
      for (; i < end; ++i)
        if (result[i] != '\n') result[i] = ' ';
    }
  }
  return result;
}

// The position after the bracket that closes the one at `begin`.
size_t closing(std::string_view text, size_t begin, char open, char close) {
  int depth = 0;
  for (size_t i = begin; i < text.size(); ++i) {
    if (text[i] == open) ++depth;
    if (text[i] == close && --depth == 0) return i + 1;
  }
  throw std::runtime_error("ptxvm: PTX ends within brackets");
}

uint64_t to_number(std::string_view text) {
  uint64_t value = 0;
  int base = 10;
  if (text.size() > 2 && text[0] == '0' && std::strchr("xXfFdD", text[1]) != nullptr) {
    base = 16;  // also the bits of a float, 0f3F800000
    text.remove_prefix(2);
  }
  const bool negative = starts(text, "-");
  if (negative) text.remove_prefix(1);
  std::from_chars(text.data(), text.data() + text.size(), value, base);
  return negative ? -value : value;
}

void add_file(Module& module, std::string_view line) {  // .file 1 "name"
  const size_t quote = line.find('"');
  const size_t number = to_number(trim(line.substr(5, quote - 5)));
  if (module.files.size() <= number) module.files.resize(number + 1);
  module.files[number] = line.substr(quote + 1, line.find('"', quote + 1) - quote - 1);
}

void add_kernel(Module& module, std::string_view head, std::string_view body) {
  const size_t entry = head.find(".entry") + 6, open = head.find('(', entry);
  std::string_view name = trim(head.substr(entry, open == head.npos ? open : open - entry));
  size_t length = 0;
  while (length < name.size() && !is_space(name[length])) ++length;
  KernelText& kernel = module.kernels[std::string(name.substr(0, length))];
  if (open != head.npos) {
    const size_t close = closing(head, open, '(', ')');
    kernel.parameters = head.substr(open + 1, close - open - 2);
    kernel.limits = head.substr(close);
  }
  kernel.body = body;
}

void add_variable(Module& module, std::string_view declaration) {
  const Variable variable = parse_variable(declaration);
  if (variable.space == "shared") {
    module.shared.push_back({variable.name, variable.align, variable.bytes()});
  } else if (variable.space == "global" || variable.space == "const") {
    auto memory =
        std::make_shared<std::vector<uint8_t>>(std::max(variable.bytes(), 1u), uint8_t{0});
    for (size_t i = 0; i < variable.values.size() && i < variable.count; ++i)
      std::memcpy(memory->data() + i * variable.element_bytes, &variable.values[i],
                  variable.element_bytes);
    module.variables[variable.name] = memory;
  }
}

}  // namespace

std::string_view trim(std::string_view text) {
  while (!text.empty() && is_space(text.front())) text.remove_prefix(1);
  while (!text.empty() && is_space(text.back())) text.remove_suffix(1);
  return text;
}

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  int depth = 0;
  size_t begin = 0;
  for (size_t i = 0; i <= text.size(); ++i) {
    const char c = i < text.size() ? text[i] : separator;
    if (c == '[' || c == '{' || c == '(') ++depth;
    if (c == ']' || c == '}' || c == ')') --depth;
    if (c != separator || (depth > 0 && i < text.size())) continue;
    const std::string_view part = trim(text.substr(begin, i - begin));
    if (!part.empty()) parts.push_back(part);
    begin = i + 1;
  }
  return parts;
}

uint32_t type_bytes(std::string_view type) {
  if (type == "pred") return 0;
  const size_t digits = type.find_first_of("0123456789", starts(type, "bf16") ? 2 : 0);
  if (digits == type.npos) return 8;
  const uint32_t bits = static_cast<uint32_t>(
      to_number(type.substr(digits, type.find_first_not_of("0123456789", digits) - digits)));
  return bits / 8 * (type.find("x2") != type.npos ? 2 : 1);
}

Variable parse_variable(std::string_view declaration) {
  Variable variable;
  if (const size_t equals = declaration.find('='); equals != declaration.npos) {
    std::string_view values = trim(declaration.substr(equals + 1));
    if (starts(values, "{")) values = values.substr(1, values.size() - 2);
    for (std::string_view value : split(values, ',')) variable.values.push_back(to_number(value));
    declaration = declaration.substr(0, equals);
  }
  const std::vector<std::string_view> words = [&] {
    std::vector<std::string_view> result;
    std::string_view rest = trim(declaration);
    while (!rest.empty()) {
      size_t end = 0;
      while (end < rest.size() && !is_space(rest[end])) ++end;
      result.push_back(rest.substr(0, end));
      rest = trim(rest.substr(end));
    }
    return result;
  }();
  for (size_t i = 0; i + 1 < words.size(); ++i) {
    const std::string_view word = words[i];
    if (word == ".align") {
      variable.align = static_cast<uint32_t>(to_number(words[++i]));
    } else if (word == ".shared" || word == ".local" || word == ".global" || word == ".const" ||
               word == ".param") {
      variable.space = word.substr(1);
    } else if (word.size() > 2 && std::strchr("busf", word[1]) != nullptr &&
               (std::isdigit(static_cast<unsigned char>(word[2])) || starts(word, ".bf16"))) {
      variable.element_bytes = type_bytes(word.substr(1));
    }
  }
  std::string_view name = words.back();
  if (const size_t bracket = name.find('['); bracket != name.npos) {
    variable.count =
        static_cast<uint32_t>(to_number(name.substr(bracket + 1, name.find(']') - bracket - 1)));
    name = name.substr(0, bracket);
  }
  variable.name = name;
  variable.align = std::max(variable.align, variable.element_bytes);
  return variable;
}

Module parse_module(const std::string& ptx) {
  Module module;
  const std::string clean = without_comments(ptx);
  std::string_view rest = trim(clean);
  while (!rest.empty()) {
    size_t end;
    if (starts(rest, ".version") || starts(rest, ".target") || starts(rest, ".address_size") ||
        starts(rest, ".file")) {
      end = std::min(rest.find('\n'), rest.size());
      if (starts(rest, ".file")) add_file(module, rest.substr(0, end));
    } else if (starts(rest, ".section")) {
      end = closing(rest, rest.find('{'), '{', '}');
    } else {
      const size_t stop = std::min(rest.find_first_of(";{"), rest.size());
      const std::string_view head = rest.substr(0, stop);
      if (stop < rest.size() && rest[stop] == '{' && head.find('=') == head.npos) {
        end = closing(rest, stop, '{', '}');
        if (head.find(".entry") != head.npos)
          add_kernel(module, head, rest.substr(stop + 1, end - stop - 2));
      } else {
        end = std::min(rest.find(';'), rest.size());
        const std::string_view statement = trim(rest.substr(0, end));
        if (!statement.empty() && statement.find(".func") == statement.npos &&
            !starts(statement, ".pragma"))
          add_variable(module, statement);
        end = std::min(end + 1, rest.size());
      }
    }
    rest = trim(rest.substr(end));
  }
  return module;
}

}  // namespace ptxvm
