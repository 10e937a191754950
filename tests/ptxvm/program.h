// SPDX-License-Identifier: BSD-3-Clause
//
// A kernel ready to run: its instructions with operands resolved to places in the register file.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "lanes.h"

namespace ptxvm {

class Warp;
struct Instruction;

// What becomes of the lanes that executed an instruction.
enum class Flow : uint8_t {
  kNext,     // on to the next instruction
  kJump,     // to the instruction's target
  kExit,     // they are done
  kBlocked,  // they have arrived at a barrier; somebody else resumes the warp, after it
  kRetry,    // the same instruction again, when other lanes of the warp have got further
};

// Runs one instruction for the lanes of the mask, which is never empty.
using Handler = Flow (*)(Warp&, const Instruction&, LaneMask);

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kLocal, kParam };

struct Instruction {
  Handler run = nullptr;
  int32_t guard = -1;  // a predicate operand, or none
  uint32_t target = 0;
  // Operands, as each handler wants them: registers are byte offsets into the register file, and
  // so are constants; predicates are 2 * index + negated.
  std::array<uint32_t, 14> arg{};
  int64_t displacement = 0;  // of an address
  int32_t immediate = 0;
  uint8_t outcomes = 0;  // of a comparison, for which it holds
  bool flush = false;    // .ftz of a comparison
  Space space = Space::kGeneric;
  uint8_t elements = 1;      // of a vector
  bool wide_address = true;  // 64 bits, and so on:
  bool wide_source = false;
  bool wide_destination = false;
  bool watched = false;             // see WatchedUse
  std::vector<uint32_t> registers;  // of a wgmma: D, then A if that is in registers
};

// Registers that some wgmma of a kernel names, and those copied into them, are watched.
struct WatchedUse {
  enum Kind : uint8_t { kRead, kWrite, kCopy } kind;
  uint32_t index;     // in Program::watched
  uint32_t from = 0;  // of a copy
};

struct SourceLine {
  uint32_t file = 0, line = 0;
  uint32_t inlined_file = 0, inlined_line = 0;  // where the function of `line` was inlined, or 0
};

struct Parameter {
  std::string name;
  uint32_t offset, bytes;
};

// A special register's value for a lane of a warp.
using SpecialValue = uint64_t (*)(const Warp&, int lane);

struct SpecialRegister {
  SpecialValue value;
  uint32_t row;
  bool wide;
};

struct TextRange {
  uint32_t begin = 0, end = 0;  // its guard included, its semicolon not
};

struct Program {
  std::string name;
  std::vector<Instruction> code;
  std::vector<std::string> files;
  // Of each instruction:
  std::vector<std::string> text;
  std::vector<SourceLine> lines;
  std::vector<TextRange> statements;  // where it stands in the kernel's text
  std::vector<std::vector<WatchedUse>> watched_uses;
  mutable std::vector<uint64_t> executed;  // how often a warp ran it for some lane

  std::vector<uint8_t> registers;    // at the start: constants in place, the rest is poison
  std::vector<LaneMask> predicates;  // likewise
  std::vector<std::string> watched;  // names of registers
  std::vector<SpecialRegister> specials;
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;
  uint32_t registers_per_thread = 0;  // with which it starts, or 0: not known
  uint32_t static_shared_bytes = 0, dynamic_shared_begin = 0, local_bytes = 0;

  // "file:line (inlined at file:line)" of an instruction.
  std::string place_of(size_t instruction) const;
};

// Shared memory starts here: below lies what the system keeps for itself, as on the device.
constexpr uint32_t kSharedBegin = 1024;

// Generic addresses of what is not global memory.
constexpr uint64_t kSharedWindow = uint64_t{0x7a} << 40;
constexpr uint64_t kLocalWindow = uint64_t{0x7b} << 40;
constexpr uint64_t kParamWindow = uint64_t{0x7c} << 40;
constexpr uint64_t kWindowBytes = uint64_t{1} << 32;

}  // namespace ptxvm
