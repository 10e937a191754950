// SPDX-License-Identifier: BSD-3-Clause
//
// Note [split keys]: a forward with few query rows (decoding, short chunks) has few tasks. Its keys
// are cut into parts, by shape; each part is folded into a state of its own, all at once, and the
// states are combined in order.
#pragma once

#include <limits>
#include <vector>

#include "kernels.h"
#include "problem.h"

namespace ring_attention::cpu {

class KeyParts {
 public:
  // How many parts the keys are good for.
  static int64_t most(const ForwardParams& p, int64_t key_block) {
    return std::max<int64_t>(keys_of(p, key_block) / kLeastKeys, 1);
  }

  // Keys are counted over all blocks, each padded to key_block. `tasks` is what a part amounts to.
  KeyParts(const ForwardParams& p, int64_t key_block, int64_t tasks)
      : whole_(p), rows_(p.batch * p.heads * p.q_len) {
    const int64_t keys = keys_of(p, key_block);
    const int64_t wanted = tasks < kFewTasks ? kManyTasks / tasks : 1;
    const int64_t parts = std::min(most(p, key_block), wanted);
    part_ = round_up(divide_up(keys, parts), key_block);
    // Rounding up may leave nothing for the last ones.
    const int64_t filled = part_ == 0 ? 1 : divide_up(keys, part_);
    parts_.assign(static_cast<size_t>(filled), p);
    if (count() > 1) give_states();
  }

  int64_t count() const { return static_cast<int64_t>(parts_.size()); }
  const ForwardParams& params(int64_t part) const { return parts_[static_cast<size_t>(part)]; }
  int64_t begin(int64_t part) const { return part * part_; }
  int64_t end(int64_t part) const {
    return part + 1 < count() ? (part + 1) * part_ : std::numeric_limits<int64_t>::max() / 2;
  }

  // After all parts are folded: the state or the output of the whole.
  void combine(const Parallel& parallel) {
    if (count() == 1) return;
    const ForwardParams& all = params(0);
    parallel(divide_up(rows_, kRowsPerTask), [&](int64_t task) {
      const int64_t first = task * kRowsPerTask;
      for (int64_t i = 1; i < count(); ++i) {
        combine_rows(all, params(i), first, std::min(kRowsPerTask, rows_ - first));
      }
    });
    if (whole_.last) finish(all, parallel);
  }

 private:
  static constexpr int64_t kFewTasks = 16, kManyTasks = 32, kLeastKeys = 1024;
  static constexpr int64_t kRowsPerTask = 64;

  static int64_t keys_of(const ForwardParams& p, int64_t key_block) {
    int64_t keys = 0;
    for (int64_t i = 0; i < p.num_blocks; ++i) keys += round_up(p.blocks[i].k_len, key_block);
    return keys;
  }

  int64_t state_bytes() const { return whole_.dtype == DType::kFloat64 ? 8 : 4; }

  void combine_rows(const ForwardParams& to, const ForwardParams& from, int64_t first,
                    int64_t count) const {
    const auto at = [&](void* data, int64_t width) {
      return static_cast<char*>(data) + first * width * state_bytes();
    };
    const DType state = whole_.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    const int64_t dim = whole_.v_head_dim;
    const Parallel here = {.threads = 1, .run = [](int64_t tasks, auto* body, void* context) {
                             for (int64_t task = 0; task < tasks; ++task) body(context, task);
                           }};
    cpu::combine(state, count, dim, at(to.acc, dim), at(to.m, 1), at(to.l, 1), at(from.acc, dim),
                 at(from.m, 1), at(from.l, 1), here);
  }

  // The first part carries on from the caller's state or sinks, the others start empty. The
  // caller's state is written only where it is the result.
  void give_states() {
    const int64_t part_bytes = rows_ * (whole_.v_head_dim + 2) * state_bytes();
    states_.resize(static_cast<size_t>(part_bytes * count()));
    for (int64_t i = 0; i < count(); ++i) {
      ForwardParams& part = parts_[static_cast<size_t>(i)];
      part.last = false;
      if (i > 0) part.first = true, part.sinks = nullptr;
      if (i == 0 && !whole_.last) continue;
      char* memory = states_.data() + i * part_bytes;
      part.acc = memory;
      part.m = memory + rows_ * whole_.v_head_dim * state_bytes();
      part.l = memory + rows_ * (whole_.v_head_dim + 1) * state_bytes();
      if (part.first) continue;
      std::memcpy(part.acc, whole_.acc, rows_ * whole_.v_head_dim * state_bytes());
      std::memcpy(part.m, whole_.m, rows_ * state_bytes());
      std::memcpy(part.l, whole_.l, rows_ * state_bytes());
    }
  }

  const ForwardParams& whole_;
  const int64_t rows_;
  int64_t part_ = 0;  // keys
  std::vector<ForwardParams> parts_;
  std::vector<char> states_;
};

}  // namespace ring_attention::cpu
