// SPDX-License-Identifier: BSD-3-Clause
//
// What the warps of a Hopper kernel are for. A warpgroup is four warps: they multiply 64 rows
// together. Some of a block read and multiply what one more, after them, loads.
#pragma once

namespace ring_attention::cuda::sm90 {

constexpr int kMostSmemBytes = 227 * 1024;  // one block may ask for
constexpr int kMostRegisters = 64 * 1024;   // of a multiprocessor

struct WarpRoles {
  int readers, threads;  // threads that read, and all
  // Registers of a thread, in eights: all begin with as many, then loaders give some to readers.
  int loader_registers, reader_registers;

  static constexpr int kLoaders = 64;  // half of the loading warpgroup, for one of two tensors

  static constexpr WarpRoles of(int rows) {
    // Registers, 64 thousand, are enough for three warpgroups beside the loaders.
    if (rows % 64 != 0 || rows > 192) throw "rows are 64, 128 or 192";
    const int groups = rows / 64, threads = (groups + 1) * 128;
    const int registers = kMostRegisters / threads / 8 * 8, loader = groups == 2 ? 40 : 32;
    return {.readers = groups * 128,
            .threads = threads,
            .loader_registers = loader,
            .reader_registers = (registers * (groups + 1) - loader) / groups / 8 * 8};
  }
};

}  // namespace ring_attention::cuda::sm90
