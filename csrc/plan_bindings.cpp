// SPDX-License-Identifier: BSD-3-Clause
//
// The planner as the Python module ring_attention._planner. Tensors come as addresses that the
// caller has allocated (plan.py, mask.py): there is no torch in here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "plan/key_intervals.h"
#include "plan/layout.h"
#include "plan/ranges.h"
#include "plan/reads.h"
#include "plan/schedule.h"
#include "plan/segments.h"

namespace py = pybind11;

namespace ring_attention::plan {
namespace {

using Release = py::call_guard<py::gil_scoped_release>;

// (begin, end, lo, lo slope, hi, hi slope), bounds as lines through position 0
using SegmentTuple = std::array<int64_t, 6>;
using RunTuple = std::array<int64_t, 4>;  // (start, block, stride, count)

Segments make_segments(int64_t q_len, int64_t k_len, const std::vector<SegmentTuple>& tuples) {
  std::vector<Segment> stretches;
  for (const auto& [begin, end, lo, lo_slope, hi, hi_slope] : tuples) {
    stretches.push_back({begin, end, {lo, lo_slope}, {hi, hi_slope}});
  }
  return Segments(q_len, k_len, stretches);
}

// Rows [q[i], q[i + 1]) see the keys [k[i], k[i + 1]), for every i that is not in `hidden`
// (sorted).
Segments make_blocks(int64_t q_len, int64_t k_len, const std::vector<int64_t>& q,
                     const std::vector<int64_t>& k, const std::vector<int64_t>& hidden) {
  if (q.size() != k.size()) {
    throw std::invalid_argument("planner: blocks have as many bounds for keys as for queries");
  }
  std::vector<Segment> stretches;
  auto skip = hidden.begin();
  for (size_t i = 0; i + 1 < q.size(); ++i) {
    if (skip != hidden.end() && *skip == static_cast<int64_t>(i)) {
      ++skip;
    } else if (q[i] < q[i + 1]) {
      stretches.push_back({q[i], q[i + 1], {k[i], 0}, {k[i + 1], 0}});
    }
  }
  return Segments(q_len, k_len, stretches);
}

std::vector<SegmentTuple> segment_tuples(const Segments& mask) {
  std::vector<SegmentTuple> tuples;
  for (const Segment& s : mask.list()) {
    tuples.push_back({s.begin, s.end, s.lo.base, s.lo.slope, s.hi.base, s.hi.slope});
  }
  return tuples;
}

// Writes lo and hi, int64 [intervals, q_len] with `stride` elements between intervals, zeroed.
void fill_positions(const Segments& mask, int64_t lo, int64_t hi, int64_t stride) {
  auto* const lo_out = reinterpret_cast<int64_t*>(lo);
  auto* const hi_out = reinterpret_cast<int64_t*>(hi);
  int64_t begin = -1, n = 0;
  for (const Segment& s : mask.list()) {
    n = s.begin == begin ? n + 1 : 0;
    begin = s.begin;
    for (int64_t p = s.begin; p < s.end; ++p) {
      lo_out[n * stride + p] = s.lo.at(p);
      hi_out[n * stride + p] = s.hi.at(p);
    }
  }
}

Layout make_layout(int64_t length, const std::vector<std::vector<RunTuple>>& ranks) {
  std::vector<Shard> shards;
  for (const auto& tuples : ranks) {
    std::vector<Run> runs;
    for (const auto& [start, block, stride, count] : tuples) {
      runs.push_back({start, block, stride, count});
    }
    shards.emplace_back(std::move(runs));
  }
  return Layout(length, std::move(shards));
}

Ranges make_ranges(const std::vector<std::array<int64_t, 2>>& tuples) {
  std::vector<Range> ranges;
  for (const auto& [begin, end] : tuples) ranges.push_back({begin, end});
  return Ranges(std::move(ranges));
}

py::tuple range_tuples(const Ranges& ranges) {
  py::tuple out(ranges.list().size());
  for (size_t i = 0; i < ranges.list().size(); ++i) {
    out[i] = py::make_tuple(ranges.list()[i].begin, ranges.list()[i].end);
  }
  return out;
}

// Writes the integers of the ranges, int64 [size].
void fill_indices(const Ranges& ranges, int64_t out) {
  auto* index = reinterpret_cast<int64_t*>(out);
  for (const Range& range : ranges.list()) {
    for (int64_t i = range.begin; i < range.end; ++i) *index++ = i;
  }
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cxx_standard"] = static_cast<int64_t>(__cplusplus);
  info["pybind11"] = PYBIND11_VERSION_MAJOR * 100 + PYBIND11_VERSION_MINOR;
  return info;
}

}  // namespace

PYBIND11_MODULE(_planner, m) {
  m.doc() = "The planner: masks and layouts to schedules, row ranges and key intervals.";
  m.attr("MAX_INTERVALS") = kMaxIntervals;
  py::tuple names(generators().size());
  for (size_t i = 0; i < generators().size(); ++i) names[i] = generators()[i].name;
  m.attr("GENERATORS") = names;
  m.def("build_info", &build_info);

  py::class_<Ranges>(m, "Ranges")
      .def(py::init(&make_ranges), py::arg("ranges"))
      .def("tuples", &range_tuples)
      .def("__len__", [](const Ranges& self) { return self.list().size(); })
      .def("__eq__", [](const Ranges& self, const Ranges& other) { return self == other; })
      .def("fill", &fill_indices, py::arg("out"), Release())
      .def_property_readonly("rows", &Ranges::size);

  py::class_<Segments>(m, "Segments")
      .def(py::init(&make_segments), py::arg("q_len"), py::arg("k_len"), py::arg("segments"))
      .def_static("blocks", &make_blocks, py::arg("q_len"), py::arg("k_len"), py::arg("q_bounds"),
                  py::arg("k_bounds"), py::arg("hidden") = std::vector<int64_t>())
      .def("__and__", &intersect, py::is_operator(), Release())
      .def("__or__", py::overload_cast<const Segments&, const Segments&>(&unite), py::is_operator(),
           Release())
      .def("__eq__", [](const Segments& self, const Segments& other) { return self == other; })
      .def("__len__", [](const Segments& self) { return self.list().size(); })
      .def("tuples", &segment_tuples)
      .def("intervals",
           [](const Segments& self) {
             int64_t row = 0;
             const int most = self.intervals(&row);
             return py::make_tuple(most, row);
           })
      .def("fill", &fill_positions, py::arg("lo"), py::arg("hi"), py::arg("stride"), Release());

  py::class_<Layout>(m, "Layout")
      .def(py::init(&make_layout), py::arg("length"), py::arg("runs"))
      .def("size", [](const Layout& self, int64_t rank) { return self.shard(rank).size(); });

  py::class_<Transfer>(m, "Transfer")
      .def_readonly("peer", &Transfer::peer)
      .def_readonly("origin", &Transfer::origin)
      .def_readonly("hop", &Transfer::hop)
      .def_readonly("due", &Transfer::due)
      .def_readonly("ranges", &Transfer::rows);
  py::class_<Step>(m, "Step")
      .def_readonly("number", &Step::number)
      .def_readonly("folds", &Step::folds)
      .def_readonly("sends", &Step::sends)
      .def_readonly("recvs", &Step::recvs)
      .def_readonly("grad_sends", &Step::grad_sends)
      .def_readonly("grad_recvs", &Step::grad_recvs)
      .def_readonly("release", &Step::release)
      .def_readonly("flops", &Step::flops);

  py::class_<KeyIntervals>(m, "KeyIntervals")
      .def_property_readonly("most", &KeyIntervals::most)
      .def_property_readonly("rows", &KeyIntervals::rows)
      .def(
          "fill",
          [](const KeyIntervals& self, int64_t begin, int64_t end) {
            return self.fill(reinterpret_cast<int32_t*>(begin), reinterpret_cast<int32_t*>(end));
          },
          py::arg("begin"), py::arg("end"), Release());

  py::class_<Reads>(m, "Reads")
      .def(py::init<std::vector<Segments>, Layout, Layout>(), py::arg("samples"),
           py::arg("q_layout"), py::arg("k_layout"))
      .def_property_readonly("samples", [](const Reads& self) { return self.samples().size(); })
      .def(
          "pairs",
          [](const Reads& self, int64_t rank, int64_t origin) {
            return self.pairs(rank, self.k().shard(origin));
          },
          py::arg("rank"), py::arg("origin"), Release())
      .def(
          "schedule",
          [](const Reads& self, int64_t rank, const std::string& generator, int64_t resident,
             int64_t ranks_per_node, bool queries_travel) {
            const auto traveller = queries_travel ? Traveller::kQueries : Traveller::kKeys;
            return schedule(self, rank, generator, {traveller, resident, ranks_per_node});
          },
          py::arg("rank"), py::arg("generator"), py::arg("resident"), py::arg("ranks_per_node"),
          py::arg("queries_travel"), Release())
      .def(
          "key_intervals",
          [](const Reads& self, int64_t rank, int64_t origin, const Ranges& held) {
            return KeyIntervals(self, rank, origin, held);
          },
          py::arg("rank"), py::arg("origin"), py::arg("held"), py::keep_alive<0, 1>(),
          py::keep_alive<0, 4>(), Release());
}

}  // namespace ring_attention::plan
