// SPDX-License-Identifier: BSD-3-Clause
//
// The operators of ring_attention: their schemas, and the CPU's implementations on the kernels of
// csrc/cpu. Written against LibTorch's stable ABI, so one binary serves every torch from 2.11 on.
#include <Python.h>

#include <atomic>
#include <exception>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "operators.h"

namespace ring_attention {
namespace {

// torch's parallel_for cuts [0, n) into one static chunk per thread, but causal tiles differ in
// work: so each chunk is a worker that takes tasks from a shared counter until none is left.
// Workers may not throw into libtorch's C interface; the first error is carried out by hand.
void run_tasks(int64_t tasks, void (*body)(void* context, int64_t task), void* context) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  const int64_t workers = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) noexcept {
    try {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        body(context, task);
      }
    } catch (...) {
      next.store(tasks, std::memory_order_relaxed);
      if (!failed.exchange(true)) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

Parallel on_torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()), run_tasks};
}

// The row of the ISA table in use, as Operators wants kernels.
class CpuKernels {
 public:
  explicit CpuKernels(const Tensor&) : isa_(cpu::isa()) {}

  int64_t alignment() const { return isa_.alignment; }
  void expect_supported(const Expect&, const Arg&) const {}  // all of DType

  void forward(const ForwardParams& params) const { isa_.forward(params, threads_); }
  void backward(const BackwardParams& params) const { isa_.backward(params, threads_); }
  void combine(DType state, int64_t rows, int64_t v_head_dim, void* acc, void* m, void* l,
               const void* other_acc, const void* other_m, const void* other_l) const {
    isa_.combine(state, rows, v_head_dim, acc, m, l, other_acc, other_m, other_l, threads_);
  }
  void finish(const ForwardParams& params) const { isa_.finish(params, threads_); }
  void delta(const DeltaParams& params) const { isa_.delta(params, threads_); }
  void sink_gradient(DType state, const void* sinks, const void* lse, const void* delta,
                     void* dsinks, int64_t batch, int64_t heads, int64_t q_len) const {
    isa_.sink_gradient(state, sinks, lse, delta, dsinks, batch, heads, q_len, threads_);
  }

 private:
  const cpu::Isa& isa_;
  Parallel threads_ = on_torch_threads();
};

std::string cpu_isa() { return cpu::isa().name; }

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const cpu::Isa& isa : cpu::isas()) {
    if (isa.supported()) names.emplace_back(isa.name);
  }
  return names;
}

// What the threads together reach in a loop of nothing but multiply-adds, for benchmarks.
double cpu_peak_flops(const Tensor& like, double seconds) {
  const DType dtype = Expect("cpu_peak_flops", like, 0).kernel_dtype({like, "like"});
  const Parallel parallel = on_torch_threads();
  std::vector<double> rates(static_cast<size_t>(parallel.threads));
  parallel(parallel.threads, [&](int64_t i) {
    rates[static_cast<size_t>(i)] = cpu::isa().peak_flops(dtype, seconds);
  });
  double sum = 0;
  for (double rate : rates) sum += rate;
  return sum;
}

}  // namespace

STABLE_TORCH_LIBRARY(ring_attention, m) {
  m.def(
      "block_forward_(Tensor q, Tensor[] k, Tensor[] v, Tensor[] key_begin, Tensor[] key_end, "
      "Tensor? sinks, Tensor(a!)? acc, Tensor(b!)? m, Tensor(c!)? l, Tensor(d!)? out, "
      "Tensor(e!)? lse, bool first, bool last, float scale, float softcap) -> ()");
  m.def(
      "block_backward_(Tensor q, Tensor dout, Tensor lse, Tensor delta, Tensor[] k, Tensor[] v, "
      "Tensor[] key_begin, Tensor[] key_end, Tensor(a!) dq, Tensor(b!)[] dk, Tensor(c!)[] dv, "
      "float scale, float softcap) -> ()");
  m.def(
      "combine_(Tensor(a!) acc, Tensor(b!) m, Tensor(c!) l, Tensor other_acc, Tensor other_m, "
      "Tensor other_l) -> ()");
  m.def("finish_(Tensor acc, Tensor m, Tensor l, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("delta(Tensor out, Tensor dout, Tensor? dlse) -> Tensor");
  m.def("sink_gradient(Tensor sinks, Tensor lse, Tensor delta) -> Tensor");
  m.def(
      "forward(Tensor q, Tensor k, Tensor v, Tensor key_begin, Tensor key_end, Tensor? sinks, "
      "float scale, float softcap) -> (Tensor out, Tensor lse)");
  m.def(
      "backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor key_begin, Tensor key_end, Tensor? sinks, float scale, float softcap) -> "
      "(Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)");
  m.def("cpu_isa() -> str");
  m.def("cpu_isas() -> str[]");
  m.def("cpu_peak_flops(Tensor like, float seconds) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(ring_attention, CPU, m) {
  Operators<CpuKernels>::implement(m);
  m.impl("cpu_peak_flops", TORCH_BOX(&cpu_peak_flops));
}

// No tensor argument says where these run.
STABLE_TORCH_LIBRARY_IMPL(ring_attention, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
}

}  // namespace ring_attention

// torch.ops.load_library loads this file, but setuptools builds it as a Python module, which
// needs an init function; importing it registers the same operators.
extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
