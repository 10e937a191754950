// SPDX-License-Identifier: BSD-3-Clause
#include "decoder.h"

#include <algorithm>

namespace ptxvm {
namespace {

// "ld.global.L1::no_allocate.v4.f32" at its dots.
std::vector<std::string_view> opcode_words(std::string_view opcode) {
  std::vector<std::string_view> words;
  size_t begin = 0;
  for (size_t i = 0; i <= opcode.size(); ++i) {
    if (i < opcode.size() && opcode[i] != '.') continue;
    words.push_back(opcode.substr(begin, i - begin));
    begin = i + 1;
  }
  return words;
}

}  // namespace

Type parse_type(std::string_view word) {
  static const std::unordered_map<std::string_view, Type> types = {
      {"u8", {Kind::kUnsigned, 8}},    {"u16", {Kind::kUnsigned, 16}},
      {"u32", {Kind::kUnsigned, 32}},  {"u64", {Kind::kUnsigned, 64}},
      {"s8", {Kind::kSigned, 8}},      {"s16", {Kind::kSigned, 16}},
      {"s32", {Kind::kSigned, 32}},    {"s64", {Kind::kSigned, 64}},
      {"b8", {Kind::kBits, 8}},        {"b16", {Kind::kBits, 16}},
      {"b32", {Kind::kBits, 32}},      {"b64", {Kind::kBits, 64}},
      {"f32", {Kind::kFloat, 32}},     {"f64", {Kind::kFloat, 64}},
      {"f16", {Kind::kHalf, 16}},      {"f16x2", {Kind::kHalf, 16, true}},
      {"bf16", {Kind::kBFloat16, 16}}, {"bf16x2", {Kind::kBFloat16, 16, true}},
      {"pred", {Kind::kPredicate, 1}},
  };
  const auto entry = types.find(word);
  return entry == types.end() ? Type{} : entry->second;
}

Decoder::Decoder(Symbols& symbols, std::string_view statement, Instruction& instruction)
    : instruction(instruction), symbols_(symbols), statement_(statement) {
  const size_t end = std::min(statement.find_first_of(" \t\n{["), statement.size());
  words_ = opcode_words(statement.substr(0, end));
  operands_ = split(statement.substr(end), ',');
}

bool Decoder::has(std::string_view word) const {
  return std::find(words_.begin(), words_.end(), word) != words_.end();
}

Type Decoder::type(size_t from_end) const {
  return from_end < words_.size() ? parse_type(words_[words_.size() - 1 - from_end]) : Type{};
}

void Decoder::split_destination() {
  if (operands_.empty()) unsupported();
  const std::string_view both = operands_[0];
  const size_t bar = both.find('|');
  if (bar == both.npos) return;
  operands_[0] = trim(both.substr(0, bar));
  operands_.insert(operands_.begin() + 1, trim(both.substr(bar + 1)));
}

std::string_view Decoder::operand_text(size_t i) const {
  if (i >= operands_.size()) unsupported("operands are missing");
  return operands_[i];
}

std::vector<std::string_view> Decoder::elements(size_t i) const {
  const std::string_view text = operand_text(i);
  if (!is_vector(i)) return {text};
  return split(text.substr(1, text.size() - 2), ',');
}

bool Decoder::is_vector(size_t i) const { return operand_text(i).starts_with('{'); }

std::vector<uint32_t> Decoder::sources(size_t i, bool wide) {
  std::vector<uint32_t> rows;
  for (std::string_view text : elements(i)) {
    uint64_t value;
    const Place place = parse_number(text, wide, value) ? symbols_.constant(value, wide)
                                                        : symbols_.find(text, wide);
    require_register(place, wide);
    uses_.push_back({text, place.arg, false});
    rows.push_back(place.arg);
  }
  return rows;
}

void Decoder::require_register(const Place& place, bool wide) const {
  if (place.kind != Place::kRegister) unsupported("a predicate where a register belongs");
  if (place.wide != wide) unsupported("a register of another width");
}

std::vector<uint32_t> Decoder::destinations(size_t i, bool wide) {
  std::vector<uint32_t> rows;
  for (std::string_view text : elements(i)) {
    const Place place = text == "_" ? symbols_.sink(false) : symbols_.find(text, false);
    if (text != "_") require_register(place, wide);
    uses_.push_back({text, place.arg, true});
    rows.push_back(place.arg);
  }
  return rows;
}

uint32_t Decoder::source(size_t i, bool wide) { return sources(i, wide).at(0); }

uint32_t Decoder::destination(size_t i, bool wide) { return destinations(i, wide).at(0); }

uint32_t Decoder::predicate(size_t i) {
  std::string_view text = operand_text(i);
  const bool negated = text.starts_with('!');
  if (negated) text = trim(text.substr(1));
  uint64_t value;
  const Place place = text == "_"                        ? symbols_.sink(true)
                      : parse_number(text, false, value) ? symbols_.predicate_constant(value != 0)
                                                         : symbols_.find(text, false);
  if (place.kind != Place::kPredicate) unsupported("a register where a predicate belongs");
  return place.arg ^ (negated ? 1 : 0);
}

bool Decoder::is_wide(size_t i, bool number_is_wide) {
  const std::string_view text = elements(i).at(0);
  uint64_t value;
  if (text == "_" || parse_number(text, false, value)) return number_is_wide;
  return symbols_.find(text, number_is_wide).wide;
}

bool Decoder::is_predicate(size_t i) {
  return !is_number(i) && symbols_.find(operand_text(i), false).kind == Place::kPredicate;
}

bool Decoder::is_number(size_t i) const {
  uint64_t value;
  return parse_number(operand_text(i), true, value);
}

int64_t Decoder::number(size_t i) const {
  uint64_t value;
  if (!parse_number(operand_text(i), true, value)) unsupported("expected a number");
  return static_cast<int64_t>(value);
}

void Decoder::address(size_t i, size_t slot) {
  std::string_view text = operand_text(i);
  if (!text.starts_with('[')) unsupported("expected an address");
  text = trim(text.substr(1, text.size() - 2));
  instruction.displacement = 0;
  if (const size_t sign = text.find_first_of("+-", 1); sign != text.npos) {
    uint64_t value = 0;
    std::string_view offset = trim(text.substr(sign + 1));
    if (!parse_number(offset, true, value)) unsupported("displacement of an address");
    instruction.displacement = static_cast<int64_t>(text[sign] == '-' ? -value : value);
    text = trim(text.substr(0, sign));
  }
  uint64_t value;
  const Place place =
      parse_number(text, true, value) ? symbols_.constant(value, true) : symbols_.find(text, true);
  if (symbols_.is_local(text) && instruction.space == Space::kParam)
    instruction.space = Space::kLocal;  // the argument of a call
  uses_.push_back({text, place.arg, false});
  instruction.arg[slot] = place.arg;
  instruction.wide_address = place.wide;
}

void Decoder::unsupported(const std::string& why) const {
  throw Unsupported("unsupported instruction: " + std::string(statement_) +
                    (why.empty() ? "" : " (" + why + ")"));
}

}  // namespace ptxvm
