// SPDX-License-Identifier: BSD-3-Clause
//
// Who reads what: the mask seen through two layouts.
#pragma once

#include <cstdint>
#include <vector>

#include "layout.h"
#include "segments.h"

namespace ring_attention::plan {

// Calls visit(run) for a run as a whole, or for each of its blocks where a mask has so many
// segments between them that most hold no row of the run.
template <typename Visit>
void for_each_block_among(const Run& run, const Segments& mask, const Visit& visit) {
  constexpr int64_t kMany = 8;  // segments per block
  const int64_t segments = mask.from(run.end()) - mask.from(run.start);
  if (run.count == 1 || run.count * kMany > segments) return visit(run);
  for (int64_t i = 0; i < run.count; ++i) {
    visit(Run{run.start + i * run.stride, run.block, run.block, 1});
  }
}

class Reads {
 public:
  // One table for all samples of a batch, or one for each.
  Reads(std::vector<Segments> samples, Layout q, Layout k);

  int64_t world_size() const { return k_.world_size(); }
  const Layout& q() const { return q_; }
  const Layout& k() const { return k_; }
  const std::vector<Segments>& samples() const { return samples_; }

  // Exactly the key positions that some query of `reader` sees in some sample.
  Ranges visible(int64_t reader) const;
  // Exactly the rows of `owner`'s queries that see one of `keys` in some sample.
  Ranges viewers(int64_t owner, const Shard& keys) const;
  // Query-key pairs between a shard of queries and a shard of keys, summed over the samples.
  int64_t pairs(int64_t reader, const Shard& keys) const;
  // The number of own key rows after which half of the pairs of the own block are done.
  int64_t own_split(int64_t rank) const;

 private:
  std::vector<Segments> samples_;
  Layout q_, k_;
};

}  // namespace ring_attention::plan
