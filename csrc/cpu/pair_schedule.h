// SPDX-License-Identifier: BSD-3-Clause
//
// Note [pairs]. The backward without atomics on data: query rows and keys are cut into chunks, by
// shape, at most n of either; step t has the pairs (query chunk (j + t) mod n, key chunk j), of
// which no two share dq, dk or dv. A pair waits for the one before it in its query chunk and the
// one before it in its key chunk, not for a whole step. So every sum is added in the order of
// steps, whatever the number of threads. Pairs that see nothing of one another do not exist.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "problem.h"

namespace ring_attention::cpu {

class PairSchedule {
 public:
  struct Pair {
    int64_t batch, kv_head;
    int64_t row, row_end, key, key_end;
  };

  // Chunks are multiples of a pass and of a key block.
  PairSchedule(const AttentionParams& p, const KVBlock& block, const TileShape& shape)
      : rows_(p, shape.panel) {
    const int64_t problems = p.batch * p.kv_heads, rows = rows_.count();
    row_chunk_ = chunk(problems, rows, 512, shape.panel * shape.pass);
    key_chunk_ = chunk(problems, block.k_len, 256, shape.key_block);
    row_chunks_ = divide_up(rows, row_chunk_);
    const int64_t key_chunks = divide_up(block.k_len, key_chunk_);
    const int64_t n = std::max(row_chunks_, key_chunks);
    const std::vector<Extent> seen = extents(block, p.batch);
    std::vector<int32_t> row_turn(static_cast<size_t>(problems * row_chunks_));
    std::vector<int32_t> key_turn(static_cast<size_t>(problems * key_chunks));
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t j = 0; j < key_chunks; ++j) {
        const int64_t i = (j + t) % n, row = i * row_chunk_, key = j * key_chunk_;
        for (int64_t problem = 0; i < row_chunks_ && problem < problems; ++problem) {
          const int64_t b = problem / p.kv_heads;
          if (!seen[static_cast<size_t>(b * row_chunks_ + i)].touches(key, key + key_chunk_)) {
            continue;
          }
          const auto q = static_cast<size_t>(problem * row_chunks_ + i);
          const auto k = static_cast<size_t>(problem * key_chunks + j);
          const Pair pair = {b,   problem % p.kv_heads,
                             row, std::min(row + row_chunk_, rows),
                             key, std::min(key + key_chunk_, block.k_len)};
          turns_.push_back({pair, q, k, row_turn[q]++, key_turn[k]++});
        }
      }
    }
    rows_done_ = std::vector<std::atomic<int32_t>>(row_turn.size());
    keys_done_ = std::vector<std::atomic<int32_t>>(key_turn.size());
  }

  // Runs body(pair) for every pair. Pairs are taken in order, whatever the order of tasks, so what
  // a pair waits for has been taken by a thread that does not wait for it.
  template <typename Body>
  void run(const Parallel& parallel, const Body& body) {
    std::atomic<size_t> next{0};
    parallel(static_cast<int64_t>(turns_.size()), [&](int64_t) {
      const Turn& turn = turns_[next.fetch_add(1, std::memory_order_relaxed)];
      wait(rows_done_[turn.row_chunk], turn.row_turn);
      wait(keys_done_[turn.key_chunk], turn.key_turn);
      const Finish finish{rows_done_[turn.row_chunk], keys_done_[turn.key_chunk]};
      body(turn.pair);
    });
  }

 private:
  struct Turn {
    Pair pair;
    size_t row_chunk, key_chunk;  // which counters
    int32_t row_turn, key_turn;   // what they have to show first
  };

  // Also when the body throws: nobody may wait for ever.
  struct Finish {
    std::atomic<int32_t>&rows, &keys;
    ~Finish() {
      rows.fetch_add(1, std::memory_order_release);
      keys.fetch_add(1, std::memory_order_release);
    }
  };

  static void wait(const std::atomic<int32_t>& done, int32_t turn) {
    while (done.load(std::memory_order_acquire) != turn) std::this_thread::yield();
  }

  // Up to 32 pairs at a time, as long as chunks keep `least` rows: packing costs as much as the
  // products gain from a smaller one. Short sequences go down to half of that for 8 pairs.
  static int64_t chunk(int64_t problems, int64_t length, int64_t least, int64_t multiple) {
    const int64_t many = std::min(divide_up(32, problems), length / least);
    const int64_t some = std::min(divide_up(8, problems), length / (least / 2));
    return round_up(divide_up(length, std::max<int64_t>({many, some, 1})), multiple);
  }

  // What each query chunk sees of the block, over all intervals: [batch][row_chunks].
  std::vector<Extent> extents(const KVBlock& block, int64_t batch) const {
    std::vector<Extent> result(static_cast<size_t>(batch * row_chunks_));
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t n = 0; n < block.intervals; ++n) {
        for (int64_t i = 0; i < rows_.q_len; ++i) {
          const Interval seen = interval_of(block, n, b, i);
          for (int64_t row = i; row < rows_.count(); row += rows_.head_rows) {
            result[static_cast<size_t>(b * row_chunks_ + row / row_chunk_)].add(seen.begin,
                                                                                seen.end);
          }
        }
      }
    }
    return result;
  }

  QueryRows rows_;
  int64_t row_chunk_, key_chunk_, row_chunks_;
  std::vector<Turn> turns_;  // in the order of steps
  std::vector<std::atomic<int32_t>> rows_done_, keys_done_;
};

}  // namespace ring_attention::cpu
