// SPDX-License-Identifier: BSD-3-Clause
//
// Branches, exits, calls of what the device library offers, and instructions without effect here.
#include "handlers.h"

namespace ptxvm {
namespace {

bool bra(Decoder& d) {  // the parser resolves the label
  d.instruction.run = [](Warp&, const Instruction&, LaneMask) { return Flow::kJump; };
  return true;
}

bool exit(Decoder& d) {
  d.instruction.run = [](Warp&, const Instruction&, LaneMask) { return Flow::kExit; };
  return true;
}

bool trap(Decoder& d) {
  d.instruction.run = [](Warp&, const Instruction&, LaneMask lanes) -> Flow {
    throw Fault("trap", first_lane(lanes));
  };
  return true;
}

// Orders accesses as other threads see them. That orders nothing by itself: see Note [happens
// before], and blocks of a launch may not wait for each other at all.
bool nothing(Decoder& d) {
  if (d.word(1) == "proxy") return false;  // warpgroup.cpp
  d.instruction.run = [](Warp&, const Instruction&, LaneMask) { return Flow::kNext; };
  return true;
}

bool createpolicy(Decoder& d) {
  d.instruction.arg = {d.destination(0, true)};
  d.instruction.run = [](Warp& warp, const Instruction& in, LaneMask lanes) {
    warp.store(in.arg[0], lanes, Lanes<uint64_t>{});
    return Flow::kNext;
  };
  return true;
}

bool call(Decoder& d) {
  if (d.statement().find("vprintf") != std::string_view::npos) return nothing(d);
  if (d.statement().find("__assertfail") == std::string_view::npos) return false;
  d.instruction.run = [](Warp&, const Instruction&, LaneMask lanes) -> Flow {
    throw Fault("a device-side assert fails", first_lane(lanes));
  };
  return true;
}

}  // namespace

void add_control(Opcodes& opcodes) {
  opcodes["bra"].push_back(bra);
  for (const char* name : {"ret", "exit"}) opcodes[name].push_back(exit);
  for (const char* name : {"trap", "brkpt"}) opcodes[name].push_back(trap);
  for (const char* name : {"membar", "fence", "nanosleep", "prefetch", "prefetchu", "discard",
                           "applypriority", "pmevent"})
    opcodes[name].push_back(nothing);
  opcodes["createpolicy"].push_back(createpolicy);
  opcodes["call"].push_back(call);
}

}  // namespace ptxvm
