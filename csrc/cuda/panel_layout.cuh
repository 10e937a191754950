// SPDX-License-Identifier: BSD-3-Clause
//
// A tile of rows of 16-bit elements in shared memory as wgmma reads it: its columns are cut into
// panels of 64 (or 32, where the tile has no whole 64s), each panel's rows lie one after the other,
// and chunks of 16 bytes are swizzled within a row, see Note [swizzle]. The swizzle is one of the
// hardware's, of 128 or 64 bytes; it counts from addresses, so that a tile begins at a multiple of
// 1,024 bytes.
#pragma once

#include "ptx.cuh"

namespace ring_attention::cuda {

template <int kDim, int kRows>
struct PanelLayout {
  static constexpr int kColumns = kDim % 64 == 0 ? 64 : 32;  // of a panel
  static constexpr int kChunks = kDim / 8;
  static constexpr int kGroup = kColumns / 8;  // chunks of a row in a panel
  static constexpr int kRowBytes = kColumns * 2, kPanelBytes = kRows * kRowBytes;
  static constexpr int kBytes = kDim / kColumns * kPanelBytes;
  static_assert(kDim % 32 == 0 && kRows % 16 == 0);

  static RA_DEVICE int swizzle(int row) { return row >> (kGroup == 8 ? 0 : 1) & (kGroup - 1); }
  // Of chunk `chunk` of row `row`.
  static RA_DEVICE uint32_t offset(int row, int chunk) {
    return panel(chunk) + row * kRowBytes + (chunk ^ swizzle(row)) % kGroup * 16;
  }
  // From a chunk of the first panel to that of its place in the panel of chunk `chunk`.
  static constexpr RA_DEVICE uint32_t panel(int chunk) { return chunk / kGroup * kPanelBytes; }

  // Zeros for every `step`-th chunk of a row, from `first` on.
  static RA_DEVICE void clear(uint32_t tile, int row, int first = 0, int step = 1) {
#pragma unroll 1
    for (int chunk = first; chunk < kChunks; chunk += step) {
      store_shared(tile + offset(row, chunk), make_uint4(0, 0, 0, 0));
    }
  }

  // ---- Descriptors of operands, PTX's "matrix descriptor": address, the strides that its major
  // order asks for (panel to panel, eight rows to eight rows), and the swizzle. All in 16 bytes.

  static RA_DEVICE uint64_t descriptor(uint32_t tile) {
    constexpr uint64_t kSwizzle = kGroup == 8 ? 1 : 2;
    constexpr uint64_t kStrides =
        kSwizzle << 62 | uint64_t{8 * kRowBytes / 16} << 32 | uint64_t{kPanelBytes / 16} << 16;
    return kStrides | (tile & 0x3ffff) >> 4;
  }
  // A step to rows from `row` (a multiple of 8, of 16 in panels of 32), columns from `column` (a
  // multiple of 16; of a panel, for products by the tile's columns).
  static constexpr RA_DEVICE uint64_t step(int row, int column) {
    return (row * kRowBytes + panel(column / 8) + column % kColumns * 2) / 16;
  }
};

}  // namespace ring_attention::cuda
