// SPDX-License-Identifier: BSD-3-Clause
//
// The intrinsics of AVX-512 and AMX, and what else depends on the compiler having their
// instructions. A test build (make emulated) has both on AVX2.
//   RA_TARGET(features)  from here on functions may use these instructions, until pop_options
//   RA_IN_ZMM            the asm constraint of a 512-bit operand that is read and written
#pragma once

#ifdef RA_EMULATED
#include "../../tests/emulated_isa/intrinsics.h"
#include "../../tests/emulated_isa/tiles.h"
#define RA_TARGET(features) RA_TARGET_EMULATED
#define RA_IN_ZMM "+m"
#else
#include <immintrin.h>
#define RA_PRAGMA(text) _Pragma(#text)
#define RA_TARGET(features) RA_PRAGMA(GCC target(features))
#define RA_IN_ZMM "+v"
#endif
