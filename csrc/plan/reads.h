// SPDX-License-Identifier: BSD-3-Clause
//
// Who reads what: the mask seen through two layouts.
#pragma once

#include <cstdint>
#include <vector>

#include "layout.h"
#include "segments.h"

namespace ring_attention::plan {

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
  // Query-key pairs between a shard of queries and a shard of keys, summed over the samples.
  int64_t pairs(int64_t reader, const Shard& keys) const;
  // The number of own key rows after which half of the pairs of the own block are done.
  int64_t own_split(int64_t rank) const;

 private:
  std::vector<Segments> samples_;
  Layout q_, k_;
};

}  // namespace ring_attention::plan
