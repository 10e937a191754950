// SPDX-License-Identifier: BSD-3-Clause
//
// What one rank does, step by step. Told for keys that travel; queries are scheduled alike.
//
// Note [schedule]. A generator lists, per hop, what this rank folds and which messages it posts, in
// rows of the origin's shard. finish() then makes the executable plan: empty hops vanish, rows
// become relative to the blocks as held, the transfers of a hop without a fold move under the fold
// at the hop before it, which hides them, and blocks are released after their last use. Every rank
// decides so on its own, because all ranks post messages in one order: K/V of hop t, gradients of
// hop t - 1, K/V of hop t + 1 ..., where a rank that waits has posted everything up to some place
// in that order and nothing after it. So the first message in that order that is still under way is
// posted on both sides: ranks never wait for each other in a circle, and NCCL, which matches
// messages between two ranks by order alone, matches the right ones. None of that depends on how
// long a message may take: one that has to be there only some hops later has a later `due`.
//
// Note [double ring]. Ranks node * ranks_per_node + local. Round o of `world / ranks_per_node`
// deals with the blocks of the node at distance o: rank `local` of this node receives the block of
// rank `local` of that one, once for all ranks of its node, while the whole round before is folded;
// the ranks of the node then read it from there, one after another. Their gradients are summed
// where the block came in, and the sum alone crosses back, while the next round is folded. In all
// rounds but the first the block that is here already is folded last, so that it hides the last
// gradients of its round and the first block of the next one.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ranges.h"
#include "reads.h"

namespace ring_attention::plan {

// See ring_attention/steps.py for the meaning of every field: these are its Transfer and Step.
struct Transfer {
  int64_t peer = 0, origin = 0, hop = 0, due = 0;
  Ranges rows;
};

struct Step {
  int64_t number = 0;  // the hop it folds at
  std::vector<int64_t> folds, release;
  std::vector<Transfer> sends, recvs, grad_sends, grad_recvs;
  int64_t flops = 0;  // visible query-key pairs of the folds

  bool idle() const {
    return folds.empty() && sends.empty() && recvs.empty() && grad_sends.empty() &&
           grad_recvs.empty();
  }
};

// What travels: keys to the ranks whose queries see them, or queries to the ranks whose keys they
// see. Then "gradients" are what those ranks have for the owner: dK/dV, or a state or dQ.
enum class Traveller { kKeys, kQueries };

struct Options {
  Traveller traveller = Traveller::kKeys;
  int64_t resident = 1;        // travelling blocks folded in one step
  int64_t ranks_per_node = 1;  // of a double ring
};

struct Generator {
  const char* name;
  std::vector<Step> (*hops)(const Reads&, int64_t rank, const Options&);
};

// The generators, by name.
const std::vector<Generator>& generators();

// The steps of `rank`; throws std::invalid_argument for an unknown generator, or options that it
// does not have.
std::vector<Step> schedule(const Reads& reads, int64_t rank, const std::string& generator,
                           const Options& options);

}  // namespace ring_attention::plan
