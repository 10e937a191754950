// SPDX-License-Identifier: BSD-3-Clause
//
// The one matrix product of the kernels, C (+)= A B, held in registers:
//   for each tile of rows x lanes:  for k:  load the lanes of B, broadcast each row of A, multiply
// A is read by broadcasts, so it needs no packing and may be strided either way; B's and C's lanes
// are contiguous. Operands are in units: what one broadcast takes, an element or (for dot product
// instructions) a pair of 16-bit elements that are neighbours in k.
#pragma once

#include "elements.h"
#include "problem.h"

namespace ring_attention::cpu {
namespace {

// Note [Arch]. What the algorithms know of an ISA and element type:
//   Elem, State (what is summed), Unit, kPair (elements per unit), V
//   kKeyStep, kDepthStep, kWidthStep   multiples that products want of keys, depth and lanes
//   kStripe, kKeyBlock, kTilePanels, panel_rows(head_dim), with_register_tiles   tile shapes
//   kExpTerms, kTransposeColumns, Session (held while a task runs)
//   load_lanes, broadcast, multiply_add   the three steps of a product
//   transpose, interleave, store_lanes, store_rows   operands, and results as operands
// This is the part that all fused multiply-add rows share: units are widened elements.
template <typename Element, typename Vector>
struct MultiplyAdd {
  using Elem = Element;
  using State = StateOf<Elem>;
  using Unit = State;
  using V = Vector;
  static constexpr int kPair = 1, kKeyStep = 1, kDepthStep = 1, kWidthStep = V::kLanes;
  static constexpr int kExpTerms = sizeof(Elem) == 2 ? 4 : 6;
  static constexpr bool kTransposeColumns = false, kOwnProduct = false;
  struct Session {};

  // Pinned: a compiler that folds the load back into every multiply-add is bound by loads.
  static RA_INLINE V load_lanes(const Unit* from) {
    V lanes = V::load(from);
    pin(lanes);
    return lanes;
  }
  static RA_INLINE V broadcast(const Unit* from) { return V::set(*from); }
  static RA_INLINE V multiply_add(V a, V b, V c) { return fma(a, b, c); }
  static RA_INLINE void transpose(const Unit* from, int64_t from_row, Unit* to, int64_t to_row) {
    transpose_block(from, from_row, to, to_row, V{});
  }
  static RA_INLINE void store_lanes(const V (&x)[1], Unit* to) { x[0].store(to); }
  static RA_INLINE void store_rows(const V (&x)[1], Unit* to, int64_t key, int64_t lane,
                                   int64_t panel) {
    x[0].store(to + key * panel + lane);
  }
};

// A: element (i, k) at data[i * row + k * unit].
template <typename Unit>
struct Operand {
  const Unit* data;
  int64_t row, unit;

  Operand at(int64_t i, int64_t k) const { return {data + i * row + k * unit, row, unit}; }
};

// C[kRows][kVecs * kLanes]; the tile's shape is all that is a type here.
template <typename Arch, int kRows, int kVecs>
RA_INLINE void multiply_tile(int64_t units, Operand<typename Arch::Unit> a,
                             const typename Arch::Unit* b, int64_t b_row, typename Arch::State* c,
                             int64_t c_row, bool accumulate) {
  using V = typename Arch::V;
  constexpr int kLanes = V::kLanes;
  V sum[kRows][kVecs];
#pragma GCC unroll 32
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) sum[i][v] = V::zero();
  }
  const typename Arch::Unit* left = a.data;
#pragma GCC unroll 2
  for (int64_t k = 0; k < units; ++k) {
    V lanes[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) lanes[v] = Arch::load_lanes(b + v * kLanes);
#pragma GCC unroll 32
    for (int i = 0; i < kRows; ++i) {
      const V row = Arch::broadcast(left + i * a.row);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sum[i][v] = Arch::multiply_add(row, lanes[v], sum[i][v]);
    }
    left += a.unit;
    b += b_row;
  }
#pragma GCC unroll 32
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      typename Arch::State* to = c + i * c_row + v * kLanes;
      (accumulate ? sum[i][v] + V::load(to) : sum[i][v]).store(to);
    }
  }
}

// One column of tiles, kVecs vectors wide: as many rows at a time as fit, then the rest.
template <typename Arch, int kRows, int kVecs>
RA_INLINE void multiply_column(int64_t rows, int64_t units, Operand<typename Arch::Unit> a,
                               const typename Arch::Unit* b, int64_t b_row, typename Arch::State* c,
                               int64_t c_row, bool accumulate) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    multiply_tile<Arch, kRows, kVecs>(units, a.at(i, 0), b, b_row, c + i * c_row, c_row,
                                      accumulate);
  }
  if constexpr (kRows > 4) {
    for (; i + 4 <= rows; i += 4) {
      multiply_tile<Arch, 4, kVecs>(units, a.at(i, 0), b, b_row, c + i * c_row, c_row, accumulate);
    }
  }
  for (; i + 2 <= rows; i += 2) {
    multiply_tile<Arch, 2, kVecs>(units, a.at(i, 0), b, b_row, c + i * c_row, c_row, accumulate);
  }
  if (i < rows) {
    multiply_tile<Arch, 1, kVecs>(units, a.at(i, 0), b, b_row, c + i * c_row, c_row, accumulate);
  }
}

// C[rows][width] (+)= A[rows][units] B[units][width]; width is a multiple of kLanes.
template <typename Arch>
__attribute__((noinline)) void multiply(int64_t rows, int64_t width, int64_t units,
                                        Operand<typename Arch::Unit> a,
                                        const typename Arch::Unit* b, int64_t b_row,
                                        typename Arch::State* c, int64_t c_row, bool accumulate) {
  if constexpr (Arch::kOwnProduct) {
    Arch::product(rows, width, units, a, b, b_row, c, c_row, accumulate);
  } else {
    constexpr int kLanes = Arch::V::kLanes;
    int64_t j = 0;
    const auto column = [&]<int kRows, int kVecs>() {
      for (; j + kVecs * kLanes <= width; j += kVecs * kLanes) {
        multiply_column<Arch, kRows, kVecs>(rows, units, a, b + j, b_row, c + j, c_row, accumulate);
      }
    };
    Arch::with_register_tiles(column);
  }
}

}  // namespace
}  // namespace ring_attention::cpu
