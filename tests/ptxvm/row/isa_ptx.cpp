// SPDX-License-Identifier: BSD-3-Clause
//
// The rows "ptx-sm80" and "ptx-sm90" of the ISA table: the launchers of csrc/cuda, on host memory,
// through the virtual GPU, an A100 or an H100 as far as they ask. Kernels may touch what the params
// point at and nothing else. float64, which CUDA has no kernels for, goes to the portable row.
//
//   RING_ATTENTION_PTXVM_SEED   the order of blocks, warps and steps; 1 when unset
//   RING_ATTENTION_PTXVM_SMEM   KiB of shared memory a block may have; 163 or 227 when unset
//   RING_ATTENTION_PTXVM_STATISTICS   a file that is told at the end what each kernel executed
//   RING_ATTENTION_CUDA_BACKWARD=atomic   the backward whose dq is added up by atomics
#include "cpu/isa_ptx.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>

#include "../vm.h"
#include "cpu/isa.h"
#include "cuda/launch.h"
#include "cuda/settings.h"

namespace ring_attention::cpu::ptx {
namespace {

// The virtual GPU is one, and virtual ranks are threads.
std::mutex gpu;

long setting(const char* name, long otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::strtol(value, nullptr, 10);
}

// A line per kernel: its name, what a block takes, and what it executed.
void write_statistics() {
  std::ofstream file(std::getenv("RING_ATTENTION_PTXVM_STATISTICS"));
  for (const auto& [kernel, x] : ptxvm::statistics()) {
    file << kernel << ' ' << x.threads << ' ' << x.shared_bytes << ' ' << x.instructions << ' '
         << x.mma + x.wgmma << ' ' << x.shared_passes << ' ' << x.bank_conflicts << '\n';
  }
}

void set_up() {
  static const bool once = [] {
    ptxvm::Device device;
    long smem_kib = 163;
    if (isa().name == std::string_view(kHopper)) {
      device = {.sm_count = 132, .compute_major = 9, .compute_minor = 0};
      smem_kib = 227;
    }
    smem_kib = setting("RING_ATTENTION_PTXVM_SMEM", smem_kib);
    device.smem_optin_bytes = static_cast<int>(smem_kib) * 1024;
    ptxvm::set_device(device);
    ptxvm::set_seed(static_cast<uint64_t>(setting("RING_ATTENTION_PTXVM_SEED", 1)));
    if (std::getenv("RING_ATTENTION_PTXVM_STATISTICS") != nullptr) {
      ptxvm::Checks checks = ptxvm::checks();
      checks.bank_conflicts = true;
      ptxvm::set_checks(checks);
      std::atexit(write_statistics);  // after the machine was made, so that it is still there
    }
    return true;
  }();
  static_cast<void>(once);
}

int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kFloat64 ? 8 : 2;
}

// A call: holds the GPU, and what its kernels may touch.
class Call {
 public:
  Call() : lock_(gpu) {
    set_up();
    ptxvm::clear_error();
  }

  void reads(const void* data, int64_t elements, int64_t bytes = sizeof(float)) {
    add(data, elements * bytes, false);
  }
  void writes(void* data, int64_t elements, int64_t bytes = sizeof(float)) {
    add(data, elements * bytes, true);
  }

  // From the first to the last element of a strided tensor.
  void rows(const void* data, int64_t batch, int64_t heads, int64_t length, const Strides& stride,
            int64_t width, int64_t bytes, bool writable = false) {
    if (batch == 0 || heads == 0 || length == 0) return;
    const int64_t last =
        (batch - 1) * stride.batch + (heads - 1) * stride.head + (length - 1) * stride.row;
    add(data, (last + width) * bytes, writable);
  }

  void attention(const AttentionParams& p) {
    const int64_t bytes = bytes_of(p.dtype);
    rows(p.q, p.batch, p.heads, p.q_len, p.q_stride, p.head_dim, bytes);
    for (int64_t i = 0; i < p.num_blocks; ++i) {
      const KVBlock& b = p.blocks[i];
      rows(b.k, p.batch, p.kv_heads, b.k_len, b.k_stride, p.head_dim, bytes);
      rows(b.v, p.batch, p.kv_heads, b.k_len, b.v_stride, p.v_head_dim, bytes);
      rows(b.key_begin, p.batch, b.intervals, p.q_len, b.begin_stride, 1, sizeof(int32_t));
      rows(b.key_end, p.batch, b.intervals, p.q_len, b.end_stride, 1, sizeof(int32_t));
      writes(b.dk, p.batch * p.kv_heads * b.k_len * p.head_dim);
      writes(b.dv, p.batch * p.kv_heads * b.k_len * p.v_head_dim);
    }
  }

  void state(const ForwardParams& p, bool written) {
    const int64_t count = p.batch * p.heads * p.q_len;
    add(p.acc, count * p.v_head_dim * 4, written);
    add(p.m, count * 4, written);
    add(p.l, count * 4, written);
  }

  void output(const ForwardParams& p) {
    rows(p.out, p.batch, p.heads, p.q_len, p.out_stride, p.v_head_dim, bytes_of(p.dtype), true);
    writes(p.lse, p.batch * p.heads * p.q_len);
  }

  // Full of NaN.
  void* workspace(int64_t bytes) {
    if (bytes == 0) return nullptr;
    workspace_.reset(std::aligned_alloc(16, static_cast<size_t>((bytes + 15) / 16 * 16)));
    std::memset(workspace_.get(), 0xff, static_cast<size_t>(bytes));
    add(workspace_.get(), bytes, true);
    return workspace_.get();
  }

  void check(cudaError_t status) const {
    const std::string fault = ptxvm::last_error();
    if (!fault.empty()) throw std::runtime_error("ptxvm: " + fault);
    if (status != cudaSuccess) {
      throw std::runtime_error("ptxvm: a launcher returned " +
                               std::string(cudaGetErrorString(status)));
    }
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  void add(const void* data, int64_t bytes, bool writable) {
    if (data != nullptr && bytes > 0) {
      memory_.emplace_back(data, static_cast<size_t>(bytes), writable);
    }
  }

  std::lock_guard<std::mutex> lock_;
  std::unique_ptr<void, Free> workspace_;
  std::deque<ptxvm::Memory> memory_;
};

cuda::Device device() { return cuda::device_of(0); }

}  // namespace

bool supported() { return true; }
bool recommended() { return false; }

void forward(const ForwardParams& params, const Parallel& parallel) {
  if (params.dtype == DType::kFloat64) return scalar::forward(params, parallel);
  Call call;
  call.attention(params);
  call.reads(params.sinks, params.heads);
  call.state(params, !params.last);
  if (params.last) call.output(params);
  void* workspace = call.workspace(cuda::forward_workspace_bytes(params, device()));
  call.check(cuda::forward(params, workspace, device(), nullptr));
}

void backward(const BackwardParams& given, const Parallel& parallel) {
  if (given.dtype == DType::kFloat64) return scalar::backward(given, parallel);
  BackwardParams params = given;
  params.deterministic = cuda::deterministic_backward();
  const int64_t rows = params.batch * params.heads * params.q_len;
  Call call;
  call.attention(params);
  call.rows(params.dout, params.batch, params.heads, params.q_len, params.dout_stride,
            params.v_head_dim, bytes_of(params.dtype));
  call.reads(params.lse, rows);
  call.reads(params.delta, rows);
  call.writes(params.dq, rows * params.head_dim);
  void* workspace = call.workspace(cuda::backward_workspace_bytes(params, device()));
  call.check(cuda::backward(params, workspace, device(), nullptr));
}

double peak_flops(DType dtype, double seconds) { return scalar::peak_flops(dtype, seconds); }

void combine(DType state, int64_t rows, int64_t v_head_dim, void* acc, void* m, void* l,
             const void* other_acc, const void* other_m, const void* other_l,
             const Parallel& parallel) {
  if (state == DType::kFloat64) {
    return cpu::combine(state, rows, v_head_dim, acc, m, l, other_acc, other_m, other_l, parallel);
  }
  Call call;
  call.writes(acc, rows * v_head_dim);
  call.writes(m, rows);
  call.writes(l, rows);
  call.reads(other_acc, rows * v_head_dim);
  call.reads(other_m, rows);
  call.reads(other_l, rows);
  call.check(cuda::combine(rows, v_head_dim, acc, m, l, other_acc, other_m, other_l, nullptr));
}

void finish(const ForwardParams& params, const Parallel& parallel) {
  if (params.dtype == DType::kFloat64) return cpu::finish(params, parallel);
  Call call;
  call.state(params, false);
  call.output(params);
  call.check(cuda::finish(params, nullptr));
}

void delta(const DeltaParams& params, const Parallel& parallel) {
  if (params.dtype == DType::kFloat64) return cpu::delta(params, parallel);
  const int64_t rows = params.batch * params.heads * params.q_len;
  Call call;
  call.rows(params.out, params.batch, params.heads, params.q_len, params.out_stride,
            params.v_head_dim, bytes_of(params.dtype));
  call.rows(params.dout, params.batch, params.heads, params.q_len, params.dout_stride,
            params.v_head_dim, bytes_of(params.dtype));
  if (params.dlse != nullptr) call.reads(params.dlse, rows);
  call.writes(params.delta, rows);
  call.check(cuda::delta(params, nullptr));
}

void sink_gradient(DType state, const void* sinks, const void* lse, const void* delta, void* dsinks,
                   int64_t batch, int64_t heads, int64_t q_len, const Parallel& parallel) {
  if (state == DType::kFloat64) {
    return cpu::sink_gradient(state, sinks, lse, delta, dsinks, batch, heads, q_len, parallel);
  }
  Call call;
  call.reads(sinks, heads);
  call.reads(lse, batch * heads * q_len);
  call.reads(delta, batch * heads * q_len);
  call.writes(dsinks, heads);
  call.check(cuda::sink_gradient(static_cast<const float*>(sinks), static_cast<const float*>(lse),
                                 static_cast<const float*>(delta), static_cast<float*>(dsinks),
                                 batch, heads, q_len, nullptr));
}

}  // namespace ring_attention::cpu::ptx
