// SPDX-License-Identifier: BSD-3-Clause
#include "schedule.h"

#include <map>
#include <stdexcept>
#include <utility>

namespace ring_attention::plan {

namespace {

void add(std::vector<Transfer>& transfers, int64_t peer, int64_t origin, int64_t hop,
         const Ranges& rows) {
  if (!rows.empty()) transfers.push_back({peer, origin, hop, rows});
}

// What every generator does at hop t: fold the block of rank - distance if a query sees it, send
// what that gives its owner, and receive what rank + distance has for the own block.
Step fold_hop(const Reads& reads, int64_t rank, int64_t t, int64_t distance, const Ranges& seen,
              const Ranges& seen_by_reader) {
  const int64_t world = reads.world_size();
  const int64_t origin = (rank - distance + world) % world, reader = (rank + distance) % world;
  Step step;
  step.number = t;
  const Ranges rows = reads.k().shard(origin).rows(seen);
  if (!rows.empty()) {
    step.folds.push_back(origin);
    step.flops = reads.pairs(rank, reads.k().shard(origin));
  }
  if (distance > 0) {
    add(step.grad_sends, origin, origin, t, rows);
    add(step.grad_recvs, reader, rank, t, reads.k().shard(rank).rows(seen_by_reader));
  }
  return step;
}

// Own rows straight to their readers, nearest first: hop t folds the block at distance 0, 1, -1, 2,
// -2 ... Windows and documents need near blocks only, on one side or (zigzag) on both, so that
// their folds follow each other closely and hide each other's transfers.
std::vector<Step> direct(const Reads& reads, int64_t rank) {
  const int64_t world = reads.world_size();
  const auto distance = [world](int64_t t) {
    return t % 2 == 1 ? (t + 1) / 2 : (world - t / 2) % world;
  };
  const Ranges seen = reads.visible(rank);
  Ranges seen_by_reader = seen;
  std::vector<Step> hops;
  for (int64_t t = 0; t < world; ++t) {
    hops.push_back(fold_hop(reads, rank, t, distance(t), seen, seen_by_reader));
    if (t + 1 == world) break;
    const int64_t next = distance(t + 1);
    const int64_t to = (rank + next) % world, from = (rank - next + world) % world;
    seen_by_reader = reads.visible(to);
    add(hops[t].sends, to, rank, t, reads.k().shard(rank).rows(seen_by_reader));
    add(hops[t].recvs, from, from, t, reads.k().shard(from).rows(seen));
  }
  return hops;
}

// The block of rank - t to rank + 1, that of rank - t - 1 from rank - 1: what the ranks from the
// receiver on, up to the one in front of the owner, still read.
std::vector<Step> chain(const Reads& reads, int64_t rank) {
  const int64_t world = reads.world_size();
  const int64_t next = (rank + 1) % world, previous = (rank - 1 + world) % world;
  const Ranges seen = reads.visible(rank);
  std::vector<Ranges> seen_by(1, seen);  // [t]: by rank + t
  std::vector<Ranges> downstream(1);     // [n]: by rank + 1 ... rank + n
  for (int64_t t = 1; t < world; ++t) {
    seen_by.push_back(reads.visible((rank + t) % world));
    downstream.push_back(unite(downstream.back(), seen_by.back()));
  }
  std::vector<Step> hops;
  for (int64_t t = 0; t < world; ++t) {
    hops.push_back(fold_hop(reads, rank, t, t, seen, seen_by[t]));
    if (t + 1 == world) break;
    const Shard& held = reads.k().shard((rank - t + world) % world);
    const int64_t coming = (rank - t - 1 + world) % world;
    const Shard& shard = reads.k().shard(coming);
    add(hops[t].sends, next, (rank - t + world) % world, t, held.rows(downstream[world - 1 - t]));
    add(hops[t].recvs, previous, coming, t,
        unite(shard.rows(seen), shard.rows(downstream[world - 2 - t])));
  }
  return hops;
}

// Whether the transfers of a hop without folds may be posted with those of the step before it: it
// is the very next hop, what it sends is held by then, and no step gets more than one message of a
// kind, so that two K/V buffers are enough. (A later hop would overtake that step's gradients,
// which are posted after it: see Note [order of messages] in ring_attention/loop.py.)
bool may_join(const Step& step, const Step& hop) {
  const auto one = [](const std::vector<Transfer>& a, const std::vector<Transfer>& b) {
    return a.size() + b.size() <= 1;
  };
  for (const Transfer& send : hop.sends) {
    for (const Transfer& recv : step.recvs) {
      if (recv.origin == send.origin) return false;
    }
  }
  return hop.folds.empty() && hop.number == step.number + 1 && one(step.sends, hop.sends) &&
         one(step.recvs, hop.recvs) && one(step.grad_recvs, hop.grad_recvs);
}

void join(Step& step, Step&& hop) {
  const auto move = [](std::vector<Transfer>& to, std::vector<Transfer>& from) {
    for (Transfer& transfer : from) to.push_back(std::move(transfer));
  };
  move(step.sends, hop.sends);
  move(step.recvs, hop.recvs);
  move(step.grad_recvs, hop.grad_recvs);
}

std::vector<Step> finish(const Reads& reads, int64_t rank, std::vector<Step> hops) {
  std::map<int64_t, Ranges> held = {{rank, Ranges({{0, reads.k().shard(rank).size()}})}};
  std::map<int64_t, size_t> last_use;
  std::vector<Step> steps;
  for (Step& hop : hops) {
    for (Transfer& send : hop.sends) send.rows = relative_to(send.rows, held.at(send.origin));
    for (Transfer& send : hop.grad_sends) send.rows = relative_to(send.rows, held.at(send.origin));
    for (const Transfer& recv : hop.recvs) held[recv.origin] = recv.rows;
    if (!steps.empty() && hop.idle()) continue;
    if (!steps.empty() && may_join(steps.back(), hop)) {
      join(steps.back(), std::move(hop));
    } else {
      steps.push_back(std::move(hop));
    }
  }
  for (size_t s = 0; s < steps.size(); ++s) {
    for (const int64_t origin : steps[s].folds) last_use[origin] = s;
    for (const Transfer& send : steps[s].sends) last_use[send.origin] = s;
  }
  for (const auto& [origin, step] : last_use) {
    if (origin != rank) steps[step].release.push_back(origin);
  }
  return steps;
}

}  // namespace

const std::vector<Generator>& generators() {
  static const std::vector<Generator> all = {{"direct", direct}, {"chain", chain}};
  return all;
}

std::vector<Step> schedule(const Reads& reads, int64_t rank, const std::string& generator) {
  for (const Generator& g : generators()) {
    if (generator == g.name) return finish(reads, rank, g.hops(reads, rank));
  }
  throw std::invalid_argument("planner: no generator is called " + generator);
}

}  // namespace ring_attention::plan
