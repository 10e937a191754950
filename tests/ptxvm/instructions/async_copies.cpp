// SPDX-License-Identifier: BSD-3-Clause
//
// cp.async and what waits for it. The copy reads its source when it is issued and lands when it is
// waited for; in between its destination is NaN, and nobody may touch it.
#include <algorithm>

#include "../block.h"
#include "../launch.h"
#include "../memory_access.h"
#include "handlers.h"

namespace ptxvm {
namespace {

// 4, 8 or 16 bytes: of a size that the compiler knows.
void fill_with_nan(uint8_t* to, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes; i += 4) std::memset(to + i, 0xff, 4);
}

// arg: destination, source, bytes of the source (the rest becomes zeros), displacement of the
// destination; immediate: bytes.
Flow run_copy(Warp& warp, const Instruction& in, LaneMask lanes) {
  Launch& launch = warp.block.launch;
  const auto bytes = static_cast<uint32_t>(in.immediate);
  const auto given = warp.load<uint32_t>(in.arg[2]);
  const bool wide_destination = in.wide_destination;
  for_lanes(lanes, [&](int lane) {
    const uint64_t to =
        warp.lane_value(in.arg[0], lane, wide_destination) +
        static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(in.arg[3])));
    const uint64_t from =
        warp.lane_value(in.arg[1], lane, true) + static_cast<uint64_t>(in.displacement);
    if (given[lane] > bytes) throw Fault("cp.async: the source has more bytes than the copy", lane);
    AsyncCopy copy{};
    copy.destination = shared_address(warp, to, bytes, lane);
    copy.bytes = static_cast<uint8_t>(bytes);
    copy.lane = static_cast<uint8_t>(lane);
    if (given[lane] != 0) {
      if (from % bytes != 0) throw Fault("misaligned address: source of a cp.async", lane);
      launch.memory.check(from, given[lane], false, lane);
      if (launch.checks.races)
        launch.races.read(warp.accessor(lane), warp.block.number, from, given[lane]);
      std::memcpy(copy.data, reinterpret_cast<const void*>(from), given[lane]);
    }
    if (launch.checks.races)
      warp.block.races.begin_copy(warp.accessor(lane), copy.destination - kSharedBegin, bytes);
    fill_with_nan(warp.block.shared(copy.destination), bytes);
    warp.issue_copy(copy);
  });
  ++launch.statistics.copies;
  return Flow::kNext;
}

bool copy(Decoder& d) {
  const int64_t bytes = d.number(2);
  if (d.has("cg") ? bytes != 16 : bytes != 4 && bytes != 8 && bytes != 16)
    d.unsupported("copies of this size do not exist");
  // A cache policy may follow, with L2::cache_hint.
  const size_t operands = d.operand_count() - (d.has("L2::cache_hint") ? 1 : 0);
  if (operands > 3 && d.is_predicate(3)) return false;
  d.address(0, 0);
  d.instruction.wide_destination = d.instruction.wide_address;
  d.instruction.arg[3] = static_cast<uint32_t>(d.instruction.displacement);
  d.address(1, 1);
  if (!d.instruction.wide_address) return false;
  d.instruction.arg[2] = operands > 3 ? d.source(3) : d.constant(static_cast<uint32_t>(bytes));
  d.instruction.immediate = static_cast<int32_t>(bytes);
  d.instruction.run = run_copy;
  return true;
}

bool cp(Decoder& d) {
  if (d.word(1) != "async" || d.has("bulk") || d.has("mbarrier")) return false;
  if (d.has("commit_group")) {
    d.instruction.run = [](Warp& warp, const Instruction&, LaneMask lanes) {
      warp.commit_copies(lanes);
      return Flow::kNext;
    };
    return true;
  }
  if (d.has("wait_group") || d.has("wait_all")) {
    d.instruction.immediate = d.has("wait_all") ? -1 : static_cast<int32_t>(d.number(0));
    d.instruction.run = [](Warp& warp, const Instruction& in, LaneMask lanes) {
      warp.wait_copies(lanes, in.immediate);
      return Flow::kNext;
    };
    return true;
  }
  return copy(d);
}

}  // namespace

void add_async_copies(Opcodes& opcodes) { opcodes["cp"].push_back(cp); }

}  // namespace ptxvm
