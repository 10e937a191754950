// SPDX-License-Identifier: BSD-3-Clause
#include "schedule.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <utility>

namespace ring_attention::plan {

namespace {

void add(std::vector<Transfer>& transfers, int64_t peer, int64_t origin, int64_t hop, int64_t due,
         const Ranges& rows) {
  if (!rows.empty()) transfers.push_back({peer, origin, hop, due, rows});
}

// The t-th nearest of `size` places on a circle: 0, 1, -1, 2, -2 ... Windows and documents need
// near blocks only, on one side or (zigzag) on both: so their folds follow each other closely and
// hide each other's transfers.
int64_t nearest(int64_t t, int64_t size) {
  return t % 2 == 1 ? (t + 1) / 2 : (size - t / 2) % size;
}

// Folds the block of `origin` in a step, if a query sees it; the rows seen are its gradients' too.
Ranges fold(Step& step, const Reads& reads, int64_t rank, int64_t origin, const Ranges& seen) {
  Ranges rows = reads.k().shard(origin).rows(seen);
  if (!rows.empty()) {
    step.folds.push_back(origin);
    step.flops += reads.pairs(rank, reads.k().shard(origin));
  }
  return rows;
}

// Folds the block of rank - distance, sends what that gives its owner, and receives what rank +
// distance has for the own block.
void fold_at(Step& step, const Reads& reads, int64_t rank, int64_t distance, const Ranges& seen,
             const Ranges& seen_by_reader) {
  const int64_t world = reads.world_size(), t = step.number;
  const int64_t origin = (rank - distance + world) % world, reader = (rank + distance) % world;
  const Ranges rows = fold(step, reads, rank, origin, seen);
  if (distance > 0) {
    add(step.grad_sends, origin, origin, t, t + 1, rows);
    add(step.grad_recvs, reader, rank, t, t + 1, reads.k().shard(rank).rows(seen_by_reader));
  }
}

// Own rows straight to their readers, nearest first: the own block is folded at hop 0, the
// `resident` nearest ones at hop 1, and so on.
std::vector<Step> direct(const Reads& reads, int64_t rank, const Options& options) {
  const int64_t world = reads.world_size();
  const Ranges seen = reads.visible(rank);
  std::vector<Step> hops(1);
  fold_at(hops[0], reads, rank, 0, seen, seen);
  for (int64_t begin = 1; begin < world; begin += options.resident) {
    const int64_t t = hops.back().number;
    Step next;
    next.number = t + 1;
    for (int64_t i = begin; i < std::min(begin + options.resident, world); ++i) {
      const int64_t distance = nearest(i, world);
      const int64_t to = (rank + distance) % world, from = (rank - distance + world) % world;
      const Ranges seen_by_reader = reads.visible(to);
      add(hops.back().sends, to, rank, t, t, reads.k().shard(rank).rows(seen_by_reader));
      add(hops.back().recvs, from, from, t, t, reads.k().shard(from).rows(seen));
      fold_at(next, reads, rank, distance, seen, seen_by_reader);
    }
    hops.push_back(std::move(next));
  }
  return hops;
}

// The block of rank - t to rank + 1, that of rank - t - 1 from rank - 1: what the ranks from the
// receiver on, up to the one in front of the owner, still read.
std::vector<Step> chain(const Reads& reads, int64_t rank, const Options&) {
  const int64_t world = reads.world_size();
  const int64_t next = (rank + 1) % world, previous = (rank - 1 + world) % world;
  const Ranges seen = reads.visible(rank);
  std::vector<Ranges> seen_by(1, seen);  // [t]: by rank + t
  std::vector<Ranges> downstream(1);     // [n]: by rank + 1 ... rank + n
  for (int64_t t = 1; t < world; ++t) {
    seen_by.push_back(reads.visible((rank + t) % world));
    downstream.push_back(unite(downstream.back(), seen_by.back()));
  }
  std::vector<Step> hops(static_cast<size_t>(world));
  for (int64_t t = 0; t < world; ++t) {
    hops[t].number = t;
    fold_at(hops[t], reads, rank, t, seen, seen_by[t]);
    if (t + 1 == world) break;
    const Shard& held = reads.k().shard((rank - t + world) % world);
    const int64_t coming = (rank - t - 1 + world) % world;
    const Shard& shard = reads.k().shard(coming);
    add(hops[t].sends, next, (rank - t + world) % world, t, t,
        held.rows(downstream[world - 1 - t]));
    add(hops[t].recvs, previous, coming, t, t,
        unite(shard.rows(seen), shard.rows(downstream[world - 2 - t])));
  }
  return hops;
}

// See Note [double ring].
class DoubleRing {
 public:
  DoubleRing(const Reads& reads, int64_t rank, int64_t locals)
      : reads_(reads),
        rank_(rank),
        locals_(locals),
        nodes_(reads.world_size() / locals),
        node_(rank / locals),
        local_(rank % locals) {
    for (int64_t r = 0; r < reads.world_size(); ++r) {
      seen_by_.push_back(reads.visible(r));
      if (r % locals == 0) seen_by_node_.emplace_back();
      seen_by_node_.back() = unite(seen_by_node_.back(), seen_by_.back());
    }
  }

  std::vector<Step> hops() const {
    std::vector<Step> hops(static_cast<size_t>(reads_.world_size()));
    for (int64_t t = 0; t < reads_.world_size(); ++t) {
      Step& step = hops[t];
      step.number = t;
      fold_here(step);
      if (t + 1 < reads_.world_size()) pass_on(step, t + 1);
      if (t % locals_ == 0 && t + locals_ < reads_.world_size()) cross(step, t / locals_ + 1);
      if (t % locals_ == locals_ - 1 && t >= locals_) cross_back(step, t / locals_);
    }
    return hops;
  }

 private:
  int64_t at(int64_t node, int64_t local) const {
    return (node + nodes_) % nodes_ * locals_ + (local + locals_) % locals_;
  }
  // The node whose blocks hop t is about.
  int64_t source(int64_t t) const { return node_ - nearest(t / locals_, nodes_); }
  // How far away in this node the block of hop t is.
  int64_t distance(int64_t t) const {
    return nearest(t < locals_ ? t : (t + 1) % locals_, locals_);
  }
  Ranges rows(int64_t origin, const Ranges& seen) const {
    return reads_.k().shard(origin).rows(seen);
  }

  // Gradients go to where the block came in: in the first round, to its owner.
  void fold_here(Step& step) const {
    const int64_t t = step.number, d = distance(t);
    const int64_t origin = at(source(t), local_ - d), kept = at(source(t), local_);
    const int64_t reader = at(node_, local_ + d);
    const Ranges seen = fold(step, reads_, rank_, origin, seen_by_[rank_]);
    if (d == 0) return;
    add(step.grad_sends, at(node_, local_ - d), origin, t, t + 1, seen);
    add(step.grad_recvs, reader, kept, t, t + 1, rows(kept, seen_by_[reader]));
  }

  // The block that this rank keeps in the round of hop `next`, to its reader at that hop.
  void pass_on(Step& step, int64_t next) const {
    const int64_t t = step.number, d = distance(next);
    if (d == 0) return;
    const int64_t kept = at(source(next), local_), reader = at(node_, local_ + d);
    const int64_t coming = at(source(next), local_ - d);
    add(step.sends, reader, kept, t, t, rows(kept, seen_by_[reader]));
    add(step.recvs, at(node_, local_ - d), coming, t, t, rows(coming, seen_by_[rank_]));
  }

  // Own rows to the other node that reads them in `round`; there before its first block is passed
  // on, in the last hop of the round before.
  void cross(Step& step, int64_t round) const {
    const int64_t t = step.number, far = nearest(round, nodes_), due = t + locals_ - 2;
    const int64_t from = at(node_ - far, local_), to = at(node_ + far, local_);
    add(step.sends, to, rank_, t, due, rows(rank_, seen_by_node_[to / locals_]));
    add(step.recvs, from, from, t, due, rows(from, seen_by_node_[node_]));
  }

  // What this node has for the owner of the block kept in `round`, and others have for this rank.
  void cross_back(Step& step, int64_t round) const {
    const int64_t t = step.number, far = nearest(round, nodes_), due = t + locals_ - 1;
    const int64_t owner = at(node_ - far, local_), from = at(node_ + far, local_);
    add(step.grad_sends, owner, owner, t, due, rows(owner, seen_by_node_[node_]));
    add(step.grad_recvs, from, rank_, t, due, rows(rank_, seen_by_node_[from / locals_]));
  }

  const Reads& reads_;
  const int64_t rank_, locals_, nodes_, node_, local_;
  std::vector<Ranges> seen_by_, seen_by_node_;
};

std::vector<Step> double_ring(const Reads& reads, int64_t rank, const Options& options) {
  return DoubleRing(reads, rank, options.ranks_per_node).hops();
}

// Whether the transfers of a hop without folds may be posted with those of the step before it: it
// is the very next hop, what it sends is there by then, and no step gets more messages of a kind
// than blocks may be resident. (A later hop would overtake that step's gradients, which are posted
// after it: see Note [order of messages] in ring_attention/loop.py.)
bool may_join(const Step& step, const Step& hop, const std::map<int64_t, int64_t>& due,
              size_t resident) {
  const auto few = [resident](const std::vector<Transfer>& a, const std::vector<Transfer>& b) {
    return a.size() + b.size() <= resident;
  };
  for (const Transfer& send : hop.sends) {
    const auto arrives = due.find(send.origin);
    if (arrives != due.end() && arrives->second >= step.number) return false;
  }
  return hop.folds.empty() && hop.grad_sends.empty() && hop.number == step.number + 1 &&
         few(step.sends, hop.sends) && few(step.recvs, hop.recvs) &&
         few(step.grad_recvs, hop.grad_recvs);
}

void join(Step& step, Step&& hop) {
  const auto move = [](std::vector<Transfer>& to, std::vector<Transfer>& from) {
    for (Transfer& transfer : from) to.push_back(std::move(transfer));
  };
  move(step.sends, hop.sends);
  move(step.recvs, hop.recvs);
  move(step.grad_recvs, hop.grad_recvs);
}

std::vector<Step> finish(const Reads& reads, int64_t rank, std::vector<Step> hops,
                         size_t resident) {
  std::map<int64_t, Ranges> held = {{rank, Ranges({{0, reads.k().shard(rank).size()}})}};
  std::map<int64_t, int64_t> due;
  std::map<int64_t, size_t> last_use;
  std::vector<Step> steps;
  for (Step& hop : hops) {
    for (auto* transfers : {&hop.sends, &hop.grad_sends, &hop.grad_recvs}) {
      for (Transfer& t : *transfers) t.rows = relative_to(t.rows, held.at(t.origin));
    }
    for (const Transfer& recv : hop.recvs) {
      held[recv.origin] = recv.rows;
      due[recv.origin] = recv.due;
    }
    if (!steps.empty() && hop.idle()) continue;
    if (!steps.empty() && may_join(steps.back(), hop, due, resident)) {
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
  static const std::vector<Generator> all = {
      {"direct", direct}, {"chain", chain}, {"double", double_ring}};
  return all;
}

std::vector<Step> schedule(const Reads& reads, int64_t rank, const std::string& generator,
                           const Options& options) {
  const int64_t locals = options.ranks_per_node;
  if (options.resident < 1 || (options.resident > 1 && generator != "direct")) {
    throw std::invalid_argument("planner: only direct keeps several travelling blocks resident");
  }
  if ((generator == "double") != (locals > 1) || reads.world_size() % locals != 0) {
    throw std::invalid_argument("planner: a double ring, and nothing else, has nodes of ranks");
  }
  for (const Generator& g : generators()) {
    if (generator == g.name) {
      return finish(reads, rank, g.hops(reads, rank, options),
                    static_cast<size_t>(options.resident));
    }
  }
  throw std::invalid_argument("planner: no generator is called " + generator);
}

}  // namespace ring_attention::plan
