// SPDX-License-Identifier: BSD-3-Clause
//
// Note [pairs]. The backward without atomics on data. Query rows and keys are cut into chunks, by
// shape alone; a pair is a chunk of rows against a chunk of keys. It loads its rows once for all of
// its keys, so chunks of keys are long, and a chunk of rows is a tile, or less where those are few.
// The rows that start at key chunk j (where heads are not shared, by the diagonal) are its
// followers: step t has the followers of key chunk (j + t) mod n against key chunk j, one after
// another. The next one need not wait for the whole pair before it: a pair tells how many of its
// keys it is done with. So every sum is added in one order, whatever the number of threads. Pairs
// that see nothing of one another do not exist; those that do take 28 bytes, at most 32 for a tile.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <thread>
#include <vector>

#include "problem.h"

namespace ring_attention::cpu {

class PairSchedule {
 public:
  class Pair;

  PairSchedule(const AttentionParams& p, const KVBlock& block, const TileShape& shape, int threads)
      : kv_heads_(p.kv_heads), k_len_(block.k_len), rows_(p, shape.panel) {
    const int64_t problems = p.batch * p.kv_heads, rows = rows_.count();
    row_chunk_ =
        std::min(shape.panels * shape.panel,
                 chunk_of(rows, divide_up(kLeastChunks, problems), shape.panel * shape.pass));
    row_chunks_ = divide_up(rows, row_chunk_);
    key_chunk_ = chunk_of(k_len_, std::min(k_len_ / kLeastKeys, kMostChunks), shape.key_block);
    key_chunks_ = divide_up(k_len_, key_chunk_);
    const std::vector<Extent> seen = extents(block, p.batch);

    std::vector<int32_t> row_last(static_cast<size_t>(problems * row_chunks_), kNone);
    std::vector<int32_t> key_last(static_cast<size_t>(problems * key_chunks_), kNone);
    const auto add = [&](int64_t problem, int64_t i, int64_t j) {
      bool touches = false;
      for (int64_t n = 0; n < block.intervals; ++n) {
        const int64_t at = (n * p.batch + problem / kv_heads_) * row_chunks_ + i;
        const Extent& extent = seen[static_cast<size_t>(at)];
        touches |= extent.touches(j * key_chunk_, (j + 1) * key_chunk_);
      }
      if (!touches) return;
      int32_t& row_before = row_last[static_cast<size_t>(problem * row_chunks_ + i)];
      int32_t& key_before = key_last[static_cast<size_t>(problem * key_chunks_ + j)];
      turns_.push_back({static_cast<int32_t>(problem), static_cast<int32_t>(i),
                        static_cast<int32_t>(j), row_before, key_before});
      row_before = key_before = static_cast<int32_t>(turns_.size() - 1);
    };
    // Step t of the key chunks [from, end), counted over problems: the first follower of each, then
    // the next one of each.
    const auto add_abreast = [&](int64_t t, int64_t from, int64_t end) {
      for (int64_t n = 0; n < divide_up(row_chunks_, key_chunks_); ++n) {
        for (int64_t at = from; at < end; ++at) {
          const int64_t j = at % key_chunks_, start = (j + t) % key_chunks_;
          const int64_t i = first_follower(start) + n;
          if (i < first_follower(start + 1)) add(at / key_chunks_, i, j);
        }
      }
    };
    // The order is free, as far as sums go. Key chunks at a time: half as many as threads, as two
    // that follow one another find K and V in the cache. Problems at a time: enough for that, and
    // for twice as many chunks of rows as threads, or threads would wait for rows.
    const int64_t abreast = std::max(threads / 2, 1);
    const int64_t together =
        std::max(divide_up(2 * threads, row_chunks_), divide_up(abreast, key_chunks_));
    for (int64_t first = 0; first < problems; first += together) {
      const int64_t end = std::min(first + together, problems) * key_chunks_;
      for (int64_t t = 0; t < key_chunks_; ++t) {
        for (int64_t from = first * key_chunks_; from < end; from += abreast) {
          add_abreast(t, from, std::min(from + abreast, end));
        }
      }
    }
    keys_done_ = std::vector<std::atomic<int64_t>>(turns_.size());
  }

  // Runs body(pair) for every pair. Pairs are taken in order, whatever the order of tasks, so what
  // a pair waits for has been taken by a thread that does not wait for it.
  template <typename Body>
  void run(const Parallel& parallel, const Body& body) {
    std::atomic<size_t> next{0};
    parallel(static_cast<int64_t>(turns_.size()), [&](int64_t) {
      const Pair pair(*this, next.fetch_add(1, std::memory_order_relaxed));
      body(pair);
    });
  }

 private:
  static constexpr int64_t kLeastKeys = 1024;  // of a chunk: what loading rows costs is small then
  static constexpr int64_t kMostChunks = 32;   // of keys
  static constexpr int64_t kLeastChunks = 8;   // of rows, over all problems, of a pass or more
  static constexpr int32_t kNone = -1;
  static constexpr int64_t kAll = std::numeric_limits<int64_t>::max();

  struct Turn {
    int32_t problem, row_chunk, key_chunk;
    int32_t row_before, key_before;  // the turns that have the same rows, the same keys before it
  };

  static int64_t chunk_of(int64_t length, int64_t chunks, int64_t multiple) {
    return round_up(divide_up(length, std::max<int64_t>(chunks, 1)), multiple);
  }

  // The row chunks that start at a key chunk.
  int64_t first_follower(int64_t key_chunk) const {
    return divide_up(key_chunk * row_chunks_, key_chunks_);
  }

  // Waits until the turn is done with the keys before `end`.
  void wait(int32_t turn, int64_t end) const {
    if (turn == kNone) return;
    const std::atomic<int64_t>& done = keys_done_[static_cast<size_t>(turn)];
    while (done.load(std::memory_order_acquire) < end) std::this_thread::yield();
  }

  // What each chunk of rows sees of the block: [intervals][batch][row_chunks].
  std::vector<Extent> extents(const KVBlock& block, int64_t batch) const {
    std::vector<Extent> result(static_cast<size_t>(block.intervals * batch * row_chunks_));
    for (int64_t n = 0; n < block.intervals; ++n) {
      for (int64_t b = 0; b < batch; ++b) {
        const Intervals intervals(block, n, b);
        for (int64_t i = 0; i < rows_.q_len; ++i) {
          const Interval seen = intervals.of(i);
          for (int64_t row = i; row < rows_.count(); row += rows_.head_rows) {
            const int64_t at = (n * batch + b) * row_chunks_ + row / row_chunk_;
            result[static_cast<size_t>(at)].add(seen.begin, seen.end);
          }
        }
      }
    }
    return result;
  }

  const int64_t kv_heads_, k_len_;
  const QueryRows rows_;
  int64_t row_chunk_, key_chunk_, row_chunks_, key_chunks_;
  std::vector<Turn> turns_;                      // in the order they are taken
  std::vector<std::atomic<int64_t>> keys_done_;  // of each turn: all keys before this one
};

// While it exists, its rows are no other pair's.
class PairSchedule::Pair {
 public:
  const int64_t batch, kv_head;
  const int64_t row, row_end, key, key_end;

  Pair(PairSchedule& schedule, size_t index)
      : Pair(schedule, schedule.turns_[index], schedule.keys_done_[index]) {}
  // Also when its body throws: nobody may wait for ever.
  ~Pair() { done_with_keys(kAll); }
  Pair(const Pair&) = delete;
  Pair& operator=(const Pair&) = delete;

  // Waits until no pair before this one needs the keys before `end`.
  void wait_for_keys(int64_t end) const { schedule_.wait(key_before_, end); }
  // Hands them to the next pair.
  void done_with_keys(int64_t end) const {
    wait_for_keys(end);
    done_.store(end, std::memory_order_release);
  }

 private:
  Pair(const PairSchedule& schedule, const Turn& turn, std::atomic<int64_t>& done)
      : batch(turn.problem / schedule.kv_heads_),
        kv_head(turn.problem % schedule.kv_heads_),
        row(turn.row_chunk * schedule.row_chunk_),
        row_end(std::min(row + schedule.row_chunk_, schedule.rows_.count())),
        key(turn.key_chunk * schedule.key_chunk_),
        key_end(std::min(key + schedule.key_chunk_, schedule.k_len_)),
        schedule_(schedule),
        key_before_(turn.key_before),
        done_(done) {
    schedule.wait(turn.row_before, kAll);
  }

  const PairSchedule& schedule_;
  const int32_t key_before_;
  std::atomic<int64_t>& done_;
};

}  // namespace ring_attention::cpu
