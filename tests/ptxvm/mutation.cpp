// SPDX-License-Identifier: BSD-3-Clause
#include "mutation.h"

#include <cctype>
#include <random>
#include <stdexcept>

#include "machine.h"
#include "parser.h"
#include "runtime.h"

namespace ptxvm {
namespace {

using Random = std::mt19937_64;

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines(1);
  for (char c : text) {
    if (c == '\n')
      lines.emplace_back();
    else
      lines.back() += c;
  }
  return lines;
}

bool is_instruction(const std::string& line) {
  const std::string_view text = trim(line);
  if (text.empty() || text.find(';') == text.npos || text.starts_with("ret")) return false;
  return text[0] == '@' || std::islower(static_cast<unsigned char>(text[0])) != 0;
}

struct Piece {
  size_t begin, length;
};

// Numbers that are operands or displacements: between , [ + space and , ] ;
std::vector<Piece> numbers_of(const std::string& line) {
  std::vector<Piece> pieces;
  for (size_t i = line.find_first_of(" \t", line.find_first_not_of(" \t")); i < line.size(); ++i) {
    if (std::isdigit(static_cast<unsigned char>(line[i])) == 0) continue;
    const bool begins =
        i > 0 && std::string_view(" \t,[+-").find(line[i - 1]) != std::string_view::npos;
    size_t end = i;
    while (end < line.size() && std::isdigit(static_cast<unsigned char>(line[end]))) ++end;
    if (begins && end < line.size() &&
        std::string_view(",]; ").find(line[end]) != std::string_view::npos)
      pieces.push_back({i, end - i});
    while (end < line.size() && std::isalnum(static_cast<unsigned char>(line[end]))) ++end;
    i = end;
  }
  return pieces;
}

std::vector<Piece> registers_of(const std::string& line) {
  std::vector<Piece> pieces;
  for (size_t i = line.find('%'); i != line.npos; i = line.find('%', i + 1)) {
    size_t end = i + 1;
    while (end < line.size() && std::isalnum(static_cast<unsigned char>(line[end]))) ++end;
    pieces.push_back({i, end - i});
  }
  return pieces;
}

// "%rd" of "%rd12": registers of one kind may be swapped.
std::string kind_of(const std::string& line, Piece piece) {
  const std::string name = line.substr(piece.begin, piece.length);
  return name.substr(0, name.find_first_of("0123456789"));
}

bool commutes(const std::string& line) {
  for (const char* name : {"add.", "mul.", "max.", "min.", "or.", "and.", "xor.", "fma.", "mad."}) {
    const size_t at = line.find(name);
    if (at != line.npos && (at == 0 || std::isspace(static_cast<unsigned char>(line[at - 1]))))
      return true;
  }
  return false;
}

// "" if this kind of change does not fit the line.
std::string changed(const std::string& line, Random& random) {
  switch (random() % 3) {
    case 0:
      return " ";
    case 1: {
      const std::vector<Piece> numbers = numbers_of(line);
      if (numbers.empty()) return "";
      const Piece piece = numbers[random() % numbers.size()];
      const long long value = std::stoll(line.substr(piece.begin, piece.length));
      const long long step = random() % 2 != 0 ? 1 : 16;
      return line.substr(0, piece.begin) + std::to_string(value + step) +
             line.substr(piece.begin + piece.length);
    }
    default: {
      // Products and sums commute; their first two operands are no mutants when swapped.
      const std::vector<Piece> registers = registers_of(line);
      if (registers.size() < 3 || commutes(line)) return "";
      size_t a = 1 + random() % (registers.size() - 1), b = 1 + random() % (registers.size() - 1);
      if (a > b) std::swap(a, b);
      const Piece x = registers[a], y = registers[b];
      const std::string first = line.substr(x.begin, x.length),
                        second = line.substr(y.begin, y.length);
      if (first == second || kind_of(line, x) != kind_of(line, y)) return "";
      return line.substr(0, x.begin) + second +
             line.substr(x.begin + x.length, y.begin - x.begin - x.length) + first +
             line.substr(y.begin + y.length);
    }
  }
}

}  // namespace

std::vector<std::string> kernels() {
  Machine& machine = Machine::instance();
  const std::lock_guard lock(machine.mutex);
  load_registered_modules(machine);
  return machine.kernels();
}

std::string mutate(const std::string& kernel, uint64_t seed) {
  Machine& machine = Machine::instance();
  const std::lock_guard lock(machine.mutex);
  load_registered_modules(machine);
  const KernelText& original = machine.module_of(kernel).kernels.at(kernel);
  std::vector<std::string> lines = lines_of(original.body);
  Random random(seed);
  for (int attempt = 0; attempt < 100000; ++attempt) {
    std::string& line = lines[random() % lines.size()];
    if (!is_instruction(line)) continue;
    const std::string mutant = changed(line, random);
    if (mutant.empty()) continue;
    const std::string description = std::string(trim(line)) + "  ->  " +
                                    (mutant == " " ? "nothing" : std::string(trim(mutant)));
    line = mutant;
    KernelText text = original;
    text.body.clear();
    for (const std::string& part : lines) text.body += part + '\n';
    machine.replace(kernel, parse_kernel(machine.module_of(kernel), kernel, text));
    return description;
  }
  throw std::runtime_error("ptxvm: " + kernel + " has no instruction to change");
}

void restore(const std::string& kernel) {
  Machine& machine = Machine::instance();
  const std::lock_guard lock(machine.mutex);
  machine.replace(kernel, nullptr);
}

}  // namespace ptxvm

const char* ptxvm_kernels() {
  static std::string text;
  text.clear();
  for (const std::string& name : ptxvm::kernels()) text += name + '\n';
  return text.c_str();
}

const char* ptxvm_mutate(const char* kernel, uint64_t seed) {
  static std::string text;
  try {
    text = ptxvm::mutate(kernel, seed);
  } catch (const std::exception& problem) {
    text.clear();  // no such kernel, or a mutant that cannot be parsed
  }
  return text.c_str();
}

void ptxvm_restore(const char* kernel) { ptxvm::restore(kernel); }
