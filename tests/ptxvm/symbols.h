// SPDX-License-Identifier: BSD-3-Clause
//
// The names of a kernel under construction, and its register file: one row of 32 lanes per
// register, 4 bytes a lane (8 for 64-bit registers), constants and special registers included.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "module.h"
#include "program.h"

namespace ptxvm {

// A statement this interpreter does not know. It becomes a fault when it is executed.
class Unsupported : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Place {
  enum Kind : uint8_t { kRegister, kPredicate } kind;
  uint32_t arg;
  bool wide;
};

class Symbols {
 public:
  Symbols(const Module& module, const KernelText& text, Program& program);

  void open_scope() { scopes_.emplace_back(); }
  void close_scope() { scopes_.pop_back(); }
  void declare_registers(std::string_view declaration);  // ".reg .b32 %r<9>"
  void declare_variable(std::string_view declaration);   // ".shared ...", ".local ..."

  // A register, predicate, special register, or the address of a variable.
  Place find(std::string_view name, bool wide);
  Place constant(uint64_t value, bool wide);
  Place predicate_constant(bool value);
  Place sink(bool predicate);  // "_"
  bool is_local(std::string_view name) const { return locals_.contains(std::string(name)); }

  // Lays out shared memory, once everything is declared.
  void finish();

 private:
  uint32_t new_row(bool wide);
  uint32_t new_predicate(LaneMask initial);
  void fill_row(uint32_t row, uint64_t value, bool wide);
  void declare_parameters(std::string_view parameters);
  void place_shared(const SharedVariable& variable);

  const Module& module_;
  Program& program_;
  std::vector<std::unordered_map<std::string, Place>> scopes_;
  std::map<std::pair<uint64_t, bool>, Place> constants_;
  std::unordered_map<std::string, Place> specials_;
  std::unordered_map<std::string, uint32_t> locals_, shared_, parameters_;
  std::unordered_map<std::string, bool> dynamic_shared_;
  std::vector<Place> dynamic_addresses_;  // rows to fill when the layout is known
  uint32_t dynamic_align_ = 16;
};

// Numbers as PTX writes them: 12, -3, 0x1f, 0f3F800000, 0d3FF0000000000000, 1.5.
bool parse_number(std::string_view text, bool wide, uint64_t& value);

SpecialValue special_register(std::string_view name);  // null: there is none of this name

}  // namespace ptxvm
