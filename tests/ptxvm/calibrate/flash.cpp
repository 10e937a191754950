// SPDX-License-Identifier: BSD-3-Clause
//
// FlashAttention-2's kernels against attention in double, a line per case.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cutlass/numeric_types.h>
#include <flash.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../vm.h"

namespace {

constexpr int kDim = 64;

template <typename T>
float widen(T x);
template <>
float widen(__half x) {
  return __half2float(x);
}
template <>
float widen(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <typename T>
T rounded(float x);
template <>
__half rounded(float x) {
  return __float2half(x);
}
template <>
__nv_bfloat16 rounded(float x) {
  return __float2bfloat16(x);
}

// [batch, length, heads, kDim] on the device; NaN at first.
template <typename T>
struct Tensor {
  int batch, length, heads;
  T* data = nullptr;

  Tensor(int batch, int length, int heads) : batch(batch), length(length), heads(heads) {
    cudaMalloc(reinterpret_cast<void**>(&data), count() * sizeof(T));
  }
  ~Tensor() { cudaFree(data); }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  size_t count() const { return size_t(batch) * length * heads * kDim; }
  size_t at(int b, int i, int h, int d) const {
    return ((size_t(b) * length + i) * heads + h) * kDim + d;
  }
  double operator()(int b, int i, int h, int d) const { return widen(data[at(b, i, h, d)]); }
  void fill(std::mt19937& random) {
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < count(); ++i) data[i] = rounded<T>(normal(random));
  }
};

// The sums of one tensor's squared errors and values.
struct Error {
  double error = 0, value = 0;

  void add(double got, double wanted) {
    error += (got - wanted) * (got - wanted), value += wanted * wanted;
  }
  // Not NaN, and as far off as rounding to the elements' type explains: P and dS are rounded, and
  // the result.
  bool small(double unit) const { return std::sqrt(error / value) < 2 * unit; }
};

struct Shape {
  const char* name;
  int batch, heads, kv_heads, q_len, k_len;
};

// Attention of one (sample, head) in double, forward and backward.
struct Exact {
  int q_len, k_len;
  std::vector<double> p, out, lse, dq, dk, dv;

  template <typename T>
  Exact(const Shape& shape, bool causal, int b, int h, const Tensor<T>& q, const Tensor<T>& k,
        const Tensor<T>& v, const Tensor<T>& dout)
      : q_len(shape.q_len), k_len(shape.k_len) {
    const int kv = h / (shape.heads / shape.kv_heads);
    const double scale = 1 / std::sqrt(double(kDim));
    p.assign(size_t(q_len) * k_len, 0);
    out.assign(size_t(q_len) * kDim, 0), dq = out, lse.assign(q_len, 0);
    dk.assign(size_t(k_len) * kDim, 0), dv = dk;
    for (int i = 0; i < q_len; ++i) {
      const int keys = causal ? std::min(k_len, std::max(0, i + 1 + k_len - q_len)) : k_len;
      double most = -INFINITY, sum = 0;
      double* row = p.data() + size_t(i) * k_len;
      for (int j = 0; j < keys; ++j) {
        for (int d = 0; d < kDim; ++d) row[j] += scale * q(b, i, h, d) * k(b, j, kv, d);
        most = std::max(most, row[j]);
      }
      for (int j = 0; j < keys; ++j) sum += row[j] = std::exp(row[j] - most);
      lse[i] = most + std::log(sum);
      double delta = 0;
      for (int j = 0; j < keys; ++j) {
        row[j] /= sum;
        for (int d = 0; d < kDim; ++d) out[i * kDim + d] += row[j] * v(b, j, kv, d);
      }
      for (int d = 0; d < kDim; ++d) delta += out[i * kDim + d] * dout(b, i, h, d);
      for (int j = 0; j < keys; ++j) {
        double dp = 0;
        for (int d = 0; d < kDim; ++d) dp += dout(b, i, h, d) * v(b, j, kv, d);
        const double ds = row[j] * (dp - delta) * scale;
        for (int d = 0; d < kDim; ++d) {
          dq[i * kDim + d] += ds * k(b, j, kv, d);
          dk[j * kDim + d] += ds * q(b, i, h, d);
          dv[j * kDim + d] += row[j] * dout(b, i, h, d);
        }
      }
    }
  }
};

template <typename T>
void place(const Tensor<T>& x, void* __restrict__& pointer, int64_t& batch, int64_t& row,
           int64_t& head) {
  pointer = x.data;
  batch = int64_t(x.length) * x.heads * kDim, row = int64_t(x.heads) * kDim, head = kDim;
}

int round_up(int x) { return (x + 127) / 128 * 128; }

template <typename T, typename Element, bool kCausal>
bool run(const Shape& s, unsigned seed, double unit) {
  std::mt19937 random(seed);
  Tensor<T> q(s.batch, s.q_len, s.heads), out(s.batch, s.q_len, s.heads);
  Tensor<T> dout(s.batch, s.q_len, s.heads), dq(s.batch, s.q_len, s.heads);
  Tensor<T> k(s.batch, s.k_len, s.kv_heads), v(s.batch, s.k_len, s.kv_heads);
  Tensor<T> dk(s.batch, s.k_len, s.heads), dv(s.batch, s.k_len, s.heads);
  for (Tensor<T>* x : {&q, &k, &v, &dout}) x->fill(random);
  const int rows = round_up(s.q_len);
  float *lse = nullptr, *sums = nullptr, *dq_sums = nullptr;
  const auto allocate = [](float*& data, size_t count) {
    cudaMalloc(reinterpret_cast<void**>(&data), count * sizeof(float));
  };
  allocate(lse, size_t(s.batch) * s.heads * s.q_len);
  allocate(sums, size_t(s.batch) * s.heads * rows);
  allocate(dq_sums, size_t(s.batch) * s.heads * rows * kDim);

  flash::Flash_bwd_params p{};
  place(q, p.q_ptr, p.q_batch_stride, p.q_row_stride, p.q_head_stride);
  place(k, p.k_ptr, p.k_batch_stride, p.k_row_stride, p.k_head_stride);
  place(v, p.v_ptr, p.v_batch_stride, p.v_row_stride, p.v_head_stride);
  place(out, p.o_ptr, p.o_batch_stride, p.o_row_stride, p.o_head_stride);
  place(dout, p.do_ptr, p.do_batch_stride, p.do_row_stride, p.do_head_stride);
  place(dq, p.dq_ptr, p.dq_batch_stride, p.dq_row_stride, p.dq_head_stride);
  place(dk, p.dk_ptr, p.dk_batch_stride, p.dk_row_stride, p.dk_head_stride);
  place(dv, p.dv_ptr, p.dv_batch_stride, p.dv_row_stride, p.dv_head_stride);
  p.b = s.batch, p.h = s.heads, p.h_k = s.kv_heads, p.h_h_k_ratio = s.heads / s.kv_heads;
  p.seqlen_q = s.q_len, p.seqlen_k = s.k_len, p.d = p.d_rounded = kDim;
  p.seqlen_q_rounded = rows, p.seqlen_k_rounded = round_up(s.k_len);
  p.total_q = s.batch * s.q_len;
  p.scale_softmax = 1 / std::sqrt(float(kDim));
  p.scale_softmax_log2 = p.scale_softmax * float(M_LOG2E);
  p.p_dropout = p.rp_dropout = 1;
  p.scale_softmax_rp_dropout = p.scale_softmax;
  p.window_size_left = -1, p.window_size_right = kCausal ? 0 : -1;
  p.is_causal = kCausal, p.is_bf16 = kCausal, p.num_splits = 1;
  p.softmax_lse_ptr = lse, p.dsoftmax_sum = sums, p.dq_accum_ptr = dq_sums;

  flash::run_mha_fwd_<Element, kDim, kCausal>(p, nullptr);
  flash::run_mha_bwd_<Element, kDim, kCausal>(p, nullptr);

  Error errors[4];
  double lse_error = 0;
  for (int b = 0; b < s.batch; ++b) {
    for (int h = 0; h < s.heads; ++h) {
      const Exact exact(s, kCausal, b, h, q, k, v, dout);
      for (int i = 0; i < s.q_len; ++i) {
        const double difference = lse[(size_t(b) * s.heads + h) * s.q_len + i] - exact.lse[i];
        lse_error = std::abs(difference) <= lse_error ? lse_error : std::abs(difference);
      }
      for (int d = 0; d < kDim; ++d) {
        for (int i = 0; i < s.q_len; ++i) {
          errors[0].add(out(b, i, h, d), exact.out[i * kDim + d]);
          errors[1].add(dq(b, i, h, d), exact.dq[i * kDim + d]);
        }
        for (int j = 0; j < s.k_len; ++j) {
          errors[2].add(dk(b, j, h, d), exact.dk[j * kDim + d]);
          errors[3].add(dv(b, j, h, d), exact.dv[j * kDim + d]);
        }
      }
    }
  }
  bool right = ptxvm::last_error().empty() && lse_error < 1e-4;
  for (const Error& error : errors) right &= error.small(unit);
  std::printf("FlashAttention-2, %s, %s: %s;", kCausal ? "causal bf16" : "full fp16", s.name,
              right ? "right" : "WRONG");
  const char* names[] = {"out", "dq", "dk", "dv"};
  for (int i = 0; i < 4; ++i)
    std::printf(" %s %.2g", names[i], std::sqrt(errors[i].error / errors[i].value));
  std::printf(", lse %.2g\n", lse_error);
  for (float* data : {lse, sums, dq_sums}) cudaFree(data);
  return right;
}

}  // namespace

int main() {
  const char* text = std::getenv("PTXVM_SEED");
  const auto seed = static_cast<unsigned>(text == nullptr ? 1 : std::atoi(text));
  const double bf16 = 1.0 / 256, fp16 = 1.0 / 2048;
  bool right = true;
  const Shape shapes[] = {{"whole tiles", 1, 2, 1, 128, 256}, {"uneven", 2, 2, 2, 75, 150}};
  for (const Shape& shape : shapes) {
    right &= run<__nv_bfloat16, cutlass::bfloat16_t, true>(shape, seed, bf16);
    right &= run<__half, cutlass::half_t, false>(shape, seed, fp16);
  }
  return right ? 0 : 1;
}
