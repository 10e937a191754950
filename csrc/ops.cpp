// SPDX-License-Identifier: BSD-3-Clause
//
// The operators of ring_attention on the CPU: schemas, what memory safety needs checked, and the
// hand-over to the kernels of csrc/cpu as the plain structs of params.h. Written against
// LibTorch's stable ABI, so one binary serves every torch from 2.11 on. Shapes and semantics are
// documented where users meet them, in ring_attention/ops.py.
#include <Python.h>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"  // in torch's headers
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#pragma GCC diagnostic pop

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "params.h"

namespace ring_attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

// ---------------------------------------------------------------------------------------------
// Errors: op, argument, expectation, value, remedy.

template <typename... Parts>
void expect(bool ok, const char* op, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  message << "ring_attention." << op << ": expected ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// An argument as messages name it: "q", or "k[2]" for an entry of a list.
struct Arg {
  const Tensor& tensor;
  const char* name;
  int64_t index = -1;
};

std::ostream& operator<<(std::ostream& stream, const Arg& arg) {
  stream << arg.name;
  if (arg.index >= 0) stream << '[' << arg.index << ']';
  return stream;
}

struct Shape {
  const int64_t* sizes;
  size_t dims;
};

std::ostream& operator<<(std::ostream& stream, const Shape& shape) {
  stream << '[';
  for (size_t i = 0; i < shape.dims; ++i) stream << (i ? ", " : "") << shape.sizes[i];
  return stream << ']';
}

Shape shape_of(const Tensor& tensor) {
  return {tensor.sizes().data(), static_cast<size_t>(tensor.dim())};
}

void expect_dtype(const char* op, const Arg& arg, ScalarType dtype, const char* remedy) {
  expect(arg.tensor.scalar_type() == dtype, op, arg, ".dtype == ", toString(dtype), ", got ",
         toString(arg.tensor.scalar_type()), "; ", remedy);
}

void expect_cpu(const char* op, const Arg& arg) {
  expect(arg.tensor.is_cpu(), op, arg, " on the CPU, got another device; move it with .cpu()");
}

void expect_shape(const char* op, const Arg& arg, std::initializer_list<int64_t> sizes,
                  const char* meaning) {
  const Shape got = shape_of(arg.tensor);
  expect(got.dims == sizes.size() && std::equal(sizes.begin(), sizes.end(), got.sizes), op, arg,
         ".shape == ", Shape{sizes.begin(), sizes.size()}, ", got ", got, "; it is ", meaning);
}

// A buffer the kernels address as one dense array.
void expect_dense(const char* op, const Arg& arg, ScalarType dtype,
                  std::initializer_list<int64_t> sizes, const char* meaning) {
  expect_cpu(op, arg);
  expect_dtype(op, arg, dtype,
               "states, lse, delta and gradients are float32 (float64 for float64)");
  expect_shape(op, arg, sizes, meaning);
  expect(arg.tensor.is_contiguous(), op, arg, " contiguous, got strides ",
         Shape{arg.tensor.strides().data(), sizes.size()}, "; pass a contiguous tensor");
}

// ---------------------------------------------------------------------------------------------
// Tensors as the kernels see them.

ScalarType state_dtype(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

DType kernel_dtype(const char* op, const Arg& arg) {
  switch (arg.tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      expect(false, op, arg, ".dtype float32, bfloat16, float16 or float64, got ",
             toString(arg.tensor.scalar_type()), "; cast it");
      return DType::kFloat32;
  }
}

Strides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Kernels read rows of contiguous, aligned elements. A tensor that has none is copied once.
Tensor with_dense_rows(const Tensor& tensor) {
  Tensor result = tensor;
  if (result.stride(3) != 1) result = torch::stable::contiguous(result);
  const auto address = reinterpret_cast<uintptr_t>(result.const_data_ptr());
  if (address % result.element_size() != 0) result = torch::stable::clone(result);
  return result;
}

// A written tensor: no copy can stand in for it, and no two of its elements may share memory.
void expect_writable_rows(const char* op, const Arg& arg) {
  const Shape strides{arg.tensor.strides().data(), 4};
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size), innermost first
  for (int d = 0; d < 4; ++d) {
    if (arg.tensor.size(d) > 1) dims.emplace_back(arg.tensor.stride(d), arg.tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t extent = 1;
  bool disjoint = arg.tensor.numel() == 0 || arg.tensor.stride(3) == 1;
  for (const auto& [stride, size] : dims) {
    disjoint = disjoint && stride >= extent;
    extent = std::max(extent, stride * size);
  }
  expect(disjoint, op, arg, " with rows of their own, last dimension contiguous, got strides ",
         strides, "; pass memory that is not expanded or transposed in the last dimension");
}

// ---------------------------------------------------------------------------------------------
// Threads.

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

// ---------------------------------------------------------------------------------------------
// The part forward and backward share.

void expect_head_dim(const char* op, const Arg& arg) {
  const int64_t dim = arg.tensor.size(3);
  expect(16 <= dim && dim <= 256 && dim % 8 == 0, op, arg,
         ".shape[3] in 16, 24, ..., 256 (steps of 8), got ", dim, "; pad the heads with zeros");
}

void expect_bhsd(const char* op, const Arg& arg) {
  expect(arg.tensor.dim() == 4, op, arg, " to have 4 dimensions [batch, heads, length, head_dim], ",
         "got shape ", shape_of(arg.tensor), "; reshape it");
  expect_cpu(op, arg);
}

// The q side of a call, and its K/V blocks. Owns what had to be copied.
struct Call {
  std::vector<KVBlock> blocks;
  Tensors kept;

  const Tensor& keep(const Tensor& tensor) { return kept.emplace_back(with_dense_rows(tensor)); }

  void set_query(const char* op, const Tensor& q, double scale, double softcap,
                 AttentionParams& params) {
    const Arg arg{q, "q"};
    expect_bhsd(op, arg);
    expect_head_dim(op, arg);
    params.dtype = kernel_dtype(op, arg);
    params.batch = q.size(0);
    params.heads = q.size(1);
    params.q_len = q.size(2);
    params.head_dim = q.size(3);
    const Tensor& rows = keep(q);
    params.q = rows.const_data_ptr();
    params.q_stride = strides_of(rows);
    params.scale = scale;
    params.softcap = softcap;
  }

  // v_head_dim is known from out or dout: the lists may be empty. kv_heads must agree in all.
  void set_blocks(const char* op, const Tensor& q, const Tensors& k, const Tensors& v,
                  const Tensors& key_begin, const Tensors& key_end, AttentionParams& params) {
    expect_same_length(op, k, "k", v, "v");
    expect_same_length(op, k, "k", key_begin, "key_begin");
    expect_same_length(op, k, "k", key_end, "key_end");
    params.kv_heads = params.heads;
    blocks.resize(k.size());
    for (size_t i = 0; i < k.size(); ++i) {
      const auto index = static_cast<int64_t>(i);
      const Arg k_arg{k[i], "k", index}, v_arg{v[i], "v", index};
      expect_bhsd(op, k_arg);
      if (i == 0) params.kv_heads = k[0].size(1);
      const int64_t k_len = k[i].size(2);
      expect_dtype(op, k_arg, q.scalar_type(), "q, k and v need the same dtype");
      expect_shape(op, k_arg, {params.batch, params.kv_heads, k_len, params.head_dim},
                   "[batch, kv_heads, k_len, head_dim] of this call");
      expect_cpu(op, v_arg);
      expect_dtype(op, v_arg, q.scalar_type(), "q, k and v need the same dtype");
      expect_shape(op, v_arg, {params.batch, params.kv_heads, k_len, params.v_head_dim},
                   "[batch, kv_heads, k_len, v_head_dim] of this call");
      expect(k_len <= std::numeric_limits<int32_t>::max(), op, k_arg, ".shape[2] < 2^31, got ",
             k_len, "; key indices are int32: pass several blocks");

      KVBlock& block = blocks[i];
      block.k_len = k_len;
      const Tensor& k_rows = keep(k[i]);
      block.k = k_rows.const_data_ptr();
      block.k_stride = strides_of(k_rows);
      const Tensor& v_rows = keep(v[i]);
      block.v = v_rows.const_data_ptr();
      block.v_stride = strides_of(v_rows);
      block.intervals = key_begin[i].dim() > 0 ? key_begin[i].size(0) : 0;
      block.key_begin =
          bounds(op, {key_begin[i], "key_begin", index}, block, params, block.begin_stride);
      block.key_end = bounds(op, {key_end[i], "key_end", index}, block, params, block.end_stride);
    }
    expect(params.kv_heads > 0 && params.heads % params.kv_heads == 0, op,
           "q.shape[1] to be a multiple of k[0].shape[1], got ", params.heads, " and ",
           params.kv_heads, "; every K/V head serves the same number of query heads");
  }

 private:
  static void expect_same_length(const char* op, const Tensors& a, const char* a_name,
                                 const Tensors& b, const char* b_name) {
    expect(a.size() == b.size(), op, "len(", b_name, ") == len(", a_name, "), got ", b.size(),
           " and ", a.size(), "; each block has one entry in every list");
  }

  static const int32_t* bounds(const char* op, const Arg& arg, const KVBlock& block,
                               const AttentionParams& params, Strides& strides) {
    const Tensor& tensor = arg.tensor;
    expect_cpu(op, arg);
    expect_dtype(op, arg, ScalarType::Int, "interval bounds are int32");
    expect(tensor.dim() == 3 && tensor.size(0) == block.intervals &&
               (tensor.size(1) == params.batch || tensor.size(1) == 1) &&
               tensor.size(2) == params.q_len,
           op, arg, ".shape == [", block.intervals, ", ", params.batch, " or 1, ", params.q_len,
           "], got ", shape_of(tensor), "; it is [intervals, batch or 1, q_len]");
    // .head is the stride of the interval dimension, see params.h.
    strides = {tensor.size(1) == 1 ? 0 : tensor.stride(1), tensor.stride(0), tensor.stride(2)};
    return tensor.const_data_ptr<int32_t>();
  }
};

// ---------------------------------------------------------------------------------------------
// The operators.

void* pointer(const OptionalTensor& tensor) {
  return tensor ? tensor->mutable_data_ptr() : nullptr;
}

// What out and state look like is shared by block_forward_, finish_ and delta.
void set_output(const char* op, const Tensor& out, const Tensor& lse, ForwardParams& params) {
  const ScalarType state = params.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  expect_shape(op, {out, "out"}, {params.batch, params.heads, params.q_len, params.v_head_dim},
               "[batch, heads, q_len, v_head_dim]");
  expect_writable_rows(op, {out, "out"});
  expect_dense(op, {lse, "lse"}, state, {params.batch, params.heads, params.q_len},
               "[batch, heads, q_len]");
  params.out = out.mutable_data_ptr();
  params.out_stride = strides_of(out);
  params.lse = lse.mutable_data_ptr();
}

void set_state(const char* op, const OptionalTensor& acc, const OptionalTensor& m,
               const OptionalTensor& l, ScalarType state, ForwardParams& params) {
  expect(acc.has_value() == m.has_value() && m.has_value() == l.has_value(), op,
         "acc, m and l all given or all None, got some; a state is the three of them");
  if (!acc) return;
  expect_dense(op, {*acc, "acc"}, state,
               {params.batch, params.heads, params.q_len, params.v_head_dim},
               "[batch, heads, q_len, v_head_dim]");
  expect_dense(op, {*m, "m"}, state, {params.batch, params.heads, params.q_len},
               "[batch, heads, q_len]");
  expect_dense(op, {*l, "l"}, state, {params.batch, params.heads, params.q_len},
               "[batch, heads, q_len]");
  params.acc = pointer(acc);
  params.m = pointer(m);
  params.l = pointer(l);
}

bool has_rows(const AttentionParams& params) {
  return params.batch > 0 && params.heads > 0 && params.q_len > 0;
}

void fold(const char* op, const Tensor& q, const Tensors& k, const Tensors& v,
          const Tensors& key_begin, const Tensors& key_end, const OptionalTensor& sinks,
          const OptionalTensor& acc, const OptionalTensor& m, const OptionalTensor& l,
          const OptionalTensor& out, const OptionalTensor& lse, bool first, bool last, double scale,
          double softcap) {
  Call call;
  ForwardParams params;
  params.first = first;
  params.last = last;
  call.set_query(op, q, scale, softcap, params);
  const ScalarType state = state_dtype(q);

  expect(acc.has_value() || (first && last), op,
         "acc, m and l unless first and last, got None; allocate a state to carry");
  expect(!last || (out.has_value() && lse.has_value()), op,
         "out and lse with last, got None; allocate what the last fold writes");
  const Arg wide = out ? Arg{*out, "out"} : Arg{*acc, "acc"};
  expect_bhsd(op, wide);
  expect_head_dim(op, wide);
  params.v_head_dim = wide.tensor.size(3);
  set_state(op, acc, m, l, state, params);
  if (last) {
    expect_dtype(op, {*out, "out"}, q.scalar_type(), "out has the dtype of q");
    set_output(op, *out, *lse, params);
  }
  call.set_blocks(op, q, k, v, key_begin, key_end, params);
  if (sinks) {
    expect(first, op, "no sinks unless first, got some; they are part of the initial state");
    expect_dense(op, {*sinks, "sinks"}, state, {params.heads}, "[heads]");
    params.sinks = sinks->const_data_ptr();
  }
  params.blocks = call.blocks.data();
  params.num_blocks = static_cast<int64_t>(call.blocks.size());
  if (has_rows(params)) cpu::isa().forward(params, on_torch_threads());
}

void block_forward_(const Tensor& q, const Tensors& k, const Tensors& v, const Tensors& key_begin,
                    const Tensors& key_end, const OptionalTensor& sinks, const OptionalTensor& acc,
                    const OptionalTensor& m, const OptionalTensor& l, const OptionalTensor& out,
                    const OptionalTensor& lse, bool first, bool last, double scale,
                    double softcap) {
  fold("block_forward_", q, k, v, key_begin, key_end, sinks, acc, m, l, out, lse, first, last,
       scale, softcap);
}

// Two accumulators in the same memory would be a race between blocks.
void expect_disjoint(const char* op, const Tensors& dk, const Tensors& dv) {
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
  for (const Tensors* list : {&dk, &dv}) {
    for (const Tensor& grad : *list) {
      const auto begin = reinterpret_cast<uintptr_t>(grad.const_data_ptr());
      const auto bytes = static_cast<uintptr_t>(grad.numel()) * grad.element_size();
      if (bytes > 0) ranges.emplace_back(begin, begin + bytes);
    }
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    expect(ranges[i - 1].second <= ranges[i].first, op,
           "dk and dv that do not overlap, got two in the same memory; give each block its own");
  }
}

void accumulate_gradients(const char* op, const Tensor& q, const Tensor& dout, const Tensor& lse,
                          const Tensor& delta, const Tensors& k, const Tensors& v,
                          const Tensors& key_begin, const Tensors& key_end, const Tensor& dq,
                          const Tensors& dk, const Tensors& dv, double scale, double softcap) {
  Call call;
  BackwardParams params;
  call.set_query(op, q, scale, softcap, params);
  const ScalarType state = state_dtype(q);
  const Arg dout_arg{dout, "dout"};
  expect_bhsd(op, dout_arg);
  expect_head_dim(op, dout_arg);
  params.v_head_dim = dout.size(3);
  expect_dtype(op, dout_arg, q.scalar_type(), "dout has the dtype of q");
  expect_shape(op, dout_arg, {params.batch, params.heads, params.q_len, params.v_head_dim},
               "[batch, heads, q_len, v_head_dim]");
  const Tensor& dout_rows = call.keep(dout);
  params.dout = dout_rows.const_data_ptr();
  params.dout_stride = strides_of(dout_rows);
  expect_dense(op, {lse, "lse"}, state, {params.batch, params.heads, params.q_len},
               "[batch, heads, q_len]");
  expect_dense(op, {delta, "delta"}, state, {params.batch, params.heads, params.q_len},
               "[batch, heads, q_len]");
  expect_dense(op, {dq, "dq"}, state, {params.batch, params.heads, params.q_len, params.head_dim},
               "[batch, heads, q_len, head_dim]");
  params.lse = lse.const_data_ptr();
  params.delta = delta.const_data_ptr();
  params.dq = dq.mutable_data_ptr();

  call.set_blocks(op, q, k, v, key_begin, key_end, params);
  expect(dk.size() == k.size() && dv.size() == k.size(), op, "len(dk) and len(dv) == len(k), got ",
         dk.size(), ", ", dv.size(), " and ", k.size(), "; each block has one entry in every list");
  for (size_t i = 0; i < dk.size(); ++i) {
    KVBlock& block = call.blocks[i];
    const auto index = static_cast<int64_t>(i);
    expect_dense(op, {dk[i], "dk", index}, state,
                 {params.batch, params.kv_heads, block.k_len, params.head_dim}, "shaped like k");
    expect_dense(op, {dv[i], "dv", index}, state,
                 {params.batch, params.kv_heads, block.k_len, params.v_head_dim}, "shaped like v");
    block.dk = dk[i].mutable_data_ptr();
    block.dv = dv[i].mutable_data_ptr();
  }
  expect_disjoint(op, dk, dv);
  params.blocks = call.blocks.data();
  params.num_blocks = static_cast<int64_t>(call.blocks.size());
  if (has_rows(params)) cpu::isa().backward(params, on_torch_threads());
}

void block_backward_(const Tensor& q, const Tensor& dout, const Tensor& lse, const Tensor& delta,
                     const Tensors& k, const Tensors& v, const Tensors& key_begin,
                     const Tensors& key_end, const Tensor& dq, const Tensors& dk, const Tensors& dv,
                     double scale, double softcap) {
  accumulate_gradients("block_backward_", q, dout, lse, delta, k, v, key_begin, key_end, dq, dk, dv,
                       scale, softcap);
}

// A state given by itself: its dtype and shape say what it is.
ForwardParams state_params(const char* op, const Tensor& acc, const Tensor& m, const Tensor& l) {
  ForwardParams params;
  const Arg arg{acc, "acc"};
  expect_bhsd(op, arg);
  const ScalarType state = acc.scalar_type();
  expect(state == ScalarType::Float || state == ScalarType::Double, op,
         "acc.dtype float32 or float64, got ", toString(state), "; a state is never 16-bit");
  params.batch = acc.size(0);
  params.heads = acc.size(1);
  params.q_len = acc.size(2);
  params.v_head_dim = acc.size(3);
  set_state(op, acc, m, l, state, params);
  return params;
}

void combine_(const Tensor& acc, const Tensor& m, const Tensor& l, const Tensor& other_acc,
              const Tensor& other_m, const Tensor& other_l) {
  const ForwardParams params = state_params("combine_", acc, m, l);
  const ScalarType state = acc.scalar_type();
  expect_dense("combine_", {other_acc, "other_acc"}, state,
               {params.batch, params.heads, params.q_len, params.v_head_dim}, "shaped like acc");
  expect_dense("combine_", {other_m, "other_m"}, state, {params.batch, params.heads, params.q_len},
               "shaped like m");
  expect_dense("combine_", {other_l, "other_l"}, state, {params.batch, params.heads, params.q_len},
               "shaped like l");
  if (!has_rows(params)) return;
  cpu::combine(state == ScalarType::Double ? DType::kFloat64 : DType::kFloat32,
               params.batch * params.heads * params.q_len, params.v_head_dim, params.acc, params.m,
               params.l, other_acc.const_data_ptr(), other_m.const_data_ptr(),
               other_l.const_data_ptr(), on_torch_threads());
}

void finish_(const Tensor& acc, const Tensor& m, const Tensor& l, const Tensor& out,
             const Tensor& lse) {
  ForwardParams params = state_params("finish_", acc, m, l);
  const Arg arg{out, "out"};
  expect_bhsd("finish_", arg);
  params.dtype = kernel_dtype("finish_", arg);
  expect(state_dtype(out) == acc.scalar_type(), "finish_",
         "acc.dtype == ", toString(state_dtype(out)), " for out.dtype ",
         toString(out.scalar_type()), ", got ", toString(acc.scalar_type()),
         "; states are float32, and float64 for float64 outputs");
  set_output("finish_", out, lse, params);
  if (has_rows(params)) cpu::finish(params, on_torch_threads());
}

Tensor delta_of(const char* op, const Tensor& out, const Tensor& dout, const OptionalTensor& dlse) {
  const Arg out_arg{out, "out"}, dout_arg{dout, "dout"};
  expect_bhsd(op, out_arg);
  expect_cpu(op, dout_arg);
  DeltaParams params;
  params.dtype = kernel_dtype(op, out_arg);
  params.batch = out.size(0);
  params.heads = out.size(1);
  params.q_len = out.size(2);
  params.v_head_dim = out.size(3);
  expect_dtype(op, dout_arg, out.scalar_type(), "dout has the dtype of out");
  expect_shape(op, dout_arg, {params.batch, params.heads, params.q_len, params.v_head_dim},
               "shaped like out");
  const ScalarType state = state_dtype(out);
  const Tensor out_rows = with_dense_rows(out), dout_rows = with_dense_rows(dout);
  params.out = out_rows.const_data_ptr();
  params.out_stride = strides_of(out_rows);
  params.dout = dout_rows.const_data_ptr();
  params.dout_stride = strides_of(dout_rows);
  OptionalTensor dlse_dense;
  if (dlse) {
    dlse_dense = torch::stable::contiguous(*dlse);
    expect_dense(op, {*dlse_dense, "dlse"}, state, {params.batch, params.heads, params.q_len},
                 "[batch, heads, q_len]");
    params.dlse = dlse_dense->const_data_ptr();
  }
  const Tensor delta =
      torch::stable::new_empty(out, {params.batch, params.heads, params.q_len}, state);
  params.delta = delta.mutable_data_ptr();
  if (delta.numel() > 0) cpu::delta(params, on_torch_threads());
  return delta;
}

Tensor delta(const Tensor& out, const Tensor& dout, const OptionalTensor& dlse) {
  return delta_of("delta", out, dout, dlse);
}

// dsinks[h] = -sum over samples and rows of exp(sink - lse) delta: one head is one task and one
// fixed order of additions.
template <typename T>
void sum_sink_gradients(const Tensor& sinks, const Tensor& lse, const Tensor& delta, Tensor& grad) {
  const int64_t batch = lse.size(0), heads = lse.size(1), q_len = lse.size(2);
  const T* sink = sinks.const_data_ptr<T>();
  const T* lse_rows = lse.const_data_ptr<T>();
  const T* delta_rows = delta.const_data_ptr<T>();
  T* out = grad.mutable_data_ptr<T>();
  on_torch_threads()(heads, [&](int64_t head) {
    double sum = 0;
    // A sink of -inf is none, and its rows may have lse = -inf: (-inf) - (-inf) would give NaN.
    const int64_t samples = std::isinf(sink[head]) ? 0 : batch;
    for (int64_t sample = 0; sample < samples; ++sample) {
      const int64_t row = (sample * heads + head) * q_len;
      for (int64_t i = row; i < row + q_len; ++i) {
        sum -= std::exp(static_cast<double>(sink[head]) - lse_rows[i]) * delta_rows[i];
      }
    }
    out[head] = static_cast<T>(sum);
  });
}

Tensor sink_gradient(const Tensor& sinks, const Tensor& lse, const Tensor& delta) {
  const char* op = "sink_gradient";
  const ScalarType state = lse.scalar_type();
  expect(lse.dim() == 3, op, "lse to have 3 dimensions [batch, heads, q_len], got shape ",
         shape_of(lse), "; pass the lse of forward");
  expect(state == ScalarType::Float || state == ScalarType::Double, op,
         "lse.dtype float32 or float64, got ", toString(state), "; pass the lse of forward");
  const int64_t batch = lse.size(0), heads = lse.size(1), q_len = lse.size(2);
  expect_dense(op, {lse, "lse"}, state, {batch, heads, q_len}, "[batch, heads, q_len]");
  expect_dense(op, {delta, "delta"}, state, {batch, heads, q_len}, "[batch, heads, q_len]");
  expect_dense(op, {sinks, "sinks"}, state, {heads}, "[heads]");
  Tensor grad = torch::stable::new_empty(lse, {heads}, state);
  if (state == ScalarType::Double) {
    sum_sink_gradients<double>(sinks, lse, delta, grad);
  } else {
    sum_sink_gradients<float>(sinks, lse, delta, grad);
  }
  return grad;
}

// Dense, v_head_dim wide, dimensions in the order of q's strides (an expanded dimension, stride 0,
// counts as outermost): [B, S, H, D] storage in, [B, S, H, Dv] storage out. Mirrors ops.py.
Tensor empty_output(const Tensor& q, int64_t v_head_dim) {
  int order[4] = {0, 1, 2, 3};
  std::stable_sort(order, order + 3, [&](int a, int b) {
    const auto outermost_if_expanded = [&](int d) {
      return q.stride(d) == 0 ? std::numeric_limits<int64_t>::max() : q.stride(d);
    };
    return outermost_if_expanded(a) > outermost_if_expanded(b);
  });
  const int64_t sizes[4] = {q.size(0), q.size(1), q.size(2), v_head_dim};
  int64_t strides[4];
  int64_t stride = 1;
  for (int i = 3; i >= 0; --i) {
    strides[order[i]] = stride;
    stride *= std::max<int64_t>(sizes[order[i]], 1);
  }
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(q.get(), &dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& key_begin, const Tensor& key_end,
                                   const OptionalTensor& sinks, double scale, double softcap) {
  expect_bhsd("forward", {q, "q"});
  expect_bhsd("forward", {v, "v"});
  const Tensor out = empty_output(q, v.size(3));
  const Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, state_dtype(q));
  fold("forward", q, {k}, {v}, {key_begin}, {key_end}, sinks, {}, {}, {}, out, lse, true, true,
       scale, softcap);
  return {out, lse};
}

// Gradients are summed in the state's dtype and rounded to their input's dtype once.
Tensor rounded(const Tensor& grad, ScalarType dtype) {
  return grad.scalar_type() == dtype ? grad : torch::stable::to(grad, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& key_begin,
    const Tensor& key_end, const OptionalTensor& sinks, double scale, double softcap) {
  const ScalarType dtype = q.scalar_type(), state = state_dtype(q);
  const Tensor lse_dense = torch::stable::contiguous(lse);
  const Tensor delta = delta_of("backward", out, dout, dlse);
  const Tensor dq = torch::stable::new_zeros(q, q.sizes(), state);
  const Tensor dk = torch::stable::new_zeros(k, k.sizes(), state);
  const Tensor dv = torch::stable::new_zeros(v, v.sizes(), state);
  accumulate_gradients("backward", q, dout, lse_dense, delta, {k}, {v}, {key_begin}, {key_end}, dq,
                       {dk}, {dv}, scale, softcap);
  const Tensor dsinks =
      sinks ? sink_gradient(*sinks, lse_dense, delta) : torch::stable::new_empty(q, {0}, state);
  return {rounded(dq, dtype), rounded(dk, dtype), rounded(dv, dtype), dsinks};
}

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
  const DType dtype = kernel_dtype("cpu_peak_flops", {like, "like"});
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
  m.impl("block_forward_", TORCH_BOX(&block_forward_));
  m.impl("block_backward_", TORCH_BOX(&block_backward_));
  m.impl("combine_", TORCH_BOX(&combine_));
  m.impl("finish_", TORCH_BOX(&finish_));
  m.impl("delta", TORCH_BOX(&delta));
  m.impl("sink_gradient", TORCH_BOX(&sink_gradient));
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
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
