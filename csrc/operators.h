// SPDX-License-Identifier: BSD-3-Clause
//
// The operators, the same for every device: arguments are checked, see arguments.h, and the
// device's kernels called. ops.cpp and ops_cuda.cpp instantiate them. Shapes and semantics are
// documented where users meet them, in ring_attention/ops.py.
#pragma once

#include <algorithm>
#include <limits>
#include <tuple>

#include "arguments.h"

namespace ring_attention {

inline bool has_rows(const AttentionParams& params) {
  return params.batch > 0 && params.heads > 0 && params.q_len > 0;
}

// Dense, v_head_dim wide, dimensions in the order of q's strides (an expanded dimension, stride 0,
// counts as outermost): [B, S, H, D] storage in, [B, S, H, Dv] storage out. Mirrors ops.py.
inline Tensor empty_output(const Tensor& q, int64_t v_head_dim) {
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
  int32_t dtype = 0, device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(q.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(q.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(q.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, sizes, strides, dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

// Gradients are summed in the state's dtype and rounded to their input's dtype once.
inline Tensor rounded(const Tensor& grad, ScalarType dtype) {
  return grad.scalar_type() == dtype ? grad : torch::stable::to(grad, dtype);
}

// One call of an operator. Kernels have, besides what Arguments wants,
//   forward(params), backward(params), combine(state dtype, ...), finish(params), delta(params),
//   sink_gradient(state dtype, ...)  as in cpu/kernels.h
template <typename Kernels>
class Call : Arguments<Kernels> {
 public:
  using Arguments<Kernels>::Arguments;

  void fold(const Tensor& q, const Tensors& k, const Tensors& v, const Tensors& key_begin,
            const Tensors& key_end, const OptionalTensor& sinks, const OptionalTensor& acc,
            const OptionalTensor& m, const OptionalTensor& l, const OptionalTensor& out,
            const OptionalTensor& lse, bool first, bool last, double scale, double softcap) {
    ForwardParams params;
    params.first = first;
    params.last = last;
    set_query(q, scale, softcap, params);
    const ScalarType state = state_dtype(q);

    expect_(acc.has_value() || (first && last),
            "acc, m and l unless first and last, got None; allocate a state to carry");
    expect_(!last || (out.has_value() && lse.has_value()),
            "out and lse with last, got None; allocate what the last fold writes");
    const Arg wide = out ? Arg{*out, "out"} : Arg{*acc, "acc"};
    expect_.bhsd(wide);
    expect_.head_dim(wide);
    params.v_head_dim = wide.tensor.size(3);
    set_state(acc, m, l, state, params);
    if (last) {
      expect_.dtype({*out, "out"}, q.scalar_type(), "out has the dtype of q");
      set_output(*out, *lse, params);
    }
    set_blocks(q, k, v, key_begin, key_end, params);
    if (sinks) {
      expect_(first, "no sinks unless first, got some; they are part of the initial state");
      expect_.dense({*sinks, "sinks"}, state, {params.heads}, "[heads]");
      params.sinks = sinks->const_data_ptr();
    }
    if (has_rows(params)) kernels_.forward(params);
  }

  void accumulate_gradients(const Tensor& q, const Tensor& dout, const Tensor& lse,
                            const Tensor& delta, const Tensors& k, const Tensors& v,
                            const Tensors& key_begin, const Tensors& key_end, const Tensor& dq,
                            const Tensors& dk, const Tensors& dv, double scale, double softcap) {
    BackwardParams params;
    set_query(q, scale, softcap, params);
    const ScalarType state = state_dtype(q);
    const Arg dout_arg{dout, "dout"};
    expect_.bhsd(dout_arg);
    expect_.head_dim(dout_arg);
    params.v_head_dim = dout.size(3);
    expect_.dtype(dout_arg, q.scalar_type(), "dout has the dtype of q");
    expect_.shape(dout_arg, {params.batch, params.heads, params.q_len, params.v_head_dim},
                  "[batch, heads, q_len, v_head_dim]");
    const Tensor& dout_rows = keep(dout);
    params.dout = dout_rows.const_data_ptr();
    params.dout_stride = strides_of(dout_rows);
    const auto rows = {params.batch, params.heads, params.q_len};
    expect_.dense({lse, "lse"}, state, rows, "[batch, heads, q_len]");
    expect_.dense({delta, "delta"}, state, rows, "[batch, heads, q_len]");
    expect_.dense({dq, "dq"}, state, {params.batch, params.heads, params.q_len, params.head_dim},
                  "[batch, heads, q_len, head_dim]");
    params.lse = lse.const_data_ptr();
    params.delta = delta.const_data_ptr();
    params.dq = dq.mutable_data_ptr();

    set_blocks(q, k, v, key_begin, key_end, params);
    expect_(dk.size() == k.size() && dv.size() == k.size(), "len(dk) and len(dv) == len(k), got ",
            dk.size(), ", ", dv.size(), " and ", k.size(),
            "; each block has one entry in every list");
    for (size_t i = 0; i < dk.size(); ++i) {
      KVBlock& block = blocks_[i];
      const auto index = static_cast<int64_t>(i);
      expect_.dense({dk[i], "dk", index}, state,
                    {params.batch, params.kv_heads, block.k_len, params.head_dim}, "shaped like k");
      expect_.dense({dv[i], "dv", index}, state,
                    {params.batch, params.kv_heads, block.k_len, params.v_head_dim},
                    "shaped like v");
      block.dk = dk[i].mutable_data_ptr();
      block.dv = dv[i].mutable_data_ptr();
    }
    expect_.disjoint(dk, dv);
    if (has_rows(params)) kernels_.backward(params);
  }

  void combine(const Tensor& acc, const Tensor& m, const Tensor& l, const Tensor& other_acc,
               const Tensor& other_m, const Tensor& other_l) {
    const ForwardParams params = state_params(acc, m, l);
    const ScalarType state = acc.scalar_type();
    const auto rows = {params.batch, params.heads, params.q_len};
    expect_.dense({other_acc, "other_acc"}, state,
                  {params.batch, params.heads, params.q_len, params.v_head_dim}, "shaped like acc");
    expect_.dense({other_m, "other_m"}, state, rows, "shaped like m");
    expect_.dense({other_l, "other_l"}, state, rows, "shaped like l");
    if (!has_rows(params)) return;
    kernels_.combine(expect_.kernel_dtype({acc, "acc"}), params.batch * params.heads * params.q_len,
                     params.v_head_dim, params.acc, params.m, params.l, other_acc.const_data_ptr(),
                     other_m.const_data_ptr(), other_l.const_data_ptr());
  }

  void finish(const Tensor& acc, const Tensor& m, const Tensor& l, const Tensor& out,
              const Tensor& lse) {
    ForwardParams params = state_params(acc, m, l);
    const Arg arg{out, "out"};
    expect_.bhsd(arg);
    params.dtype = supported_dtype(arg);
    expect_(state_dtype(out) == acc.scalar_type(), "acc.dtype == ", toString(state_dtype(out)),
            " for out.dtype ", toString(out.scalar_type()), ", got ", toString(acc.scalar_type()),
            "; states are float32, and float64 for float64 outputs");
    set_output(out, lse, params);
    if (has_rows(params)) kernels_.finish(params);
  }

  Tensor delta(const Tensor& out, const Tensor& dout, const OptionalTensor& dlse) {
    const Arg out_arg{out, "out"}, dout_arg{dout, "dout"};
    expect_.bhsd(out_arg);
    expect_.head_dim(out_arg);
    expect_.here(dout_arg);
    DeltaParams params;
    params.dtype = supported_dtype(out_arg);
    params.batch = out.size(0);
    params.heads = out.size(1);
    params.q_len = out.size(2);
    params.v_head_dim = out.size(3);
    expect_.dtype(dout_arg, out.scalar_type(), "dout has the dtype of out");
    expect_.shape(dout_arg, {params.batch, params.heads, params.q_len, params.v_head_dim},
                  "shaped like out");
    const ScalarType state = state_dtype(out);
    const Tensor out_rows = keep(out), dout_rows = keep(dout);
    params.out = out_rows.const_data_ptr();
    params.out_stride = strides_of(out_rows);
    params.dout = dout_rows.const_data_ptr();
    params.dout_stride = strides_of(dout_rows);
    if (dlse) {
      const Tensor& dense = kept_.emplace_back(torch::stable::contiguous(*dlse));
      expect_.dense({dense, "dlse"}, state, {params.batch, params.heads, params.q_len},
                    "[batch, heads, q_len]");
      params.dlse = dense.const_data_ptr();
    }
    const Tensor result =
        torch::stable::new_empty(out, {params.batch, params.heads, params.q_len}, state);
    params.delta = result.mutable_data_ptr();
    if (result.numel() > 0) kernels_.delta(params);
    return result;
  }

  Tensor sink_gradient(const Tensor& sinks, const Tensor& lse, const Tensor& delta) {
    const ScalarType state = lse.scalar_type();
    expect_(lse.dim() == 3, "lse to have 3 dimensions [batch, heads, q_len], got shape ",
            shape_of(lse), "; pass the lse of forward");
    expect_(state == ScalarType::Float || state == ScalarType::Double,
            "lse.dtype float32 or float64, got ", toString(state), "; pass the lse of forward");
    const DType dtype = supported_dtype({lse, "lse"});
    const int64_t batch = lse.size(0), heads = lse.size(1), q_len = lse.size(2);
    expect_.dense({lse, "lse"}, state, {batch, heads, q_len}, "[batch, heads, q_len]");
    expect_.dense({delta, "delta"}, state, {batch, heads, q_len}, "[batch, heads, q_len]");
    expect_.dense({sinks, "sinks"}, state, {heads}, "[heads]");
    const Tensor grad = torch::stable::new_empty(lse, {heads}, state);
    if (heads > 0) {
      kernels_.sink_gradient(dtype, sinks.const_data_ptr(), lse.const_data_ptr(),
                             delta.const_data_ptr(), grad.mutable_data_ptr(), batch, heads, q_len);
    }
    return grad;
  }

 private:
  using Base = Arguments<Kernels>;
  using Base::blocks_;
  using Base::expect_;
  using Base::keep;
  using Base::kept_;
  using Base::kernels_;
  using Base::set_blocks;
  using Base::set_output;
  using Base::set_query;
  using Base::set_state;
  using Base::state_params;
  using Base::supported_dtype;
};

// What the dispatcher calls; the schemas are in ops.cpp.
template <typename Kernels>
struct Operators {
  static void block_forward_(const Tensor& q, const Tensors& k, const Tensors& v,
                             const Tensors& key_begin, const Tensors& key_end,
                             const OptionalTensor& sinks, const OptionalTensor& acc,
                             const OptionalTensor& m, const OptionalTensor& l,
                             const OptionalTensor& out, const OptionalTensor& lse, bool first,
                             bool last, double scale, double softcap) {
    Call<Kernels>("block_forward_", q)
        .fold(q, k, v, key_begin, key_end, sinks, acc, m, l, out, lse, first, last, scale, softcap);
  }

  static void block_backward_(const Tensor& q, const Tensor& dout, const Tensor& lse,
                              const Tensor& delta, const Tensors& k, const Tensors& v,
                              const Tensors& key_begin, const Tensors& key_end, const Tensor& dq,
                              const Tensors& dk, const Tensors& dv, double scale, double softcap) {
    Call<Kernels>("block_backward_", q)
        .accumulate_gradients(q, dout, lse, delta, k, v, key_begin, key_end, dq, dk, dv, scale,
                              softcap);
  }

  static void combine_(const Tensor& acc, const Tensor& m, const Tensor& l, const Tensor& other_acc,
                       const Tensor& other_m, const Tensor& other_l) {
    Call<Kernels>("combine_", acc).combine(acc, m, l, other_acc, other_m, other_l);
  }

  static void finish_(const Tensor& acc, const Tensor& m, const Tensor& l, const Tensor& out,
                      const Tensor& lse) {
    Call<Kernels>("finish_", acc).finish(acc, m, l, out, lse);
  }

  static Tensor delta(const Tensor& out, const Tensor& dout, const OptionalTensor& dlse) {
    return Call<Kernels>("delta", out).delta(out, dout, dlse);
  }

  static Tensor sink_gradient(const Tensor& sinks, const Tensor& lse, const Tensor& delta) {
    return Call<Kernels>("sink_gradient", lse).sink_gradient(sinks, lse, delta);
  }

  static std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& key_begin, const Tensor& key_end,
                                            const OptionalTensor& sinks, double scale,
                                            double softcap) {
    const char* op = "forward";
    const Expect expect(op, q, 0);
    expect.bhsd({q, "q"});
    expect.bhsd({v, "v"});
    const Tensor out = empty_output(q, v.size(3));
    const Tensor lse =
        torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, state_dtype(q));
    Call<Kernels>(op, q).fold(q, {k}, {v}, {key_begin}, {key_end}, sinks, {}, {}, {}, out, lse,
                              true, true, scale, softcap);
    return {out, lse};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
      const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
      const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& key_begin,
      const Tensor& key_end, const OptionalTensor& sinks, double scale, double softcap) {
    const char* op = "backward";
    const ScalarType dtype = q.scalar_type(), state = state_dtype(q);
    const Tensor lse_dense = torch::stable::contiguous(lse);
    const Tensor delta = Call<Kernels>(op, out).delta(out, dout, dlse);
    const Tensor dq = torch::stable::new_zeros(q, q.sizes(), state);
    const Tensor dk = torch::stable::new_zeros(k, k.sizes(), state);
    const Tensor dv = torch::stable::new_zeros(v, v.sizes(), state);
    Call<Kernels>(op, q).accumulate_gradients(q, dout, lse_dense, delta, {k}, {v}, {key_begin},
                                              {key_end}, dq, {dk}, {dv}, scale, softcap);
    const Tensor dsinks = sinks ? Call<Kernels>(op, q).sink_gradient(*sinks, lse_dense, delta)
                                : torch::stable::new_empty(q, {0}, state);
    return {rounded(dq, dtype), rounded(dk, dtype), rounded(dv, dtype), dsinks};
  }

  template <typename Library>
  static void implement(Library& m) {
    m.impl("block_forward_", TORCH_BOX(&block_forward_));
    m.impl("block_backward_", TORCH_BOX(&block_backward_));
    m.impl("combine_", TORCH_BOX(&combine_));
    m.impl("finish_", TORCH_BOX(&finish_));
    m.impl("delta", TORCH_BOX(&delta));
    m.impl("sink_gradient", TORCH_BOX(&sink_gradient));
    m.impl("forward", TORCH_BOX(&forward));
    m.impl("backward", TORCH_BOX(&backward));
  }
};

}  // namespace ring_attention
