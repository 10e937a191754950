// SPDX-License-Identifier: BSD-3-Clause
#include "shared_races.h"

#include <algorithm>
#include <string>

#include "fault.h"

namespace ptxvm {
namespace {

// write_thread_: the thread in the block (at most 1024), and
constexpr uint32_t kThread = 0x3ff;
constexpr uint32_t kSubword = 0x4000;  // less than the cell: its other bytes may be another lane's
constexpr uint32_t kAtomic = 0x8000;

std::string thread_name(uint32_t thread) {
  return "warp " + std::to_string(thread / kLanes) + " lane " + std::to_string(thread % kLanes);
}

}  // namespace

SharedRaces::SharedRaces(uint32_t bytes, int warps)
    : cells_((bytes + 3) / 4),
      warps_(warps),
      write_epoch_(cells_, 0),
      write_thread_(cells_, 0),
      write_instruction_(cells_, 0),
      write_fences_(cells_, 0),
      read_(static_cast<size_t>(cells_) * warps, 0),
      async_reads_(cells_ / 4 + 1) {}

void SharedRaces::clear() {
  std::fill(write_epoch_.begin(), write_epoch_.end(), 0);
  std::fill(read_.begin(), read_.end(), 0);
}

// The slow path: the writer's epoch is later than what is settled, or it is of an earlier block.
void SharedRaces::check_writer(const Accessor& by, uint32_t cell, bool subword, const char* what) {
  const uint32_t epoch = write_epoch_[cell], thread = write_thread_[cell] & kThread;
  if (epoch <= base_ || epoch <= by.clock.known[thread]) return;
  if (epoch == kInFlight)
    throw Fault(std::string("race in shared memory: ") + what +
                    " the destination of a cp.async in flight, not waited for; copied by " +
                    thread_name(thread),
                by.lane, write_instruction_[cell]);
  if (epoch == kMbarrier)
    throw Fault(std::string("shared memory: ") + what + " an mbarrier", by.lane,
                write_instruction_[cell], "initialised");
  if (static_cast<int>(thread / kLanes) != by.clock.warp)
    throw Fault(std::string("race in shared memory: ") + what + " what " + thread_name(thread) +
                    " wrote, no barrier between",
                by.lane, write_instruction_[cell]);
  if (static_cast<int>(thread % kLanes) == by.lane) return;
  if (subword && (write_thread_[cell] & kSubword) != 0) return;
  throw Fault(std::string("race in shared memory: ") + what + " what lane " +
                  std::to_string(thread % kLanes) +
                  " of the same warp wrote, no __syncwarp or barrier between",
              by.lane, write_instruction_[cell]);
}

// Of a write that is ordered before.
void SharedRaces::check_proxy(const Accessor& by, uint32_t cell) const {
  const uint32_t epoch = write_epoch_[cell], thread = write_thread_[cell] & kThread;
  if (epoch <= base_ || by.clock.fences[thread / kLanes] > write_fences_[cell] ||
      by.clock.proxied[thread] >= epoch)
    return;
  throw Fault("race of proxies in shared memory: wgmma of what " + thread_name(thread) +
                  " wrote, no fence.proxy.async between",
              by.lane, write_instruction_[cell]);
}

bool SharedRaces::read_known(const WarpClock& clock, int warp, uint32_t epoch, uint32_t lane) {
  if (epoch <= clock.whole[warp]) return true;
  if (lane == kWholeWarp) return epoch <= clock.latest[warp];
  return lane < kLanes && epoch <= clock.known[warp * kLanes + static_cast<int>(lane)];
}

void SharedRaces::check_readers(const Accessor& by, uint32_t cell, bool subword) {
  if (const AsyncReads& reads = async_reads_[cell / 4]; reads.in_flight != 0)
    throw Fault(
        "race in shared memory: write over what a wgmma in flight may still read, not waited for",
        by.lane, reads.instruction, "issued");
  for (int warp = 0; warp < warps_; ++warp) {
    const uint32_t last = read_[static_cast<size_t>(warp) * cells_ + cell];
    const uint32_t epoch = last >> kEpochShift;
    const uint32_t lane = last & kLaneBits;
    if (epoch <= base_ || read_known(by.clock, warp, epoch, lane)) continue;
    if (warp != by.clock.warp)
      throw Fault("race in shared memory: write over what warp " + std::to_string(warp) +
                      " may still be reading, no barrier between",
                  by.lane);
    if (lane == static_cast<uint32_t>(by.lane) || lane == kWholeWarp ||
        (lane == kSubwordLane && subword))
      continue;
    throw Fault(
        "race in shared memory: write over what another lane of the same warp may still be "
        "reading, no __syncwarp or barrier between",
        by.lane);
  }
}

bool SharedRaces::reads_settled(const Accessor& by, uint32_t begin, uint32_t end) const {
  const uint32_t later = (by.clock.settled + 1) << kEpochShift;
  bool settled = true;
  for (uint32_t chunk = begin / 4; chunk <= (end - 1) / 4; ++chunk)
    settled &= async_reads_[chunk].in_flight == 0;
  for (int warp = 0; warp < warps_; ++warp) {
    const uint32_t* reads = read_.data() + static_cast<size_t>(warp) * cells_;
    for (uint32_t cell = begin; cell < end; ++cell) settled &= reads[cell] < later;
  }
  return settled;
}

void SharedRaces::set_writer(const Accessor& by, uint32_t cell, uint32_t flags) {
  write_epoch_[cell] = by.clock.now();
  write_thread_[cell] = static_cast<uint16_t>((by.clock.warp * kLanes + by.lane) | flags);
  write_instruction_[cell] = by.instruction;
  write_fences_[cell] = by.clock.fences[by.clock.warp];
}

void SharedRaces::read(const Accessor& by, uint32_t offset, uint32_t bytes, Reader reader) {
  const bool subword = bytes < 4;
  const uint32_t lane = reader == Reader::kCollective ? kWholeWarp
                        : subword                     ? kSubwordLane
                                                      : static_cast<uint32_t>(by.lane);
  uint32_t* reads = read_.data() + static_cast<size_t>(by.clock.warp) * cells_;
  const uint32_t mine = by.clock.now() << kEpochShift;
  const uint32_t unsynced = (by.clock.synced() + 1) << kEpochShift;
  const uint32_t end = (offset + bytes + 3) / 4;
  for (uint32_t cell = offset / 4; cell < end; ++cell) {
    // Ordered and of this block, in one comparison.
    if (write_epoch_[cell] - base_ - 1 >= by.clock.settled - base_) {
      if (uninitialised_ && write_epoch_[cell] <= base_)
        throw Fault("uninitialised shared memory: load of what nobody in the block wrote", by.lane);
      check_writer(by, cell, subword, "load of");
    }
    const uint32_t last = reads[cell];
    const bool another_lane = last >= unsynced && (last & kLaneBits) != lane &&
                              lane != kWholeWarp && (last & kLaneBits) != kWholeWarp;
    reads[cell] = mine | (another_lane ? kSeveralLanes : lane);
  }
}

void SharedRaces::write(const Accessor& by, uint32_t offset, uint32_t bytes) {
  const bool subword = bytes < 4;
  const uint32_t end = (offset + bytes + 3) / 4;
  const bool settled = reads_settled(by, offset / 4, end);
  for (uint32_t cell = offset / 4; cell < end; ++cell) {
    if (write_epoch_[cell] > by.clock.settled) check_writer(by, cell, subword, "store over");
    if (!settled) check_readers(by, cell, subword);
    set_writer(by, cell, subword ? kSubword : 0);
  }
}

void SharedRaces::atomic(const Accessor& by, uint32_t offset, uint32_t bytes) {
  for (uint32_t cell = offset / 4; cell < (offset + bytes + 3) / 4; ++cell) {
    if (uninitialised_ && write_epoch_[cell] <= base_)
      throw Fault("uninitialised shared memory: atomic on what nobody in the block wrote", by.lane);
    if ((write_thread_[cell] & kAtomic) == 0 && write_epoch_[cell] > by.clock.settled)
      check_writer(by, cell, false, "atomic on");
    check_readers(by, cell, false);
    set_writer(by, cell, kAtomic);
  }
}

void SharedRaces::begin_copy(const Accessor& by, uint32_t offset, uint32_t bytes) {
  write(by, offset, bytes);
  for (uint32_t cell = offset / 4; cell < (offset + bytes + 3) / 4; ++cell)
    write_epoch_[cell] = kInFlight;
}

void SharedRaces::end_copy(const Accessor& by, uint32_t offset, uint32_t bytes) {
  for (uint32_t cell = offset / 4; cell < (offset + bytes + 3) / 4; ++cell) {
    write_epoch_[cell] = by.clock.now();
    write_fences_[cell] = by.clock.fences[by.clock.warp];
  }
}

void SharedRaces::begin_async_reads(const Accessor& by, const std::vector<uint32_t>& offsets) {
  // Of a write that was found to be in order; none yet.
  uint32_t epoch = kMbarrier - 1, warp = 0, fences = 0;
  for (uint32_t offset : offsets) {
    for (uint32_t cell = offset / 4; cell < offset / 4 + 4; ++cell) {
      const uint32_t writer = (write_thread_[cell] & kThread) / kLanes;
      if (write_epoch_[cell] == epoch && writer == warp && write_fences_[cell] == fences) continue;
      if (write_epoch_[cell] - base_ - 1 >= by.clock.settled - base_) {
        if (uninitialised_ && write_epoch_[cell] <= base_)
          throw Fault("uninitialised shared memory: wgmma of what nobody in the block wrote");
        check_writer(by, cell, false, "wgmma of");
      }
      check_proxy(by, cell);
      if (write_epoch_[cell] <= base_) continue;
      // Of all its warp's writes of that time: the same goes for the next cell.
      if (write_epoch_[cell] > by.clock.whole[writer] ||
          by.clock.fences[writer] <= write_fences_[cell])
        continue;
      epoch = write_epoch_[cell];
      warp = writer;
      fences = write_fences_[cell];
    }
    AsyncReads& reads = async_reads_[offset / 16];
    ++reads.in_flight;
    reads.instruction = by.instruction;
  }
}

void SharedRaces::begin_mbarrier(const Accessor& by, uint32_t offset) {
  write(by, offset, 8);
  for (uint32_t cell : {offset / 4, offset / 4 + 1}) write_epoch_[cell] = kMbarrier;
}

void SharedRaces::end_mbarrier(uint32_t offset) {
  for (uint32_t cell : {offset / 4, offset / 4 + 1}) write_epoch_[cell] = 0;
}

void SharedRaces::end_async_reads(const Accessor& by, const std::vector<uint32_t>& offsets) {
  uint32_t* reads = read_.data() + static_cast<size_t>(by.clock.warp) * cells_;
  const uint32_t mine = by.clock.now() << kEpochShift;
  for (uint32_t offset : offsets) {
    --async_reads_[offset / 16].in_flight;
    // If a lane read it in this epoch, that says more.
    for (uint32_t cell = offset / 4; cell < offset / 4 + 4; ++cell)
      if (reads[cell] < mine) reads[cell] = mine | kWholeWarp;
  }
}

}  // namespace ptxvm
