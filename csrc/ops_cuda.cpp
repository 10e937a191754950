// SPDX-License-Identifier: BSD-3-Clause
//
// The operators of ring_attention on CUDA: device guard, the current stream, the workspace as a
// tensor of that stream, and the launchers of csrc/cuda. A library of its own, loaded only where
// torch has CUDA; the schemas are in ops.cpp.
#include <Python.h>
#include <cuda_runtime_api.h>

#include <string>

#include "cuda/launch.h"
#include "cuda/settings.h"
#include "operators.h"

namespace ring_attention {
namespace {

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("ring_attention: a CUDA kernel failed: ") +
                           cudaGetErrorString(status));
}

// The launchers on the current stream of the first tensor's device, as Operators wants kernels.
class CudaKernels {
 public:
  explicit CudaKernels(const Tensor& first)
      : like_(first),
        guard_(first.get_device_index()),
        device_(cuda::device_of(first.get_device_index())) {
    // This library's CUDA runtime is linked into it and has an own idea of the current device.
    check(cudaSetDevice(first.get_device_index()));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(first.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int64_t alignment() const { return 16; }  // what cp.async copies

  void expect_supported(const Expect& expect, const Arg& arg) const {
    expect(arg.tensor.scalar_type() != ScalarType::Double, arg,
           ".dtype float32, bfloat16 or float16 on CUDA, got float64; compute it on the CPU");
  }

  void forward(const ForwardParams& params) const {
    const Tensor memory = workspace(cuda::forward_workspace_bytes(params, device_));
    check(cuda::forward(params, memory.mutable_data_ptr(), device_, stream_));
  }
  void backward(const BackwardParams& given) const {
    BackwardParams params = given;
    params.deterministic = cuda::deterministic_backward();
    const Tensor memory = workspace(cuda::backward_workspace_bytes(params, device_));
    check(cuda::backward(params, memory.mutable_data_ptr(), device_, stream_));
  }
  void combine(DType, int64_t rows, int64_t v_head_dim, void* acc, void* m, void* l,
               const void* other_acc, const void* other_m, const void* other_l) const {
    check(cuda::combine(rows, v_head_dim, acc, m, l, other_acc, other_m, other_l, stream_));
  }
  void finish(const ForwardParams& params) const { check(cuda::finish(params, stream_)); }
  void delta(const DeltaParams& params) const { check(cuda::delta(params, stream_)); }
  void sink_gradient(DType, const void* sinks, const void* lse, const void* delta, void* dsinks,
                     int64_t batch, int64_t heads, int64_t q_len) const {
    check(cuda::sink_gradient(static_cast<const float*>(sinks), static_cast<const float*>(lse),
                              static_cast<const float*>(delta), static_cast<float*>(dsinks), batch,
                              heads, q_len, stream_));
  }

 private:
  // Freed when the call returns, which is safe: torch's allocator hands memory on in stream order.
  Tensor workspace(int64_t bytes) const {
    return torch::stable::new_empty(like_, {bytes}, ScalarType::Byte);
  }

  const Tensor& like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Device device_;
  cudaStream_t stream_ = nullptr;
};

STABLE_TORCH_LIBRARY_IMPL(ring_attention, CUDA, m) { Operators<CudaKernels>::implement(m); }

}  // namespace
}  // namespace ring_attention

// torch.ops.load_library loads this file, but setuptools builds it as a Python module, which
// needs an init function; importing it registers the same operators.
extern "C" PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
