// SPDX-License-Identifier: BSD-3-Clause
//
// Errors show in ptxvm::last_error().
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

#define C10_CUDA_CHECK(call) static_cast<void>(call)
#define C10_CUDA_KERNEL_LAUNCH_CHECK() static_cast<void>(0)
