// SPDX-License-Identifier: BSD-3-Clause
//
// A tile of rows of 16-bit elements in shared memory: how it lies there, how it gets there, and how
// it is read as the operands of mma.m16n8k16.
//
// Note [swizzle]. A row is cut into chunks of 16 bytes. ldmatrix reads eight rows at the same
// column, cp.async writes a row's neighbouring chunks: neither may meet the same banks twice. So
// chunk c of row r lies at chunk c ^ (r mod 8) of its row, where rows fill 128 bytes or a multiple;
// at c ^ (r / 2 mod 4) where they fill 64 bytes more than that, at c ^ (r / 4 mod 2) where 32.
#pragma once

#include "elements.cuh"

namespace ring_attention::cuda {

// kDim: columns, 16 or a multiple of 32. All numbers a lane needs are of the form
// (lane's own number ^ constant) + constant.
template <int kDim>
struct TileLayout {
  static constexpr int kChunks = kDim / 8;
  // Chunks that the swizzle permutes.
  static constexpr int kGroup = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;
  static constexpr int kRowBytes = kDim * 2;
  static_assert(kDim % 32 == 0 || kDim == 16);

  static constexpr int bytes(int rows) { return rows * kRowBytes; }
  static RA_DEVICE int swizzle(int row) {
    return row >> (kGroup == 8 ? 0 : kGroup == 4 ? 1 : 2) & (kGroup - 1);
  }
  // Of chunk `chunk` of row `row`.
  static RA_DEVICE uint32_t offset(int row, int chunk) {
    return row * kRowBytes + (chunk / kGroup * kGroup + ((chunk ^ swizzle(row)) % kGroup)) * 16;
  }
  // From a chunk of the first group to that of its place in the group of chunk `chunk`.
  static constexpr RA_DEVICE uint32_t panel(int chunk) { return chunk / kGroup * kGroup * 16; }
  // From the offset of chunk 0 or 1 of a row to that of the chunk `chunks` (even) later.
  static RA_DEVICE uint32_t advance(uint32_t offset, int chunks) {
    return (offset ^ chunks % kGroup * 16) + chunks / kGroup * kGroup * 16;
  }
};

// ---- Operands. A lane's position in the first fragment is computed once; fragments are then a
// constant number of rows and columns away. The tile starts at a multiple of 128 bytes, a fragment
// at a multiple of 16 rows (8 for load_b's half fragments).

// A of A B, rows of A in shared memory: row-major, 16 rows x 16 columns.
template <int kDim>
struct RowOperand {
  uint32_t lane;  // address

  RA_DEVICE RowOperand(uint32_t tile, int first_row) {
    const int l = threadIdx.x % 32;
    lane = tile + TileLayout<kDim>::offset(first_row + l % 16, l / 16);
  }
  RA_DEVICE void load(uint32_t (&a)[4], int row, int column) const {
    ldmatrix_x4(a, TileLayout<kDim>::advance(lane, column / 8) + row * TileLayout<kDim>::kRowBytes);
  }
};

// B of A B^T: rows of B in shared memory, 16 rows x 16 columns: b[0], b[1] are the fragment of
// the first eight rows, b[2], b[3] of the others.
template <int kDim>
struct TransposedOperand {
  uint32_t lane;

  RA_DEVICE explicit TransposedOperand(uint32_t tile, int first_row = 0) {
    const int l = threadIdx.x % 32;
    lane = tile + TileLayout<kDim>::offset(first_row + l / 16 * 8 + l % 8, l / 8 % 2);
  }
  RA_DEVICE void load(uint32_t (&b)[4], int row, int column) const {
    ldmatrix_x4(b, TileLayout<kDim>::advance(lane, column / 8) + row * TileLayout<kDim>::kRowBytes);
  }
};

// B of A B: rows of B in shared memory, 16 rows x 16 columns: b[0], b[1] are the fragment of the
// first eight columns, b[2], b[3] of the others.
template <int kDim>
struct ColumnOperand {
  uint32_t lane;

  RA_DEVICE explicit ColumnOperand(uint32_t tile, int first_row = 0, int first_column = 0) {
    const int l = threadIdx.x % 32;
    lane = tile + TileLayout<kDim>::offset(first_row + l % 16, first_column / 8 + l / 16);
  }
  RA_DEVICE void load(uint32_t (&b)[4], int row, int column) const {
    ldmatrix_x4_trans(
        b, TileLayout<kDim>::advance(lane, column / 8) + row * TileLayout<kDim>::kRowBytes);
  }
};

// ---- Copies, of rows that lie on 16 bytes: launchers see to that.

// How kThreads threads with successive numbers share the copy of a tile: 128 or 64 neighbouring
// bytes of a row are copied together, and a thread's rows are a multiple of eight apart, so that
// its swizzle is one number.
template <typename Layout, int kThreads>
struct TileCopy {
  static constexpr int kStep = kThreads / Layout::kGroup;  // rows at a time
  static_assert(kStep % 8 == 0);

  static RA_DEVICE int row() { return threadIdx.x % kThreads / Layout::kGroup; }
  static RA_DEVICE int chunk() { return threadIdx.x % Layout::kGroup; }

  // Rows [0, kRows) from source(row), null for a row of zeros; the source is asked once per row
  // and thread. dim: columns there are, the others become zeros. A part of the cp.async group in
  // hand.
  template <int kRows, typename Source>
  static RA_DEVICE void run(uint32_t tile, int dim, const Source& source) {
    const uint32_t to = tile + Layout::offset(row(), chunk());
#pragma unroll
    for (int r = 0; r < kRows; r += kStep) {
      if (kRows % kStep != 0 && r + row() >= kRows) break;
      const char* from = source(r + row());
#pragma unroll
      for (int c = 0; c < Layout::kChunks; c += Layout::kGroup) {
        const bool there = from != nullptr && (c + chunk()) * 8 < dim;
        cp_async_16(to + r * Layout::kRowBytes + Layout::panel(c), from + (c + chunk()) * 16,
                    there ? 16 : 0);
      }
    }
  }

  // Rows [begin, end) of a matrix as rows [begin - from, end - from) of the tile, zeros around
  // them. stride: of rows, in bytes; the address steps from row to row.
  template <int kRows>
  static RA_DEVICE void rows(uint32_t tile, const char* data, int64_t stride, int from, int begin,
                             int end, int dim) {
    const uint32_t to = tile + Layout::offset(row(), chunk());
    const int first = from + row() - begin, count = end - begin;
    const char* at = data + (from + row()) * stride + chunk() * 16;
#pragma unroll
    for (int r = 0; r < kRows; r += kStep, at += kStep * stride) {
      if (kRows % kStep != 0 && r + row() >= kRows) break;
      const bool there = static_cast<unsigned>(first + r) < static_cast<unsigned>(count);
#pragma unroll
      for (int c = 0; c < Layout::kChunks; c += Layout::kGroup) {
        const int bytes = there && (c + chunk()) * 8 < dim ? 16 : 0;
        cp_async_16(to + r * Layout::kRowBytes + Layout::panel(c), at + c * 16, bytes);
      }
    }
  }
};

}  // namespace ring_attention::cuda
