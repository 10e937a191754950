// SPDX-License-Identifier: BSD-3-Clause
//
// Which registers of a kernel are watched, since a wgmma accesses them asynchronously.
#pragma once

#include <vector>

#include "decoder.h"
#include "program.h"

namespace ptxvm {

// Of an instruction.
struct InstructionUses {
  std::vector<RegisterUse> uses;
  bool wgmma = false;
  bool copy = false;  // mov of a register to another
};

// Fills in what a program has to say about watched registers.
void watch(Program& program, const std::vector<InstructionUses>& code);

}  // namespace ptxvm
