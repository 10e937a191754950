// SPDX-License-Identifier: BSD-3-Clause
#include "memory_access.h"

#include <algorithm>
#include <bit>
#include <cstdio>

#include "block.h"
#include "launch.h"

namespace ptxvm {
namespace {

void check_alignment(uint64_t address, uint32_t bytes, int lane) {
  if ((address & (bytes - 1)) == 0) return;
  char text[96];
  std::snprintf(text, sizeof text, "misaligned address: %u bytes at 0x%llx", bytes,
                static_cast<unsigned long long>(address));
  throw Fault(text, lane);
}

[[noreturn]] void out_of_bounds(const char* space, uint64_t address, uint32_t bytes, uint64_t begin,
                                uint64_t end, int lane) {
  char text[128];
  std::snprintf(text, sizeof text, "%s memory out of bounds: %u bytes at %lld, of [%llu, %llu)",
                space, bytes, static_cast<long long>(address),
                static_cast<unsigned long long>(begin), static_cast<unsigned long long>(end));
  throw Fault(text, lane);
}

uint8_t* access_shared(Warp& warp, uint64_t address, uint32_t bytes, int lane, Use use) {
  const uint32_t at = shared_address(warp, address, bytes, lane);
  if (warp.block.launch.checks.races) {
    SharedRaces& races = warp.block.races;
    const Accessor by = warp.accessor(lane);
    const uint32_t offset = at - kSharedBegin;
    if (use == Use::kRead)
      races.read(by, offset, bytes);
    else if (use == Use::kWrite)
      races.write(by, offset, bytes);
    else
      races.atomic(by, offset, bytes);
  }
  return warp.block.shared(at);
}

}  // namespace

uint8_t* access_global(Warp& warp, uint64_t address, uint32_t bytes, int lane, Use use) {
  Launch& launch = warp.block.launch;
  check_alignment(address, bytes, lane);
  launch.memory.check(address, bytes, use != Use::kRead, lane);
  if (launch.checks.races) {
    const Accessor by = warp.accessor(lane);
    const uint32_t block = warp.block.number;
    if (use == Use::kRead)
      launch.races.read(by, block, address, bytes);
    else if (use == Use::kWrite)
      launch.races.write(by, block, address, bytes);
    else
      launch.races.atomic(by, block, address, bytes);
  }
  return reinterpret_cast<uint8_t*>(address);
}

void refuse_shared(Warp& warp, uint64_t address, uint32_t bytes, int lane) {
  check_alignment(address, bytes, lane);
  out_of_bounds("shared", address, bytes, kSharedBegin, kSharedBegin + warp.block.shared_bytes(),
                lane);
}

uint8_t* access_memory(Warp& warp, Space space, uint64_t address, uint32_t bytes, int lane,
                       Use use) {
  if (space == Space::kGeneric) {
    if (address - kSharedWindow < kWindowBytes)
      return access_shared(warp, address, bytes, lane, use);
    space = Space::kGlobal;
    if (address - kLocalWindow < kWindowBytes) {
      space = Space::kLocal;
      address -= kLocalWindow;
    } else if (address - kParamWindow < kWindowBytes) {
      space = Space::kParam;
      address -= kParamWindow;
    }
  }
  switch (space) {
    case Space::kShared:
      return access_shared(warp, address, bytes, lane, use);
    case Space::kLocal:
      check_alignment(address, bytes, lane);
      if (address >= warp.local_bytes() || bytes > warp.local_bytes() - address)
        out_of_bounds("local", address, bytes, 0, warp.local_bytes(), lane);
      return warp.local(lane) + address;
    case Space::kParam: {
      std::vector<uint8_t>& parameters = warp.block.launch.parameters;
      check_alignment(address, bytes, lane);
      if (address >= parameters.size() || bytes > parameters.size() - address)
        out_of_bounds("parameter", address, bytes, 0, parameters.size(), lane);
      if (use != Use::kRead) throw Fault("store to a kernel parameter", lane);
      return parameters.data() + address;
    }
    default:
      return access_global(warp, address, bytes, lane, use);
  }
}

Lanes<uint64_t> addresses(const Warp& warp, const Instruction& in, size_t slot) {
  const auto displacement = static_cast<uint64_t>(in.displacement);
  Lanes<uint64_t> result;
  if (in.wide_address) {
    const Row<uint64_t> base = warp.load<uint64_t>(in.arg[slot]);
    for (int lane = 0; lane < kLanes; ++lane) result[lane] = base[lane] + displacement;
  } else {
    const Row<uint32_t> base = warp.load<uint32_t>(in.arg[slot]);
    for (int lane = 0; lane < kLanes; ++lane) result[lane] = base[lane] + displacement;
  }
  return result;
}

// Shared memory has 32 banks of 4 bytes. Lanes go in groups that ask for 128 bytes; a group takes
// as many passes as the most different units (of `bytes`, which are aligned) in the same banks.
void count_passes(Warp& warp, const Lanes<uint64_t>& addresses, LaneMask lanes, uint32_t bytes) {
  if (!warp.block.launch.checks.bank_conflicts) return;
  const int shift = std::countr_zero(std::max(bytes, 4u));
  const uint32_t group = 128u >> shift;
  Statistics& statistics = warp.block.launch.statistics;
  for (uint32_t begin = 0; begin < kLanes; begin += group) {
    uint32_t different[kLanes], in_banks[kLanes]{}, count = 0, passes = 0;
    for (uint32_t lane = begin; lane < begin + group; ++lane) {
      if (!has_lane(lanes, static_cast<int>(lane))) continue;
      const auto unit = static_cast<uint32_t>(addresses[static_cast<int>(lane)] >> shift);
      uint32_t& others = in_banks[unit % group];
      // Whoever asks for what was asked for before shares it.
      if (others != 0 && std::find(different, different + count, unit) != different + count)
        continue;
      different[count++] = unit;
      passes = std::max(passes, ++others);
    }
    if (passes == 0) continue;
    ++statistics.shared_passes;
    statistics.bank_conflicts += passes - 1;
  }
}

}  // namespace ptxvm
