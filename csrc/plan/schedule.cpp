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

// Which rows of each other's blocks ranks need: of keys that travel, those some query of the reader
// sees; of queries that travel, those that see some key of the reader.
class Demand {
 public:
  Demand(const Reads& reads, Traveller traveller) : reads_(reads), traveller_(traveller) {}

  int64_t world_size() const { return reads_.world_size(); }
  const Shard& block(int64_t origin) const {
    return (traveller_ == Traveller::kKeys ? reads_.k() : reads_.q()).shard(origin);
  }
  Ranges rows(int64_t origin, int64_t reader) const {
    if (traveller_ == Traveller::kQueries) {
      return reads_.viewers(origin, reads_.k().shard(reader));
    }
    return block(origin).rows(visible(reader));
  }
  int64_t pairs(int64_t origin, int64_t reader) const {
    return traveller_ == Traveller::kKeys ? reads_.pairs(reader, reads_.k().shard(origin))
                                          : reads_.pairs(origin, reads_.k().shard(reader));
  }
  // The key positions that a rank's queries see.
  const Ranges& visible(int64_t reader) const {
    const auto known = visible_.find(reader);
    if (known != visible_.end()) return known->second;
    return visible_.emplace(reader, reads_.visible(reader)).first->second;
  }

 private:
  const Reads& reads_;
  const Traveller traveller_;
  mutable std::map<int64_t, Ranges> visible_;
};

// Folds the block of `origin` in a step, if it is needed; the rows needed are its gradients' too.
Ranges fold(Step& step, const Demand& demand, int64_t rank, int64_t origin) {
  Ranges rows = demand.rows(origin, rank);
  if (!rows.empty()) {
    step.folds.push_back(origin);
    step.flops += demand.pairs(origin, rank);
  }
  return rows;
}

// Folds the block of rank - distance, sends what that gives its owner, and receives what rank +
// distance has for the own block.
void fold_at(Step& step, const Demand& demand, int64_t rank, int64_t distance) {
  const int64_t world = demand.world_size(), t = step.number;
  const int64_t origin = (rank - distance + world) % world, reader = (rank + distance) % world;
  const Ranges rows = fold(step, demand, rank, origin);
  if (distance > 0) {
    add(step.grad_sends, origin, origin, t, t + 1, rows);
    add(step.grad_recvs, reader, rank, t, t + 1, demand.rows(rank, reader));
  }
}

// Own rows straight to their readers, nearest first: the own block is folded at hop 0, the
// `resident` nearest ones at hop 1, and so on.
std::vector<Step> direct(const Reads& reads, int64_t rank, const Options& options) {
  const Demand demand(reads, options.traveller);
  const int64_t world = demand.world_size();
  std::vector<Step> hops(1);
  fold_at(hops[0], demand, rank, 0);
  for (int64_t begin = 1; begin < world; begin += options.resident) {
    const int64_t t = hops.back().number;
    Step next;
    next.number = t + 1;
    for (int64_t i = begin; i < std::min(begin + options.resident, world); ++i) {
      const int64_t distance = nearest(i, world);
      const int64_t to = (rank + distance) % world, from = (rank - distance + world) % world;
      add(hops.back().sends, to, rank, t, t, demand.rows(rank, to));
      add(hops.back().recvs, from, from, t, t, demand.rows(from, rank));
      fold_at(next, demand, rank, distance);
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
  const Demand demand(reads, Traveller::kKeys);
  const Ranges& seen = demand.visible(rank);
  std::vector<Ranges> downstream(1);  // [n]: seen by rank + 1 ... rank + n
  for (int64_t t = 1; t < world; ++t) {
    downstream.push_back(unite(downstream.back(), demand.visible((rank + t) % world)));
  }
  std::vector<Step> hops(static_cast<size_t>(world));
  for (int64_t t = 0; t < world; ++t) {
    hops[t].number = t;
    fold_at(hops[t], demand, rank, t);
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
      : demand_(reads, Traveller::kKeys),
        rank_(rank),
        locals_(locals),
        nodes_(reads.world_size() / locals),
        node_(rank / locals),
        local_(rank % locals) {
    for (int64_t r = 0; r < reads.world_size(); ++r) {
      if (r % locals == 0) seen_by_node_.emplace_back();
      seen_by_node_.back() = unite(seen_by_node_.back(), demand_.visible(r));
    }
  }

  std::vector<Step> hops() const {
    std::vector<Step> hops(static_cast<size_t>(demand_.world_size()));
    for (int64_t t = 0; t < demand_.world_size(); ++t) {
      Step& step = hops[t];
      step.number = t;
      fold_here(step);
      if (t + 1 < demand_.world_size()) pass_on(step, t + 1);
      if (t % locals_ == 0 && t + locals_ < demand_.world_size()) cross(step, t / locals_ + 1);
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
  Ranges rows_of_node(int64_t origin, int64_t node) const {
    return demand_.block(origin).rows(seen_by_node_[static_cast<size_t>(node)]);
  }

  // Gradients go to where the block came in: in the first round, to its owner.
  void fold_here(Step& step) const {
    const int64_t t = step.number, d = distance(t);
    const int64_t origin = at(source(t), local_ - d), kept = at(source(t), local_);
    const int64_t reader = at(node_, local_ + d);
    const Ranges seen = fold(step, demand_, rank_, origin);
    if (d == 0) return;
    add(step.grad_sends, at(node_, local_ - d), origin, t, t + 1, seen);
    add(step.grad_recvs, reader, kept, t, t + 1, demand_.rows(kept, reader));
  }

  // The block that this rank keeps in the round of hop `next`, to its reader at that hop.
  void pass_on(Step& step, int64_t next) const {
    const int64_t t = step.number, d = distance(next);
    if (d == 0) return;
    const int64_t kept = at(source(next), local_), reader = at(node_, local_ + d);
    const int64_t coming = at(source(next), local_ - d);
    add(step.sends, reader, kept, t, t, demand_.rows(kept, reader));
    add(step.recvs, at(node_, local_ - d), coming, t, t, demand_.rows(coming, rank_));
  }

  // Own rows to the other node that reads them in `round`; there before its first block is passed
  // on, in the last hop of the round before.
  void cross(Step& step, int64_t round) const {
    const int64_t t = step.number, far = nearest(round, nodes_), due = t + locals_ - 2;
    const int64_t from = at(node_ - far, local_), to = at(node_ + far, local_);
    add(step.sends, to, rank_, t, due, rows_of_node(rank_, to / locals_));
    add(step.recvs, from, from, t, due, rows_of_node(from, node_));
  }

  // What this node has for the owner of the block kept in `round`, and others have for this rank.
  void cross_back(Step& step, int64_t round) const {
    const int64_t t = step.number, far = nearest(round, nodes_), due = t + locals_ - 1;
    const int64_t owner = at(node_ - far, local_), from = at(node_ + far, local_);
    add(step.grad_sends, owner, owner, t, due, rows_of_node(owner, node_));
    add(step.grad_recvs, from, rank_, t, due, rows_of_node(rank_, from / locals_));
  }

  const Demand demand_;
  const int64_t rank_, locals_, nodes_, node_, local_;
  std::vector<Ranges> seen_by_node_;
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

std::vector<Step> finish(int64_t rank, int64_t own_rows, std::vector<Step> hops, size_t resident) {
  std::map<int64_t, Ranges> held = {{rank, Ranges({{0, own_rows}})}};
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
  if (options.traveller == Traveller::kQueries && generator != "direct") {
    throw std::invalid_argument("planner: queries travel direct");
  }
  if ((generator == "double") != (locals > 1) || reads.world_size() % locals != 0) {
    throw std::invalid_argument("planner: a double ring, and nothing else, has nodes of ranks");
  }
  for (const Generator& g : generators()) {
    if (generator == g.name) {
      const Demand demand(reads, options.traveller);
      return finish(rank, demand.block(rank).size(), g.hops(reads, rank, options),
                    static_cast<size_t>(options.resident));
    }
  }
  throw std::invalid_argument("planner: no generator is called " + generator);
}

}  // namespace ring_attention::plan
