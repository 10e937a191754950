// SPDX-License-Identifier: BSD-3-Clause
#include "mutation.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <random>
#include <set>
#include <stdexcept>
#include <vector>

#include "machine.h"
#include "parser.h"
#include "runtime.h"

namespace ptxvm {
namespace {

using Random = std::mt19937_64;

struct Piece {
  size_t begin, length;
};

bool is_one_of(char c, std::string_view set) { return set.find(c) != set.npos; }
bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0; }

std::string with(const std::string& text, Piece piece, const std::string& instead) {
  return text.substr(0, piece.begin) + instead + text.substr(piece.begin + piece.length);
}

// "ld.global.b32", behind the guard.
Piece opcode_of(const std::string& text) {
  size_t begin = 0;
  if (text.starts_with('@')) begin = text.find_first_not_of(" \t", text.find_first_of(" \t"));
  return {begin, std::min(text.find_first_of(" \t\n{[", begin), text.size()) - begin};
}

// Numbers that are operands or displacements, whole ones.
std::vector<Piece> numbers_of(const std::string& text) {
  std::vector<Piece> pieces;
  const Piece opcode = opcode_of(text);
  for (size_t i = opcode.begin + opcode.length; i < text.size(); ++i) {
    if (!is_word(text[i])) continue;
    const size_t begin = i;
    bool digits = is_one_of(text[begin - 1], " \t,[{+-");
    for (; i < text.size() && is_word(text[i]); ++i) digits &= std::isdigit(text[i]) != 0;
    if (digits && (i == text.size() || is_one_of(text[i], ",]} \t\n")))
      pieces.push_back({begin, i - begin});
  }
  return pieces;
}

// Registers behind the first, which is written to.
std::vector<Piece> sources_of(const std::string& text) {
  std::vector<Piece> pieces;
  const Piece opcode = opcode_of(text);
  for (size_t i = text.find('%', opcode.begin); i != text.npos; i = text.find('%', i + 1)) {
    size_t end = i + 1;
    while (end < text.size() && is_word(text[end])) ++end;
    pieces.push_back({i, end - i});
  }
  if (!pieces.empty()) pieces.erase(pieces.begin());
  return pieces;
}

// The first two operands of what commutes are no mutant when swapped.
bool commutes(const std::string& text) {
  const std::string_view opcode = std::string_view(text).substr(opcode_of(text).begin);
  for (const char* name : {"add.", "mul.", "max.", "min.", "or.", "and.", "xor.", "fma.", "mad."})
    if (opcode.starts_with(name)) return true;
  return false;
}

// Changes of one kind: what the text may become.
using Texts = std::vector<std::string>;

// A shift by all but the sign moves all that it can.
bool is_shift_to_the_sign(const std::string& text) {
  const std::string_view opcode = std::string_view(text).substr(opcode_of(text).begin);
  return (opcode.starts_with("shr.s64") && text.ends_with(", 63")) ||
         (opcode.starts_with("shr.s32") && text.ends_with(", 31"));
}

Texts grown_numbers(const std::string& text) {
  Texts result;
  if (is_shift_to_the_sign(text)) return result;
  for (const Piece piece : numbers_of(text)) {
    const std::string digits = text.substr(piece.begin, piece.length);
    if (digits.size() > 18) continue;
    for (const long long step : {1, 16})
      result.push_back(with(text, piece, std::to_string(std::stoll(digits) + step)));
  }
  return result;
}

Texts swapped_sources(const std::string& text) {
  Texts result;
  const std::vector<Piece> sources = sources_of(text);
  if (commutes(text)) return result;
  const auto name = [&](Piece piece) { return text.substr(piece.begin, piece.length); };
  // "%rd" of "%rd12"
  const auto kind = [&](Piece piece) {
    return name(piece).substr(0, name(piece).find_first_of("0123456789"));
  };
  for (size_t i = 0; i < sources.size(); ++i) {
    for (size_t j = i + 1; j < sources.size(); ++j) {
      if (kind(sources[i]) != kind(sources[j]) || name(sources[i]) == name(sources[j])) continue;
      result.push_back(
          with(with(text, sources[j], name(sources[i])), sources[i], name(sources[j])));
    }
  }
  return result;
}

Texts negated_guard(const std::string& text) {
  if (!text.starts_with('@')) return {};
  return {text[1] == '!' ? with(text, {1, 1}, "") : with(text, {1, 0}, "!")};
}

Texts related_operations(const std::string& text) {
  using Pair = std::array<const char*, 2>;
  static constexpr Pair kOperations[] = {
      {"add.", "sub."}, {"min.", "max."}, {"and.", "or."}, {"shl.b", "shr.b"}, {"shl.b", "shr.u"}};
  static constexpr Pair kComparisons[] = {{".lt.", ".le."}, {".gt.", ".ge."},   {".eq.", ".ne."},
                                          {".lt.", ".gt."}, {".ltu.", ".leu."}, {".gtu.", ".geu."}};
  Texts result;
  const Piece opcode = opcode_of(text);
  const std::string name = text.substr(opcode.begin, opcode.length);
  const auto exchange = [&](const Pair& pair, bool anywhere) {
    for (size_t i = 0; i < 2; ++i) {
      const std::string from = pair[i], to = pair[1 - i];
      const size_t at = name.find(from);
      if (at == name.npos || (at != 0 && !anywhere)) continue;
      std::string other = name.substr(0, at) + to + name.substr(at + from.size());
      if (other.starts_with("shl.u")) other[4] = 'b';
      result.push_back(with(text, opcode, other));
    }
  };
  for (const Pair& pair : kOperations) exchange(pair, false);
  if (name.starts_with("setp.") || name.starts_with("set."))
    for (const Pair& pair : kComparisons) exchange(pair, true);
  return result;
}

// "" is a deletion. Not of a move of -1: so registers are filled before they are written.
std::string changed(const std::string& text, Random& random) {
  std::vector<Texts> kinds;
  if (!text.ends_with(", -1") || !text.starts_with("mov.")) kinds.push_back({""});
  for (const auto kind : {grown_numbers, swapped_sources, negated_guard, related_operations})
    if (Texts texts = kind(text); !texts.empty()) kinds.push_back(std::move(texts));
  const Texts& texts = kinds[random() % kinds.size()];
  return texts[random() % texts.size()];
}

std::string mutate(Machine& machine, const std::string& kernel, size_t instruction, uint64_t seed) {
  const Module& module = machine.module_of(kernel);
  KernelText text = module.kernels.at(kernel);
  const TextRange at = machine.program(kernel).statements.at(instruction);
  Random random(seed);
  const Piece piece{at.begin, at.end - at.begin};
  const std::string now(trim(std::string_view(text.body).substr(at.begin, piece.length)));
  // Running off the end is a return anyway.
  if (now.empty() || now == "ret") return "";
  const std::string mutant = changed(now, random);
  text.body = with(text.body, piece, mutant);
  std::unique_ptr<Program> program = parse_kernel(module, kernel, text);
  machine.replace(kernel, std::move(program));
  return mutant.empty() ? "nothing" : mutant;
}

// Calls use(machine) with the machine held and all kernels known; the text it returns is kept.
template <typename Use>
const char* answer(const Use& use) {
  static std::string text;
  Machine& machine = Machine::instance();
  const std::lock_guard lock(machine.mutex);
  load_registered_modules(machine);
  try {
    text = use(machine);
  } catch (const std::exception& problem) {
    text.clear();  // no such kernel, or a mutant that cannot be parsed
  }
  return text.c_str();
}

// mbarrier.try_wait and the jump back to it: how often is a matter of the schedule.
bool asks_mbarrier(const Program& program, size_t i) {
  if (program.text[i].starts_with("bra")) i = program.code[i].target;
  return program.text[i].starts_with("mbarrier.try_wait");
}

}  // namespace
}  // namespace ptxvm

const char* ptxvm_kernels() {
  return ptxvm::answer([](ptxvm::Machine& machine) {
    std::string text;
    for (const std::string& name : machine.kernels())
      text += name + '\t' + ptxvm::demangled(name) + '\n';
    return text;
  });
}

const char* ptxvm_instructions(const char* kernel) {
  return ptxvm::answer([&](ptxvm::Machine& machine) {
    const ptxvm::Program& program = machine.program(kernel);
    std::string text;
    for (size_t i = 0; i < program.code.size(); ++i) {
      std::string statement = program.text[i];
      for (char& c : statement)
        if (c == '\n' || c == '\t') c = ' ';
      text += std::to_string(program.executed[i]) + '\t' + program.place_of(i) + '\t' + statement +
              '\n';
    }
    return text;
  });
}

const char* ptxvm_mutate(const char* kernel, uint64_t instruction, uint64_t seed) {
  return ptxvm::answer(
      [&](ptxvm::Machine& machine) { return ptxvm::mutate(machine, kernel, instruction, seed); });
}

void ptxvm_restore(const char* kernel) {
  ptxvm::answer([&](ptxvm::Machine& machine) {
    machine.replace(kernel, nullptr);
    std::ranges::fill(machine.program(kernel).executed, 0);
    return std::string();
  });
}

void ptxvm_limit_instructions(uint64_t of_a_block) {
  ptxvm::Checks checks = ptxvm::checks();
  checks.instruction_limit = of_a_block;
  ptxvm::set_checks(checks);
}

const char* ptxvm_executed_forms() {
  return ptxvm::answer([](ptxvm::Machine& machine) {
    std::set<std::string> forms;
    for (const std::string& kernel : machine.kernels()) {
      if (!machine.was_run(kernel)) continue;
      const ptxvm::Program& program = machine.program(kernel);
      for (size_t i = 0; i < program.code.size(); ++i) {
        const std::string& text = program.text[i];
        if (program.executed[i] != 0) forms.insert(text.substr(0, text.find_first_of(" \t\n{[")));
      }
    }
    std::string lines;
    for (const std::string& form : forms) lines += form + '\n';
    return lines;
  });
}

uint64_t ptxvm_executed(const char* kernel) {
  uint64_t total = 0;
  ptxvm::answer([&](ptxvm::Machine& machine) {
    const ptxvm::Program& program = machine.runs_as(kernel);
    for (size_t i = 0; i < program.code.size(); ++i)
      if (!ptxvm::asks_mbarrier(program, i)) total += program.executed[i];
    return std::string();
  });
  return total;
}
