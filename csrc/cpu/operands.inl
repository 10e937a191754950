// SPDX-License-Identifier: BSD-3-Clause
//
// From rows of tensors to the operands of multiply(). With rows X [n, dim]:
//   copy_rows        X as A (or as B where a unit is one element): rows as they are, widened
//   interleave_lanes X as B: units pair two neighbouring rows where a unit is a pair
//   transpose_rows   X^T as B: lanes run along the rows
//   interleave_rows  X^T as A, with kPair the same pairs
// Rows come as pointers; a null pointer is a row of zeros.
#pragma once

#include "matmul.inl"

namespace ring_attention::cpu {
namespace {

// Whether rows are units where they lie.
template <typename Arch>
constexpr bool kInPlace = sizeof(typename Arch::Elem) * Arch::kPair == sizeof(typename Arch::Unit);

// One row of elements as units, zero padded to `units`.
template <typename Arch>
RA_INLINE void copy_row(const typename Arch::Elem* row, int64_t dim, int64_t units,
                        typename Arch::Unit* to) {
  if (row == nullptr) {
    std::memset(to, 0, units * sizeof *to);
  } else if constexpr (Arch::kPair == 1) {
    constexpr int kLanes = Arch::V::kLanes;
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) Arch::V::load(row + d).store(to + d);
    for (; d < dim; ++d) to[d] = widen(row[d]);
    for (; d < units; ++d) to[d] = 0;
  } else {
    std::memcpy(to, row, dim * sizeof *row);
    std::memset(to + dim / 2, 0, (units - dim / 2) * sizeof *to);
  }
}

template <typename Arch>
void copy_rows(const typename Arch::Elem* const* rows, int64_t count, int64_t dim, int64_t units,
               typename Arch::Unit* to, int64_t to_row) {
  for (int64_t j = 0; j < count; ++j) copy_row<Arch>(rows[j], dim, units, to + j * to_row);
}

// to [count / kPair][width]; count is a multiple of kPair.
template <typename Arch>
void interleave_rows(const typename Arch::Elem* const* rows, int64_t count, int64_t dim,
                     int64_t width, typename Arch::Unit* to) {
  if constexpr (Arch::kPair == 1) {
    copy_rows<Arch>(rows, count, dim, width, to, width);
  } else {
    for (int64_t j = 0; j < count; j += 2, to += width) {
      Arch::interleave(rows[j], rows[j + 1], dim, to);
      std::memset(to + dim, 0, (width - dim) * sizeof *to);
    }
  }
}

// The same as lanes in blocks; to has room for dim rounded up to kLaneBlock.
template <typename Arch>
Lanes<typename Arch::Unit> interleave_lanes(const typename Arch::Elem* const* rows, int64_t count,
                                            int64_t dim, typename Arch::Unit* to) {
  const auto part = [](const typename Arch::Elem* row, int64_t d) {
    return row == nullptr ? nullptr : row + d;
  };
  const Lanes<typename Arch::Unit> lanes = {to, kLaneBlock, count / Arch::kPair * kLaneBlock};
  for (int64_t d = 0; d < dim; d += kLaneBlock) {
    const int64_t wanted = std::min(dim - d, kLaneBlock);
    const int64_t width = round_up(wanted, Arch::kWidthStep);
    for (int64_t j = 0; j < count; j += Arch::kPair) {
      typename Arch::Unit* row = to + d / kLaneBlock * lanes.block + j / Arch::kPair * lanes.row;
      if constexpr (Arch::kPair == 1) {
        copy_row<Arch>(part(rows[j], d), wanted, width, row);
      } else {
        Arch::interleave(part(rows[j], d), part(rows[j + 1], d), wanted, row);
        std::memset(row + wanted, 0, (width - wanted) * sizeof *row);
      }
    }
  }
  return lanes;
}

// The distance between rows, 0 where it varies or rows are missing.
template <typename Elem>
int64_t spacing(const Elem* const* rows, int64_t count) {
  if (rows[0] == nullptr || rows[1] == nullptr) return 0;
  const int64_t distance = rows[1] - rows[0];
  for (int64_t j = 2; j < count; ++j) {
    if (rows[j] != rows[0] + j * distance) return 0;
  }
  return distance;
}

// to [units][to_row], with room for units rounded up to kLanes; count is a multiple of kLanes.
template <typename Arch>
void transpose_rows(const typename Arch::Elem* const* rows, int64_t count, int64_t dim,
                    int64_t units, typename Arch::Unit* to, int64_t to_row) {
  using Unit = typename Arch::Unit;
  constexpr int kLanes = Arch::V::kLanes;
  alignas(64) Unit copy[kLanes * (kMaxHeadDim + 2 * kLanes)];
  const int64_t padded = round_up(units, kLanes);
  for (int64_t j = 0; j < count; j += kLanes) {
    if constexpr (kInPlace<Arch>) {
      const int64_t row = spacing(rows + j, kLanes);
      if (row > 0 && row % Arch::kPair == 0 && padded * Arch::kPair == dim) {
        const auto* from = reinterpret_cast<const Unit*>(rows[j]);
        for (int64_t d = 0; d < padded; d += kLanes) {
          Arch::transpose(from + d, row / Arch::kPair, to + d * to_row + j, to_row);
        }
        continue;
      }
    }
    copy_rows<Arch>(rows + j, kLanes, dim, padded, copy, padded);
    for (int64_t d = 0; d < padded; d += kLanes) {
      Arch::transpose(copy + d, padded, to + d * to_row + j, to_row);
    }
  }
}

// out = factor row, rounded.
template <typename Arch>
void scale_row(const typename Arch::State* row, int64_t dim, typename Arch::State factor,
               typename Arch::Elem* out) {
  using V = typename Arch::V;
  int64_t d = 0;
  for (; d + V::kLanes <= dim; d += V::kLanes) {
    (V::load(row + d) * V::set(factor)).store(out + d);
  }
  for (; d < dim; ++d) narrow(row[d] * factor, out[d]);
}

// to += factor row.
template <typename V>
void add_row(const typename V::Scalar* row, int64_t dim, typename V::Scalar factor,
             typename V::Scalar* to) {
  int64_t d = 0;
  for (; d + V::kLanes <= dim; d += V::kLanes) {
    fma(V::load(row + d), V::set(factor), V::load(to + d)).store(to + d);
  }
  for (; d < dim; ++d) to[d] += factor * row[d];
}

// Rows this many bytes apart share few cache sets and a page each: they are copied first.
constexpr int64_t kFarRow = 2048;

// The keys [begin, begin + count) of a block as a kernel wants them; count is padded to kKeyStep.
// Rows of V (or K) that the tile does not see are not read, or taken as zero, wherever a product
// sums over keys, because 0 NaN is NaN: so padding and buffer tails never spread.
template <typename Arch>
struct KeyBlock {
  using Elem = typename Arch::Elem;
  using Unit = typename Arch::Unit;
  static constexpr int kPair = Arch::kPair;

  int64_t count, padded;
  const Elem* rows[Arch::kMaxKeyBlock];

  // Keys are seen within [seen_begin, seen_end), but for those marked unseen, where not null.
  void set(const Elem* data, int64_t stride, int64_t keys, int64_t seen_begin, int64_t seen_end,
           const bool* unseen) {
    count = keys;
    padded = round_up(keys, Arch::kKeyStep);
    near_ = stride * static_cast<int64_t>(sizeof(Elem)) < kFarRow;
    holes_ = unseen != nullptr;
    base_ = data;
    stride_ = stride;
    for (int64_t j = 0; j < padded; ++j) {
      const bool seen = seen_begin <= j && j < seen_end && !(unseen && unseen[j]);
      rows[j] = seen && j < count ? data + j * stride : nullptr;
    }
  }

  // X as A, [padded][depth]; scores of unseen keys are masked, whatever they are.
  Operand<Unit> as_rows(int64_t dim, Unit* copy) const {
    if constexpr (kInPlace<Arch>) {
      if (near_ && count == padded && dim % Arch::kDepthStep == 0 && stride_ % kPair == 0) {
        return {reinterpret_cast<const Unit*>(base_), stride_ / kPair, 1};
      }
    }
    const int64_t units = round_up(dim, Arch::kDepthStep) / kPair;
    copy_rows<Arch>(rows, padded, dim, units, copy, units);
    return {copy, units, 1};
  }

  // X^T as A, [depth][padded / kPair].
  Operand<Unit> as_columns(int64_t dim, Unit* copy, Unit* transposed) const {
    const int64_t width = round_up(dim, Arch::kWidthStep);
    if constexpr (kInPlace<Arch> && kPair == 1) {
      if (near_ && !holes_) return {base_, 1, stride_};
    }
    interleave_rows<Arch>(rows, padded, dim, width, copy);
    if constexpr (!Arch::kTransposeColumns) {
      return {copy, 1, width};
    } else {
      const int64_t units = padded / kPair;
      for (int64_t j = 0; j < units; j += Arch::V::kLanes) {
        for (int64_t d = 0; d < width; d += Arch::V::kLanes) {
          Arch::transpose(copy + j * width + d, width, transposed + d * units + j, units);
        }
      }
      return {transposed, units, 1};
    }
  }

 private:
  const Elem* base_;
  int64_t stride_;
  bool near_, holes_;
};

}  // namespace
}  // namespace ring_attention::cpu
