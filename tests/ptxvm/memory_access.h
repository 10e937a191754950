// SPDX-License-Identifier: BSD-3-Clause
//
// From an address to host memory, through every check.
#pragma once

#include <cstdint>

#include "block.h"
#include "lanes.h"
#include "program.h"
#include "warp.h"

namespace ptxvm {

enum class Use : uint8_t { kRead, kWrite, kAtomic };

// Checks alignment, bounds and races of one lane's access. Throws Fault.
uint8_t* access_memory(Warp& warp, Space space, uint64_t address, uint32_t bytes, int lane,
                       Use use);

uint8_t* access_global(Warp& warp, uint64_t address, uint32_t bytes, int lane, Use use);

[[noreturn]] void refuse_shared(Warp& warp, uint64_t address, uint32_t bytes, int lane);

// An address of the shared space, or a generic one within its window, as a shared address that has
// been checked for alignment and bounds.
inline uint32_t shared_address(Warp& warp, uint64_t address, uint32_t bytes, int lane) {
  const uint64_t at = address - (address - kSharedWindow < kWindowBytes ? kSharedWindow : 0);
  const uint64_t offset = at - kSharedBegin, end = warp.block.shared_bytes();
  if ((at & (bytes - 1)) != 0 || offset >= end || bytes > end - offset)
    refuse_shared(warp, at, bytes, lane);
  return static_cast<uint32_t>(at);
}

// The addresses of an instruction whose arg[slot] is their base.
Lanes<uint64_t> addresses(const Warp& warp, const Instruction& in, size_t slot);

// Counts, if that is asked for, the passes shared memory takes for lanes that access `bytes` (4, 8
// or 16) each.
void count_passes(Warp& warp, const Lanes<uint64_t>& addresses, LaneMask lanes, uint32_t bytes);

}  // namespace ptxvm
