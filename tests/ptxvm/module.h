// SPDX-License-Identifier: BSD-3-Clause
//
// The PTX of one translation unit, cut into kernels, variables and source files. Kernels stay text
// until they are launched.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace ptxvm {

struct KernelText {
  std::string parameters;  // between the parentheses
  std::string body;        // between the braces
  std::string limits;      // between both: .maxntid and the like
};

struct SharedVariable {
  std::string name;
  uint32_t align, bytes;  // 0 bytes: the dynamic one
};

struct Module {
  std::unordered_map<std::string, KernelText> kernels;
  // .global and .const variables: their memory.
  std::unordered_map<std::string, std::shared_ptr<std::vector<uint8_t>>> variables;
  std::vector<SharedVariable> shared;
  std::vector<std::string> files;  // by number
};

Module parse_module(const std::string& ptx);

// A declaration like ".shared .align 16 .b8 name[128] = {...}".
struct Variable {
  std::string name, space;
  uint32_t align = 1, element_bytes = 1, count = 1;  // count 0: "name[]"
  std::vector<uint64_t> values;

  uint32_t bytes() const { return element_bytes * count; }
};

Variable parse_variable(std::string_view declaration);

// Text without surrounding white space; cut at a separator outside of all brackets.
std::string_view trim(std::string_view text);
std::vector<std::string_view> split(std::string_view text, char separator);

// Bytes of a type by its name, "b8", "f32", "bf16x2"; 0 for "pred".
uint32_t type_bytes(std::string_view type);

}  // namespace ptxvm
