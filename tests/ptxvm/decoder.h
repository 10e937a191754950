// SPDX-License-Identifier: BSD-3-Clause
//
// What an instruction family sees of a statement while it fills in an Instruction.
#pragma once

#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "program.h"
#include "symbols.h"

namespace ptxvm {

enum class Kind : uint8_t {
  kUnsigned,
  kSigned,
  kBits,
  kFloat,
  kHalf,
  kBFloat16,
  kPredicate,
  kNone
};

struct Type {
  Kind kind = Kind::kNone;
  int bits = 0;         // of one element
  bool packed = false;  // two elements in 32 bits

  bool integer() const { return kind <= Kind::kBits; }
  bool is_signed() const { return kind == Kind::kSigned; }
  bool wide() const { return bits == 64; }
  bool operator==(const Type&) const = default;
};

Type parse_type(std::string_view word);

// A register as an instruction's operand.
struct RegisterUse {
  std::string_view name;
  uint32_t row;
  bool written;
};

class Decoder {
 public:
  // statement: "add.s32 %r1, %r2, 3", without guard and semicolon.
  Decoder(Symbols& symbols, std::string_view statement, Instruction& instruction);

  Instruction& instruction;

  // "add", "s32"
  const std::vector<std::string_view>& words() const { return words_; }
  std::string_view word(size_t i) const { return i < words_.size() ? words_[i] : ""; }
  bool has(std::string_view word) const;
  // The type named last, or by the i-th word from the end.
  Type type(size_t from_end = 0) const;

  size_t operand_count() const { return operands_.size(); }
  std::string_view operand_text(size_t i) const;
  std::string_view statement() const { return statement_; }
  // Cuts "%r1|%p1" in two operands.
  void split_destination();

  // Places in the register file, of registers of 64 bits if `wide`, else of at most 32; of others
  // the instruction is unsupported. A number becomes a constant.
  uint32_t source(size_t i, bool wide = false);
  uint32_t destination(size_t i, bool wide = false);
  uint32_t predicate(size_t i);
  uint32_t constant(uint32_t value) { return symbols_.constant(value, false).arg; }
  uint32_t sink_predicate() { return symbols_.sink(true).arg; }
  // The same for each element of "{a, b}"; an operand without braces is its only element.
  std::vector<uint32_t> sources(size_t i, bool wide = false);
  std::vector<uint32_t> destinations(size_t i, bool wide = false);
  // A 64-bit register, or a number where the type is wide. cvt, ld and st take registers that are
  // wider than their type.
  bool is_wide(size_t i, bool number_is_wide = false);
  bool is_predicate(size_t i);
  bool is_vector(size_t i) const;
  bool is_number(size_t i) const;
  int64_t number(size_t i) const;
  const std::vector<RegisterUse>& uses() const { return uses_; }
  // Sets arg[slot] and the displacement from "[%rd1+8]".
  void address(size_t i, size_t slot);

  [[noreturn]] void unsupported(const std::string& why = "") const;

 private:
  std::vector<std::string_view> elements(size_t i) const;
  void require_register(const Place& place, bool wide) const;

  Symbols& symbols_;
  std::string_view statement_;
  std::vector<std::string_view> words_, operands_;
  std::vector<RegisterUse> uses_;  // of the families that were asked
};

// Fills in the instruction, or returns false: not of this family.
using Decode = bool (*)(Decoder&);
// Several families may share an opcode ("add"); they are asked in order.
using Opcodes = std::unordered_map<std::string_view, std::vector<Decode>>;

// One function per family, in instructions/. A new instruction set is one more.
void add_arithmetic(Opcodes&);
void add_bits(Opcodes&);
void add_floating(Opcodes&);
void add_halves(Opcodes&);
void add_conversions(Opcodes&);
void add_comparisons(Opcodes&);
void add_moves(Opcodes&);
void add_control(Opcodes&);
void add_memory(Opcodes&);
void add_atomics(Opcodes&);
void add_async_copies(Opcodes&);
void add_matrix(Opcodes&);
void add_collectives(Opcodes&);
void add_barriers(Opcodes&);
void add_mbarriers(Opcodes&);
void add_warpgroup(Opcodes&);

}  // namespace ptxvm
