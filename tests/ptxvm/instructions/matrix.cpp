// SPDX-License-Identifier: BSD-3-Clause
//
// mma.sync, ldmatrix, stmatrix: lanes and registers as in the tables of the PTX manual. In all of
// them lane 4 g + t holds row g (of 8) and columns 2 t and 2 t + 1.
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <algorithm>

#include "../block.h"
#include "../launch.h"
#include "../memory_access.h"
#include "handlers.h"
//
#include "../columns.h"

namespace ptxvm {
namespace {

// A register of 16-bit pairs is an 8 x 8 matrix, row by row.
template <typename T>
void unpack(Row<uint32_t> pairs, float (*matrix)[8]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t pair = pairs[lane];
    matrix[lane / 4][lane % 4 * 2] = to_float(T{static_cast<uint16_t>(pair)});
    matrix[lane / 4][lane % 4 * 2 + 1] = to_float(T{static_cast<uint16_t>(pair >> 16)});
  }
}

// D = A B + C with A [16, K], B [K, 8]. Sums are of float; the device's own order is not known.
// arg: D (4), A (K / 4), B (K / 8), C (4).
template <typename T, int K>
Flow run_mma(Warp& warp, const Instruction& in, LaneMask lanes) {
  warp.require_whole_warp(lanes, "mma.sync");
  constexpr int kA = 4, kB = kA + K / 4, kC = kB + K / 8;
  alignas(32) float a[K / 8][16][8], b[K][8], c[16][8], columns[8][8];
  for (int i = 0; i < K / 4; ++i)
    unpack<T>(warp.load<uint32_t>(in.arg[kA + i]), a[i / 2] + 8 * (i % 2));
  for (int i = 0; i < K / 8; ++i) {
    unpack<T>(warp.load<uint32_t>(in.arg[kB + i]), columns);
    for (int k = 0; k < 8; ++k)
      for (int n = 0; n < 8; ++n) b[8 * i + k][n] = columns[n][k];
  }
  for (int i = 0; i < 4; ++i) {
    const Row<float> values = warp.load<float>(in.arg[kC + i]);
    for (int lane = 0; lane < kLanes; ++lane)
      c[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2] = values[lane];
  }
  const auto row = [](float (&from)[8]) -> Columns& { return reinterpret_cast<Columns&>(from); };
  for (int half = 0; half < 16; half += 8) {
    Columns sum[8];
    for (int r = 0; r < 8; ++r) sum[r] = row(c[half + r]);
    for (int k = 0; k < K; ++k)
      for (int r = 0; r < 8; ++r)
        sum[r] = multiply_add(a[k / 8][half + r][k % 8], row(b[k]), sum[r]);
    for (int r = 0; r < 8; ++r) row(c[half + r]) = sum[r];
  }
  for (int i = 0; i < 4; ++i) {
    Lanes<float> values;
    for (int lane = 0; lane < kLanes; ++lane)
      values[lane] = c[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2];
    warp.store(in.arg[i], lanes, values);
  }
  ++warp.block.launch.statistics.mma;
  return Flow::kNext;
}

bool mma(Decoder& d) {
  const int k = d.has("m16n8k16") ? 16 : d.has("m16n8k8") ? 8 : 0;
  if (k == 0 || !d.has("row") || !d.has("col")) return false;
  // The types of D, A, B, C.
  const Type f32{Kind::kFloat, 32}, a = d.type(2);
  if (d.type(3) != f32 || d.type(0) != f32 || d.type(1) != a || a.packed) return false;
  size_t slot = 0;
  const auto add = [&](const std::vector<uint32_t>& rows, int expected) {
    if (static_cast<int>(rows.size()) != expected) d.unsupported("count of registers");
    for (uint32_t row : rows) d.instruction.arg[slot++] = row;
  };
  add(d.destinations(0), 4);
  add(d.sources(1), k / 4);
  add(d.sources(2), k / 8);
  add(d.sources(3), 4);
  if (a.kind == Kind::kHalf)
    d.instruction.run = k == 16 ? run_mma<Half, 16> : run_mma<Half, 8>;
  else if (a.kind == Kind::kBFloat16)
    d.instruction.run = k == 16 ? run_mma<BFloat16, 16> : run_mma<BFloat16, 8>;
  else
    return false;
  return true;
}

// Lane 8 i + r has the address of row r of matrix i.
struct MatrixRows {
  uint32_t address[4][8];
};

MatrixRows matrix_rows(Warp& warp, const Instruction& in, size_t slot) {
  const Lanes<uint64_t> address = addresses(warp, in, slot);
  MatrixRows rows;
  for (int i = 0; i < in.elements; ++i)
    for (int r = 0; r < 8; ++r)
      rows.address[i][r] = shared_address(warp, address[8 * i + r], 16, 8 * i + r);
  count_passes(warp, address, in.elements == 4 ? kAllLanes : (1u << 8 * in.elements) - 1, 16);
  return rows;
}

// arg: destinations, address; elements: matrices.
template <bool kTransposed>
Flow run_ldmatrix(Warp& warp, const Instruction& in, LaneMask lanes) {
  warp.require_whole_warp(lanes, "ldmatrix");
  const MatrixRows rows = matrix_rows(warp, in, in.elements);
  const int wrong = warp.block.launch.checks.wrong_ldmatrix;
  const bool transposed = kTransposed != (wrong == 1);
  const bool races = warp.block.launch.checks.races;
  SharedRaces::Reads reads(warp.block.races, warp.clock, warp.pc());
  for (int i = 0; i < in.elements; ++i) {
    uint16_t matrix[8][8];
    for (int r = 0; r < 8; ++r) {
      const uint32_t at = rows.address[i][r];
      if (races) reads.row(8 * i + r, at - kSharedBegin);
      std::memcpy(matrix[r], warp.block.shared(at), 16);
    }
    Lanes<uint32_t> values;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int r = lane / 4, c = lane % 4 * 2;
      const uint32_t low = transposed ? matrix[c][r] : matrix[r][c];
      const uint32_t high = transposed ? matrix[c + 1][r] : matrix[r][c + 1];
      values[lane] = high << 16 | low;
    }
    const bool swapped = wrong == 2 && in.elements == 4 && (i == 1 || i == 2);
    warp.store(in.arg[swapped ? 3 - i : i], lanes, values);
  }
  ++warp.block.launch.statistics.ldmatrix;
  return Flow::kNext;
}

// arg: address, sources.
template <bool kTransposed>
Flow run_stmatrix(Warp& warp, const Instruction& in, LaneMask lanes) {
  warp.require_whole_warp(lanes, "stmatrix");
  const MatrixRows rows = matrix_rows(warp, in, 0);
  for (int i = 0; i < in.elements; ++i) {
    const auto values = warp.load<uint32_t>(in.arg[1 + i]);
    uint16_t matrix[8][8];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int r = lane / 4, c = lane % 4 * 2;
      (kTransposed ? matrix[c][r] : matrix[r][c]) = static_cast<uint16_t>(values[lane]);
      (kTransposed ? matrix[c + 1][r] : matrix[r][c + 1]) =
          static_cast<uint16_t>(values[lane] >> 16);
    }
    for (int r = 0; r < 8; ++r) {
      const uint32_t at = rows.address[i][r];
      if (warp.block.launch.checks.races)
        warp.block.races.write(warp.accessor(8 * i + r), at - kSharedBegin, 16);
      std::memcpy(warp.block.shared(at), matrix[r], 16);
    }
  }
  return Flow::kNext;
}

bool matrices(Decoder& d, size_t registers_operand, size_t address_operand) {
  if (!d.has("m8n8") || !d.has("b16")) return false;
  const size_t count = d.has("x4") ? 4 : d.has("x2") ? 2 : 1;
  const bool load = registers_operand == 0;
  const std::vector<uint32_t> rows = load ? d.destinations(0) : d.sources(registers_operand);
  if (rows.size() != count) d.unsupported("count of registers");
  d.instruction.elements = static_cast<uint8_t>(count);
  std::copy(rows.begin(), rows.end(), d.instruction.arg.begin() + (load ? 0 : 1));
  d.address(address_operand, load ? count : 0);
  const bool transposed = d.has("trans");
  if (load)
    d.instruction.run = transposed ? run_ldmatrix<true> : run_ldmatrix<false>;
  else
    d.instruction.run = transposed ? run_stmatrix<true> : run_stmatrix<false>;
  return true;
}

bool ldmatrix(Decoder& d) { return matrices(d, 0, 1); }

bool stmatrix(Decoder& d) { return matrices(d, 1, 0); }

}  // namespace

void add_matrix(Opcodes& opcodes) {
  opcodes["mma"].push_back(mma);
  opcodes["ldmatrix"].push_back(ldmatrix);
  opcodes["stmatrix"].push_back(stmatrix);
}

}  // namespace ptxvm
