// SPDX-License-Identifier: BSD-3-Clause
#include "symbols.h"

#include <algorithm>
#include <bit>
#include <cctype>
#include <charconv>
#include <cstdlib>
#include <cstring>

namespace ptxvm {
namespace {

constexpr uint8_t kPoison = 0xff;  // NaN in every floating format, -1 as an integer
constexpr LaneMask kPoisonPredicate = 0x5a5a5a5a;

// Registers get their place where they are first named, so that neighbours in the code are
// neighbours in memory; until then:
constexpr uint32_t kUnplaced = ~0u;

uint32_t align_up(uint32_t value, uint32_t align) { return (value + align - 1) / align * align; }

}  // namespace

bool parse_number(std::string_view text, bool wide, uint64_t& value) {
  const bool negative = text.starts_with('-');
  std::string_view digits = text.substr(negative ? 1 : 0);
  if (digits.empty() || std::isdigit(static_cast<unsigned char>(digits[0])) == 0) return false;
  const char mark = digits.size() > 1 && digits[0] == '0' ? digits[1] : '0';
  if (digits.find('.') != digits.npos) {
    const double real = std::strtod(std::string(text).c_str(), nullptr);
    value =
        wide ? std::bit_cast<uint64_t>(real) : std::bit_cast<uint32_t>(static_cast<float>(real));
    return true;
  }
  const bool hexadecimal = std::strchr("xXfFdD", mark) != nullptr;
  if (hexadecimal) digits.remove_prefix(2);
  if (digits.ends_with('U')) digits.remove_suffix(1);
  const auto end =
      std::from_chars(digits.data(), digits.data() + digits.size(), value, hexadecimal ? 16 : 10);
  if (end.ptr != digits.data() + digits.size()) return false;
  if (negative) value = -value;
  return true;
}

Symbols::Symbols(const Module& module, const KernelText& text, Program& program)
    : module_(module), program_(program) {
  open_scope();
  declare_parameters(text.parameters);
  for (const SharedVariable& variable : module.shared) place_shared(variable);
}

uint32_t Symbols::new_row(bool wide) {
  const uint32_t row = static_cast<uint32_t>(program_.registers.size());
  program_.registers.resize(row + kLanes * (wide ? 8 : 4), kPoison);
  return row;
}

uint32_t Symbols::new_predicate(LaneMask initial) {
  program_.predicates.push_back(initial);
  return 2 * static_cast<uint32_t>(program_.predicates.size() - 1);
}

void Symbols::fill_row(uint32_t row, uint64_t value, bool wide) {
  const size_t bytes = wide ? 8 : 4;
  for (int lane = 0; lane < kLanes; ++lane)
    std::memcpy(&program_.registers[row + lane * bytes], &value, bytes);
}

void Symbols::declare_registers(std::string_view declaration) {
  declaration = trim(declaration.substr(4));
  const size_t end = declaration.find_first_of(" \t");
  const std::string_view type = declaration.substr(1, end - 1);
  const bool predicate = type == "pred", wide = type_bytes(type) == 8;
  if (type_bytes(type) > 8) throw Unsupported("registers of type " + std::string(type));
  const auto add = [&](const std::string& name) {
    scopes_.back()[name] = {predicate ? Place::kPredicate : Place::kRegister, kUnplaced, wide};
  };
  for (std::string_view name : split(declaration.substr(end), ',')) {
    const size_t bracket = name.find('<');
    if (bracket == name.npos) {
      add(std::string(name));
      continue;
    }
    const int count = std::atoi(std::string(name.substr(bracket + 1)).c_str());
    for (int i = 0; i < count; ++i) add(std::string(name.substr(0, bracket)) + std::to_string(i));
  }
}

void Symbols::place_shared(const SharedVariable& variable) {
  if (variable.bytes == 0) {
    dynamic_shared_[variable.name] = true;
    dynamic_align_ = std::max(dynamic_align_, variable.align);
    return;
  }
  uint32_t& bytes = program_.static_shared_bytes;
  bytes = align_up(bytes, variable.align);
  shared_[variable.name] = kSharedBegin + bytes;
  bytes += variable.bytes;
}

void Symbols::declare_variable(std::string_view declaration) {
  const Variable variable = parse_variable(declaration);
  if (variable.space == "shared") {
    place_shared({variable.name, variable.align, variable.bytes()});
  } else if (variable.space == "local" || variable.space == "param") {
    uint32_t& bytes = program_.local_bytes;
    bytes = align_up(bytes, variable.align);
    locals_[variable.name] = bytes;
    bytes += variable.bytes();
  } else {
    throw Unsupported("a variable inside of a kernel: " + std::string(declaration));
  }
}

void Symbols::declare_parameters(std::string_view parameters) {
  for (std::string_view declaration : split(parameters, ',')) {
    Variable variable = parse_variable(declaration);
    if (declaration.find(".ptr") != declaration.npos)
      variable.align = variable.element_bytes;  // the other alignment is of what it points at
    uint32_t& bytes = program_.parameter_bytes;
    bytes = align_up(bytes, variable.align);
    parameters_[variable.name] = bytes;
    program_.parameters.push_back({variable.name, bytes, variable.bytes()});
    bytes += variable.bytes();
  }
}

Place Symbols::constant(uint64_t value, bool wide) {
  if (!wide) value = static_cast<uint32_t>(value);
  const auto [entry, is_new] = constants_.try_emplace({value, wide});
  if (is_new) {
    entry->second = {Place::kRegister, new_row(wide), wide};
    fill_row(entry->second.arg, value, wide);
  }
  return entry->second;
}

Place Symbols::predicate_constant(bool value) {
  return {Place::kPredicate, new_predicate(value ? kAllLanes : 0), false};
}

Place Symbols::sink(bool predicate) {
  if (predicate) return {Place::kPredicate, new_predicate(0), false};
  return {Place::kRegister, new_row(true), true};
}

Place Symbols::find(std::string_view name_view, bool wide) {
  const std::string name(name_view);
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    const auto entry = scope->find(name);
    if (entry == scope->end()) continue;
    Place& place = entry->second;
    if (place.arg == kUnplaced)
      place.arg =
          place.kind == Place::kPredicate ? new_predicate(kPoisonPredicate) : new_row(place.wide);
    return place;
  }
  if (const auto entry = shared_.find(name); entry != shared_.end())
    return constant(entry->second, wide);
  if (dynamic_shared_.contains(name)) {
    const Place place{Place::kRegister, new_row(wide), wide};
    dynamic_addresses_.push_back(place);
    return place;
  }
  if (const auto entry = locals_.find(name); entry != locals_.end())
    return constant(entry->second, wide);
  if (const auto entry = parameters_.find(name); entry != parameters_.end())
    return constant(entry->second, wide);
  if (const auto entry = module_.variables.find(name); entry != module_.variables.end())
    return constant(reinterpret_cast<uint64_t>(entry->second->data()), true);
  if (const auto entry = specials_.find(name); entry != specials_.end()) return entry->second;
  if (const SpecialValue value = special_register(name); value != nullptr) {
    const bool is_wide =
        name.find("clock64") != name.npos || name == "%globaltimer" || name == "%gridid";
    const Place place{Place::kRegister, new_row(is_wide), is_wide};
    program_.specials.push_back({value, place.arg, is_wide});
    return specials_[name] = place;
  }
  throw Unsupported("operand '" + name + "'");
}

void Symbols::finish() {
  const uint32_t end = kSharedBegin + program_.static_shared_bytes;
  program_.dynamic_shared_begin = align_up(end, dynamic_align_);
  for (const Place& place : dynamic_addresses_)
    fill_row(place.arg, program_.dynamic_shared_begin, place.wide);
  program_.local_bytes = align_up(program_.local_bytes, 16);
}

}  // namespace ptxvm
