// SPDX-License-Identifier: BSD-3-Clause
//
// The arguments of an operator: tensors are checked and become the structs of params.h.
//
// Note [alignment]. Kernels that address rows in whole vectors say so by `alignment()`, in bytes. A
// q, k, v, out or dout that is read and has other rows (address, any stride) is copied once; acc,
// dq, dk and dv that start elsewhere are refused. An out that is written has rows of any alignment.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "expect.h"

namespace ring_attention {

inline Strides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

inline void* pointer(const OptionalTensor& tensor) {
  return tensor ? tensor->mutable_data_ptr() : nullptr;
}

// Of one call, `first` being a tensor where it runs. Kernels, a device's, are constructed for
// `first` and have
//   alignment()                    see Note [alignment]; 0: of an element
//   expect_supported(expect, arg)  refuses a dtype there is no kernel for
// Owns what had to be copied.
template <typename Kernels>
class Arguments {
 public:
  Arguments(const char* op, const Tensor& first)
      : kernels_(first), expect_(op, first, kernels_.alignment()) {}

 protected:
  DType supported_dtype(const Arg& arg) const {
    const DType dtype = expect_.kernel_dtype(arg);
    kernels_.expect_supported(expect_, arg);
    return dtype;
  }

  // Kernels read rows of contiguous, aligned elements. A tensor that has none is copied once.
  const Tensor& keep(const Tensor& tensor) {
    Tensor& result = kept_.emplace_back(tensor);
    if (result.stride(3) != 1) result = torch::stable::contiguous(result);
    if (!aligned(result)) result = torch::stable::clone(result);
    if (!aligned(result)) result = torch::stable::clone(torch::stable::contiguous(result));
    return result;
  }

  bool aligned(const Tensor& tensor) const {
    const auto bytes = static_cast<int64_t>(tensor.element_size());
    const int64_t alignment = std::max(kernels_.alignment(), bytes);
    bool result = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % alignment == 0;
    for (int d = 0; d < 3; ++d) {
      result = result && (tensor.size(d) == 1 || tensor.stride(d) * bytes % alignment == 0);
    }
    return result;
  }

  void set_query(const Tensor& q, double scale, double softcap, AttentionParams& params) {
    const Arg arg{q, "q"};
    expect_.bhsd(arg);
    expect_.head_dim(arg);
    params.dtype = supported_dtype(arg);
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
  void set_blocks(const Tensor& q, const Tensors& k, const Tensors& v, const Tensors& key_begin,
                  const Tensors& key_end, AttentionParams& params) {
    expect_.same_length(k, "k", v, "v");
    expect_.same_length(k, "k", key_begin, "key_begin");
    expect_.same_length(k, "k", key_end, "key_end");
    params.kv_heads = params.heads;
    blocks_.resize(k.size());
    for (size_t i = 0; i < k.size(); ++i) {
      const auto index = static_cast<int64_t>(i);
      const Arg k_arg{k[i], "k", index}, v_arg{v[i], "v", index};
      expect_.bhsd(k_arg);
      if (i == 0) params.kv_heads = k[0].size(1);
      const int64_t k_len = k[i].size(2);
      expect_.dtype(k_arg, q.scalar_type(), "q, k and v need the same dtype");
      expect_.shape(k_arg, {params.batch, params.kv_heads, k_len, params.head_dim},
                    "[batch, kv_heads, k_len, head_dim] of this call");
      expect_.here(v_arg);
      expect_.dtype(v_arg, q.scalar_type(), "q, k and v need the same dtype");
      expect_.shape(v_arg, {params.batch, params.kv_heads, k_len, params.v_head_dim},
                    "[batch, kv_heads, k_len, v_head_dim] of this call");
      expect_(k_len <= std::numeric_limits<int32_t>::max(), k_arg, ".shape[2] < 2^31, got ", k_len,
              "; key indices are int32: pass several blocks");

      KVBlock& block = blocks_[i];
      block.k_len = k_len;
      const Tensor& k_rows = keep(k[i]);
      block.k = k_rows.const_data_ptr();
      block.k_stride = strides_of(k_rows);
      const Tensor& v_rows = keep(v[i]);
      block.v = v_rows.const_data_ptr();
      block.v_stride = strides_of(v_rows);
      block.intervals = key_begin[i].dim() > 0 ? key_begin[i].size(0) : 0;
      block.key_begin =
          bounds({key_begin[i], "key_begin", index}, block, params, block.begin_stride);
      block.key_end = bounds({key_end[i], "key_end", index}, block, params, block.end_stride);
    }
    expect_(params.kv_heads > 0 && params.heads % params.kv_heads == 0,
            "q.shape[1] to be a multiple of k[0].shape[1], got ", params.heads, " and ",
            params.kv_heads, "; every K/V head serves the same number of query heads");
    params.blocks = blocks_.data();
    params.num_blocks = static_cast<int64_t>(blocks_.size());
  }

  const int32_t* bounds(const Arg& arg, const KVBlock& block, const AttentionParams& params,
                        Strides& strides) const {
    const Tensor& tensor = arg.tensor;
    expect_.here(arg);
    expect_.dtype(arg, ScalarType::Int, "interval bounds are int32");
    expect_(tensor.dim() == 3 && tensor.size(0) == block.intervals &&
                (tensor.size(1) == params.batch || tensor.size(1) == 1) &&
                tensor.size(2) == params.q_len,
            arg, ".shape == [", block.intervals, ", ", params.batch, " or 1, ", params.q_len,
            "], got ", shape_of(tensor), "; it is [intervals, batch or 1, q_len]");
    // .head is the stride of the interval dimension, see params.h.
    strides = {tensor.size(1) == 1 ? 0 : tensor.stride(1), tensor.stride(0), tensor.stride(2)};
    return tensor.const_data_ptr<int32_t>();
  }

  void set_output(const Tensor& out, const Tensor& lse, ForwardParams& params) const {
    const ScalarType state =
        params.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
    expect_.here({out, "out"});
    expect_.shape({out, "out"}, {params.batch, params.heads, params.q_len, params.v_head_dim},
                  "[batch, heads, q_len, v_head_dim]");
    expect_.writable_rows({out, "out"});
    expect_.dense({lse, "lse"}, state, {params.batch, params.heads, params.q_len},
                  "[batch, heads, q_len]");
    params.out = out.mutable_data_ptr();
    params.out_stride = strides_of(out);
    params.lse = lse.mutable_data_ptr();
  }

  void set_state(const OptionalTensor& acc, const OptionalTensor& m, const OptionalTensor& l,
                 ScalarType state, ForwardParams& params) const {
    expect_(acc.has_value() == m.has_value() && m.has_value() == l.has_value(),
            "acc, m and l all given or all None, got some; a state is the three of them");
    if (!acc) return;
    const auto rows = {params.batch, params.heads, params.q_len};
    expect_.dense({*acc, "acc"}, state,
                  {params.batch, params.heads, params.q_len, params.v_head_dim},
                  "[batch, heads, q_len, v_head_dim]");
    expect_.dense({*m, "m"}, state, rows, "[batch, heads, q_len]");
    expect_.dense({*l, "l"}, state, rows, "[batch, heads, q_len]");
    params.acc = pointer(acc);
    params.m = pointer(m);
    params.l = pointer(l);
  }

  // A state given by itself: its dtype and shape say what it is.
  ForwardParams state_params(const Tensor& acc, const Tensor& m, const Tensor& l) const {
    ForwardParams params;
    const Arg arg{acc, "acc"};
    expect_.bhsd(arg);
    expect_.head_dim(arg);
    const ScalarType state = acc.scalar_type();
    expect_(state == ScalarType::Float || state == ScalarType::Double,
            "acc.dtype float32 or float64, got ", toString(state), "; a state is never 16-bit");
    kernels_.expect_supported(expect_, arg);
    params.batch = acc.size(0);
    params.heads = acc.size(1);
    params.q_len = acc.size(2);
    params.v_head_dim = acc.size(3);
    set_state(acc, m, l, state, params);
    return params;
  }

  Kernels kernels_;
  Expect expect_;
  std::vector<KVBlock> blocks_;
  Tensors kept_;
};

}  // namespace ring_attention
