// SPDX-License-Identifier: BSD-3-Clause
//
// The text of a kernel's body becomes instructions: scopes, labels, .loc, declarations here;
// opcodes in instructions/.
#include "parser.h"

#include <cctype>
#include <charconv>
#include <cstring>

#include "decoder.h"
#include "fault.h"
#include "watch.h"

namespace ptxvm {
namespace {

const Opcodes& opcodes() {
  static const Opcodes table = [] {
    Opcodes result;
    for (auto add :
         {add_arithmetic, add_bits, add_floating, add_halves, add_conversions, add_comparisons,
          add_moves, add_control, add_memory, add_atomics, add_async_copies, add_matrix,
          add_collectives, add_barriers, add_mbarriers, add_warpgroup})
      add(result);
    return result;
  }();
  return table;
}

class BodyParser {
 public:
  BodyParser(const Module& module, const KernelText& text, Program& program)
      : text_(text.body), program_(program), symbols_(module, text, program) {}

  void run() {
    scope_path_ = {0};
    while (true) {
      while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
      if (at_ >= text_.size()) break;
      if (text_[at_] == '{') {
        symbols_.open_scope();
        scope_path_.push_back(++scopes_);
        ++at_;
      } else if (text_[at_] == '}') {
        symbols_.close_scope();
        scope_path_.pop_back();
        ++at_;
      } else if (text_.compare(at_, 5, ".loc\t") == 0 || text_.compare(at_, 5, ".loc ") == 0) {
        const size_t end = std::min(text_.find('\n', at_), text_.size());
        source_line(std::string_view(text_).substr(at_ + 5, end - at_ - 5));
        at_ = end;
      } else {
        statement();
      }
    }
    // Running off the end of a kernel is a return.
    statement_ = {};
    add("ret", "");
    resolve_branches();
    program_.executed.assign(program_.code.size(), 0);
    watch(program_, uses_);
    symbols_.finish();
  }

 private:
  struct Branch {
    size_t instruction;
    std::string label;
    std::vector<int> scope_path;
  };

  // Up to a semicolon, or the colon of a label.
  void statement() {
    int depth = 0;
    size_t end = at_;
    for (; end < text_.size(); ++end) {
      const char c = text_[end];
      if (c == '{' || c == '[' || c == '(') ++depth;
      if (c == '}' || c == ']' || c == ')') --depth;
      if (c == ';' && depth == 0) break;
      if (c != ':' || depth != 0) continue;
      if (text_[end + 1] != ':') break;
      ++end;  // "::" within an opcode
    }
    const std::string_view text = trim(std::string_view(text_).substr(at_, end - at_));
    const bool is_label = end < text_.size() && text_[end] == ':';
    statement_ = {static_cast<uint32_t>(at_), static_cast<uint32_t>(end)};
    at_ = end + 1;
    if (is_label) {
      labels_[label_key(text, scope_path_.back())] = static_cast<uint32_t>(program_.code.size());
    } else if (text.starts_with(".reg")) {
      symbols_.declare_registers(text);
    } else if (text.starts_with(".pragma") || text.empty()) {
    } else if (text.starts_with('.')) {
      symbols_.declare_variable(text);
    } else if (text.starts_with('@')) {
      const size_t space = text.find_first_of(" \t");
      add(trim(text.substr(space)), text.substr(1, space - 1));
    } else {
      add(text, "");
    }
  }

  void add(std::string_view text, std::string_view guard) {
    Instruction instruction;
    program_.text.push_back(std::string(text));
    uses_.emplace_back();
    try {
      if (!guard.empty()) {
        const bool negated = guard.starts_with('!');
        const Place place = symbols_.find(guard.substr(negated ? 1 : 0), false);
        instruction.guard = static_cast<int32_t>(place.arg ^ (negated ? 1 : 0));
      }
      decode(text, instruction);
    } catch (const Unsupported& problem) {
      // The text says all that the fault will.
      program_.text.back() = problem.what();
      instruction.run = [](Warp&, const Instruction&, LaneMask) -> Flow {
        throw Fault("executes what the virtual GPU does not know");
      };
    }
    program_.code.push_back(instruction);
    program_.lines.push_back(line_);
    program_.statements.push_back(statement_);
  }

  void decode(std::string_view text, Instruction& instruction) {
    Decoder decoder(symbols_, text, instruction);
    if (decoder.word(0) == "bra")
      branches_.push_back(
          {program_.code.size(), std::string(decoder.operand_text(0)), scope_path_});
    const auto entry = opcodes().find(decoder.word(0));
    if (entry != opcodes().end()) {
      for (Decode decode : entry->second)
        if (decode(decoder)) {
          uses_.back() = {decoder.uses(), decoder.word(0) == "wgmma", is_copy(decoder)};
          return;
        }
    }
    decoder.unsupported();
  }

  static bool is_copy(const Decoder& decoder) {
    return decoder.word(0) == "mov" && decoder.uses().size() == 2 && !decoder.is_number(1);
  }

  // "1 16 5, function_name $L__info_string0, inlined_at 1 50 3"
  void source_line(std::string_view text) {
    line_ = {};
    const auto numbers = [](std::string_view part, uint32_t& file, uint32_t& line) {
      part = trim(part);
      const auto next = std::from_chars(part.data(), part.data() + part.size(), file);
      part = trim(std::string_view(next.ptr, part.data() + part.size() - next.ptr));
      std::from_chars(part.data(), part.data() + part.size(), line);
    };
    numbers(text, line_.file, line_.line);
    if (const size_t at = text.find("inlined_at"); at != text.npos)
      numbers(text.substr(at + 10), line_.inlined_file, line_.inlined_line);
  }

  static std::string label_key(std::string_view label, int scope) {
    return std::string(label) + '#' + std::to_string(scope);
  }

  void resolve_branches() {
    for (const Branch& branch : branches_) {
      bool found = false;
      for (auto scope = branch.scope_path.rbegin(); scope != branch.scope_path.rend() && !found;
           ++scope) {
        const auto label = labels_.find(label_key(branch.label, *scope));
        if (label == labels_.end()) continue;
        program_.code[branch.instruction].target = label->second;
        found = true;
      }
      if (!found) throw std::runtime_error("ptxvm: no label " + branch.label);
    }
  }

  const std::string& text_;
  Program& program_;
  Symbols symbols_;
  size_t at_ = 0;
  SourceLine line_;
  TextRange statement_;
  std::vector<int> scope_path_;  // of the innermost braces, outermost first
  int scopes_ = 0;
  std::unordered_map<std::string, uint32_t> labels_;
  std::vector<Branch> branches_;
  std::vector<InstructionUses> uses_;  // of each instruction
};

// All that a multiprocessor has for a thread: ".maxntid 384\n.minnctapersm 1".
uint32_t registers_of(const std::string& limits) {
  const auto limit = [&](const char* name) {
    const size_t at = limits.find(name);
    uint64_t product = 0;
    if (at == limits.npos) return product;
    const size_t begin = at + std::strlen(name);
    product = 1;
    for (std::string_view number :
         split(std::string_view(limits).substr(begin, limits.find('.', begin) - begin), ',')) {
      uint64_t value = 1;
      parse_number(number, true, value);
      product *= value;
    }
    return product;
  };
  if (const uint64_t registers = limit(".maxnreg"); registers != 0)
    return static_cast<uint32_t>(registers);
  const uint64_t threads = std::max(limit(".maxntid"), limit(".reqntid"));
  if (threads == 0) return 0;
  constexpr uint64_t kOfMultiprocessor = 65536, kMost = 256;
  const uint64_t blocks = std::max<uint64_t>(limit(".minnctapersm"), 1);
  return static_cast<uint32_t>(std::min(kOfMultiprocessor / (blocks * threads) / 8 * 8, kMost));
}

}  // namespace

std::unique_ptr<Program> parse_kernel(const Module& module, const std::string& name) {
  return parse_kernel(module, name, module.kernels.at(name));
}

std::unique_ptr<Program> parse_kernel(const Module& module, const std::string& name,
                                      const KernelText& text) {
  auto program = std::make_unique<Program>();
  program->name = name;
  program->files = module.files;
  program->registers_per_thread = registers_of(text.limits);
  BodyParser(module, text, *program).run();
  return program;
}

}  // namespace ptxvm
