// SPDX-License-Identifier: BSD-3-Clause
//
// mbarrier.init, mbarrier.arrive, mbarrier.try_wait.parity, in the block's own shared memory; see
// Note [mbarrier].
#include "../block.h"
#include "../launch.h"
#include "../memory_access.h"
#include "handlers.h"

namespace ptxvm {
namespace {

uint32_t offset_of(Warp& warp, uint64_t address, int lane) {
  return shared_address(warp, address, 8, lane) - kSharedBegin;
}

// Calls visit(lanes, offset, value) for the lanes that have both in common. arg: address, value.
template <typename Visit>
void for_mbarriers(Warp& warp, const Instruction& in, LaneMask lanes, const Visit& visit) {
  const Lanes<uint64_t> address = addresses(warp, in, 0);
  const auto value = warp.load<uint32_t>(in.arg[1]);
  while (lanes != 0) {
    const int first = first_lane(lanes);
    LaneMask same = 0;
    for_lanes(lanes, [&](int lane) {
      if (address[lane] == address[first] && value[lane] == value[first]) same |= 1u << lane;
    });
    visit(same, offset_of(warp, address[first], first), value[first]);
    lanes &= ~same;
  }
}

// arg: address, count.
Flow run_init(Warp& warp, const Instruction& in, LaneMask lanes) {
  const Lanes<uint64_t> address = addresses(warp, in, 0);
  const auto count = warp.load<uint32_t>(in.arg[1]);
  for_lanes(lanes, [&](int lane) {
    warp.block.mbarriers.init(warp, lane, offset_of(warp, address[lane], lane), count[lane]);
  });
  return Flow::kNext;
}

Flow run_arrive(Warp& warp, const Instruction& in, LaneMask lanes) {
  for_mbarriers(warp, in, lanes, [&](LaneMask same, uint32_t offset, uint32_t) {
    if (warp.block.mbarriers.arrive(warp, same, offset)) warp.block.wake();
  });
  return Flow::kNext;
}

// arg: address, parity, destination. The device waits for a time that it does not tell, and then
// says that the phase has not ended: so it does here, now and then.
Flow run_try_wait(Warp& warp, const Instruction& in, LaneMask lanes) {
  LaneMask ended = 0;
  uint32_t awaited = 0;
  for_mbarriers(warp, in, lanes, [&](LaneMask same, uint32_t offset, uint32_t parity) {
    if (warp.block.mbarriers.ended(warp, same, offset, parity)) ended |= same;
    awaited = offset;
  });
  if (ended == 0 && warp.block.launch.random() % 4 != 0) return warp.await(lanes, awaited);
  warp.set_predicate(in.arg[2], lanes, ended);
  return Flow::kNext;
}

bool mbarrier(Decoder& d) {
  const bool waits = d.word(1) == "try_wait";
  const size_t words = waits ? 5 : 4;
  if (d.words().size() != words || d.word(words - 2) != "shared::cta" || d.word(words - 1) != "b64")
    return false;
  if (waits && d.word(2) != "parity") return false;
  const size_t operands = waits ? 3 : 2;
  if (d.operand_count() != operands) return false;
  if (d.word(1) == "init") {
    d.address(0, 0);
    d.instruction.arg[1] = d.source(1);
    d.instruction.run = run_init;
  } else if (d.word(1) == "arrive" && d.operand_text(0) == "_") {
    d.address(1, 0);
    d.instruction.arg[1] = d.constant(0);
    d.instruction.run = run_arrive;
  } else if (waits) {
    d.instruction.arg[2] = d.predicate(0);
    d.address(1, 0);
    d.instruction.arg[1] = d.source(2);
    d.instruction.run = run_try_wait;
  } else {
    return false;
  }
  return true;
}

}  // namespace

void add_mbarriers(Opcodes& opcodes) { opcodes["mbarrier"].push_back(mbarrier); }

}  // namespace ptxvm
