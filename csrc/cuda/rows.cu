// SPDX-License-Identifier: BSD-3-Clause
//
// Row-wise arithmetic on states and outputs, a warp per row: lanes take neighbouring columns, so
// that rows may begin anywhere. Bound by memory.
#include "forward_call.cuh"
#include "launch.h"
#include "start.h"

namespace ring_attention::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kSinkThreads = 256;

// This thread's row, as every lane of its warp has it.
RA_DEVICE int64_t own_row() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; }

// Row (b, h, i) of a strided [batch, heads, q_len, ...] tensor, from its flat index.
RA_DEVICE int64_t offset_of(int64_t row, int64_t heads, int64_t q_len, const Strides& stride) {
  const int64_t i = row % q_len, h = row / q_len % heads, b = row / q_len / heads;
  return b * stride.batch + h * stride.head + i * stride.row;
}

RA_DEVICE void store_element(BFloat16* to, float x) {
  to->bits = static_cast<uint16_t>(BFloat16::pack(x, 0.0f));
}
RA_DEVICE void store_element(Float16* to, float x) {
  to->bits = static_cast<uint16_t>(Float16::pack(x, 0.0f));
}
RA_DEVICE void store_element(Float32* to, float x) { to->value = x; }

template <typename Visitor>
cudaError_t visit_elements(DType dtype, const Visitor& visitor) {
  switch (dtype) {
    case DType::kFloat32:
      return visitor(Float32{});
    case DType::kBFloat16:
      return visitor(BFloat16{});
    case DType::kFloat16:
      return visitor(Float16{});
    default:
      return cudaErrorNotSupported;
  }
}

template <typename... Parameters>
cudaError_t launch_rows(void (*kernel)(Parameters...), int64_t rows, cudaStream_t stream,
                        const std::type_identity_t<Parameters>&... arguments) {
  return start(kernel, divide_up(rows, kWarps), 32 * kWarps, 0, stream, arguments...);
}

__global__ void combine_kernel(int64_t rows, int64_t dim, float* acc, float* m, float* l,
                               const float* other_acc, const float* other_m, const float* other_l) {
  const int64_t row = own_row();
  if (row >= rows) return;
  const RowState ours{m[row], l[row]}, theirs{other_m[row], other_l[row]};
  __syncwarp();  // before lane 0 writes what all lanes read
  if (theirs.l == 0.0f) return;
  const Join join(ours, theirs);
  for (int64_t d = threadIdx.x % 32; d < dim; d += 32) {
    const int64_t at = row * dim + d;
    acc[at] = join.ours * acc[at] + join.theirs * other_acc[at];
  }
  if (threadIdx.x % 32 == 0) m[row] = join.joined.m, l[row] = join.joined.l;
}

template <typename Elem>
__global__ void finish_kernel(const __grid_constant__ ForwardParams p) {
  const int64_t row = own_row();
  if (row >= p.batch * p.heads * p.q_len) return;
  const RowState state{static_cast<const float*>(p.m)[row], static_cast<const float*>(p.l)[row]};
  const float* acc = static_cast<const float*>(p.acc) + row * p.v_head_dim;
  Elem* out = static_cast<Elem*>(p.out) + offset_of(row, p.heads, p.q_len, p.out_stride);
  const float normalizer = state.normalizer();
  for (int64_t d = threadIdx.x % 32; d < p.v_head_dim; d += 32) {
    store_element(out + d, acc[d] * normalizer);
  }
  if (threadIdx.x % 32 == 0) static_cast<float*>(p.lse)[row] = state.lse();
}

// The carried state first, then the parts in order: a row is joined by its warp alone.
template <typename Elem>
__global__ void join_parts_kernel(const __grid_constant__ ForwardCall call) {
  constexpr int kColumns = 256 / 32;  // of a lane
  const ForwardParams& p = call.params;
  const int64_t rows = p.batch * p.heads * p.q_len, row = own_row(), dim = p.v_head_dim;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
  RowState state = initial_state(p, row, static_cast<int>(row / p.q_len % p.heads));
  __syncwarp();  // before lane 0 writes what all lanes read
  float acc[kColumns] = {};
  const auto load = [&](float (&columns)[kColumns], const float* from) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) columns[i] = lane + 32 * i < dim ? from[32 * i] : 0.0f;
  };
  if (!p.first && state.l != 0.0f) load(acc, static_cast<const float*>(p.acc) + row * dim + lane);
  // Parts may be many and rows few: what the next ones need is on its way while one is added.
#pragma unroll 4
  for (int part = 0; part < call.parts.count; ++part) {
    const int64_t at = part * rows + row;
    const RowState other{call.parts.m[at], call.parts.l[at]};
    float columns[kColumns];
    load(columns, call.parts.acc + at * dim + lane);
    if (other.l == 0.0f) continue;
    const Join join(state, other);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) acc[i] = join.ours * acc[i] + join.theirs * columns[i];
    state = join.joined;
  }
  const float normalizer = state.normalizer();
  float* to = static_cast<float*>(p.acc) + row * dim;
  Elem* out = static_cast<Elem*>(p.out) + offset_of(row, p.heads, p.q_len, p.out_stride);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int d = lane + 32 * i;
    if (d >= dim) break;
    if (p.last) {
      store_element(out + d, acc[i] * normalizer);
    } else {
      to[d] = acc[i];
    }
  }
  if (lane != 0) return;
  if (p.last) {
    static_cast<float*>(p.lse)[row] = state.lse();
  } else {
    static_cast<float*>(p.m)[row] = state.m;
    static_cast<float*>(p.l)[row] = state.l;
  }
}

template <typename Elem>
__global__ void delta_kernel(const __grid_constant__ DeltaParams p) {
  const int64_t row = own_row();
  if (row >= p.batch * p.heads * p.q_len) return;
  const Elem* out =
      static_cast<const Elem*>(p.out) + offset_of(row, p.heads, p.q_len, p.out_stride);
  const Elem* dout =
      static_cast<const Elem*>(p.dout) + offset_of(row, p.heads, p.q_len, p.dout_stride);
  float sum = 0.0f;
  for (int64_t d = threadIdx.x % 32; d < p.v_head_dim; d += 32) {
    sum = fmaf(out[d].widen(), dout[d].widen(), sum);
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  if (threadIdx.x % 32 != 0) return;
  if (p.dlse != nullptr) sum -= static_cast<const float*>(p.dlse)[row];
  static_cast<float*>(p.delta)[row] = sum;
}

// A block per head: each thread sums a fixed set of queries, then sums are added pairwise.
__global__ void __launch_bounds__(kSinkThreads)
    sink_gradient_kernel(const float* sinks, const float* lse, const float* delta, float* dsinks,
                         int64_t batch, int64_t heads, int64_t q_len) {
  __shared__ float sums[kSinkThreads];
  const int64_t head = blockIdx.x;
  const float sink = sinks[head];
  float sum = 0.0f;
  // A sink of -inf is none; a row that saw nothing then has lse = -inf and no gradient.
  for (int64_t i = threadIdx.x; sink != -kInfinity && i < batch * q_len; i += kSinkThreads) {
    const int64_t at = (i / q_len * heads + head) * q_len + i % q_len;
    sum -= exp2_approx((sink - lse[at]) * kLog2e) * delta[at];
  }
  sums[threadIdx.x] = sum;
  for (int half = kSinkThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) dsinks[head] = sums[0];
}

}  // namespace

cudaError_t combine(int64_t rows, int64_t v_head_dim, void* acc, void* m, void* l,
                    const void* other_acc, const void* other_m, const void* other_l,
                    cudaStream_t stream) {
  return launch_rows(combine_kernel, rows, stream, rows, v_head_dim, static_cast<float*>(acc),
                     static_cast<float*>(m), static_cast<float*>(l),
                     static_cast<const float*>(other_acc), static_cast<const float*>(other_m),
                     static_cast<const float*>(other_l));
}

cudaError_t finish(const ForwardParams& params, cudaStream_t stream) {
  return visit_elements(params.dtype, [&]<typename Elem>(Elem) {
    return launch_rows(finish_kernel<Elem>, params.batch * params.heads * params.q_len, stream,
                       params);
  });
}

cudaError_t join_parts(const ForwardCall& call, cudaStream_t stream) {
  const ForwardParams& p = call.params;
  return visit_elements(p.dtype, [&]<typename Elem>(Elem) {
    return launch_rows(join_parts_kernel<Elem>, p.batch * p.heads * p.q_len, stream, call);
  });
}

cudaError_t delta(const DeltaParams& params, cudaStream_t stream) {
  return visit_elements(params.dtype, [&]<typename Elem>(Elem) {
    return launch_rows(delta_kernel<Elem>, params.batch * params.heads * params.q_len, stream,
                       params);
  });
}

cudaError_t sink_gradient(const float* sinks, const float* lse, const float* delta, float* dsinks,
                          int64_t batch, int64_t heads, int64_t q_len, cudaStream_t stream) {
  return start(sink_gradient_kernel, heads, kSinkThreads, 0, stream, sinks, lse, delta, dsinks,
               batch, heads, q_len);
}

}  // namespace ring_attention::cuda
