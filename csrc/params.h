// SPDX-License-Identifier: BSD-3-Clause
//
// The glossary of the kernels: everything a forward or backward block kernel is told, as plain
// structs. No torch here or below; ops.cpp fills these in and has checked what they point at.
//
// Note [state]. A query's running state is (acc, m, l) in fp32 (fp64 for fp64 inputs):
//   acc = sum p v,  l = sum p,  p = exp2(s log2(e) - m)        over the keys seen so far,
// with the reference exponent m in log2 units and lazy but bounded: max - kLazyMax <= m <= max.
// l = 0 means "no key seen" (m = -inf, acc = 0). lse = ln(2) (m + log2 l).
//
// Note [intervals]. Masks reach the kernels as half-open intervals of local key indices, a few
// disjoint ones per query row: row i of sample b sees key j of a block iff
//   key_begin[n, b, i] <= j < key_end[n, b, i]  for some n;  bounds are clamped to [0, k_len].
#pragma once

#include <cstdint>

namespace ring_attention {

enum class DType : int8_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

// Strides in elements; the last dimension (head_dim) is contiguous.
struct Strides {
  int64_t batch = 0, head = 0, row = 0;
};

// One K/V block of a call, with what each query row sees of it.
struct KVBlock {
  const void* k = nullptr;  // [batch, kv_heads, k_len, head_dim]
  const void* v = nullptr;  // [batch, kv_heads, k_len, v_head_dim]
  Strides k_stride, v_stride;
  int64_t k_len = 0;

  const int32_t* key_begin = nullptr;  // [intervals, batch, q_len], any strides, 0 = broadcast
  const int32_t* key_end = nullptr;
  int64_t intervals = 0;
  Strides begin_stride, end_stride;  // .head is the stride of the interval dimension

  void* dk = nullptr;  // backward only: state dtype, contiguous, accumulated into
  void* dv = nullptr;
};

// What forward and backward share.
struct AttentionParams {
  DType dtype = DType::kFloat32;  // of q, k, v, out, dout
  int64_t batch = 0, heads = 0, kv_heads = 0;
  int64_t q_len = 0, head_dim = 0, v_head_dim = 0;
  const void* q = nullptr;  // [batch, heads, q_len, head_dim]
  Strides q_stride;
  const KVBlock* blocks = nullptr;
  int64_t num_blocks = 0;
  double scale = 1.0;    // u = scale q.k
  double softcap = 0.0;  // s = softcap tanh(u / softcap); 0: s = u

  // Room for ALiBi and dropout. Null and zero today: ops.cpp never sets them, kernels never read
  // them, so that the kernel families keep their signatures when they arrive.
  const float* alibi_slopes = nullptr;   // [heads]
  const int32_t* q_positions = nullptr;  // [q_len]
  double dropout_p = 0.0;
  uint64_t dropout_seed = 0, dropout_offset = 0;
};

struct ForwardParams : AttentionParams {
  const void* sinks = nullptr;  // [heads], state dtype; only with first
  // The state, dtype as in Note [state], contiguous; null when first and last.
  void* acc = nullptr;  // [batch, heads, q_len, v_head_dim]
  void* m = nullptr;    // [batch, heads, q_len]
  void* l = nullptr;    // [batch, heads, q_len]
  // Written with last: out in the inputs' dtype, lse in the state dtype (contiguous).
  void* out = nullptr;  // [batch, heads, q_len, v_head_dim]
  Strides out_stride;
  void* lse = nullptr;  // [batch, heads, q_len]
  bool first = true;    // the state is not read: it starts empty, or from the sinks
  bool last = true;     // out and lse are written, the state is not
};

struct BackwardParams : AttentionParams {
  const void* dout = nullptr;  // [batch, heads, q_len, v_head_dim]
  Strides dout_stride;
  const void* lse = nullptr;    // [batch, heads, q_len], state dtype, contiguous; includes the sink
  const void* delta = nullptr;  // [batch, heads, q_len], state dtype, contiguous
  void* dq = nullptr;  // [batch, heads, q_len, head_dim], state dtype, contiguous, accumulated into
  // The same bits every time. Otherwise kernels may sum in any order, where that is faster.
  bool deterministic = true;
};

// delta = rowsum(out dout) - dlse, what the backward subtracts from dP.
struct DeltaParams {
  DType dtype = DType::kFloat32;  // of out and dout
  int64_t batch = 0, heads = 0, q_len = 0, v_head_dim = 0;
  const void* out = nullptr;  // [batch, heads, q_len, v_head_dim]
  Strides out_stride;
  const void* dout = nullptr;
  Strides dout_stride;
  const void* dlse = nullptr;  // [batch, heads, q_len], state dtype, contiguous; null = 0
  void* delta = nullptr;       // [batch, heads, q_len], state dtype, contiguous
};

// How a kernel runs its tasks on the caller's threads. `run` calls body(context, task) once for
// every task in [0, tasks), in any order, on at most `threads` threads, and returns when all are
// done. Results may not depend on `threads` or on which thread ran what.
struct Parallel {
  int threads = 1;
  void (*run)(int64_t tasks, void (*body)(void* context, int64_t task), void* context) = nullptr;

  template <typename Body>
  void operator()(int64_t tasks, const Body& body) const {
    run(
        tasks, [](void* context, int64_t task) { (*static_cast<const Body*>(context))(task); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }
};

}  // namespace ring_attention
