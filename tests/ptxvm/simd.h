// SPDX-License-Identifier: BSD-3-Clause
//
// To be included last: what follows may use AVX2 and FMA. The machine is asked at the first launch.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,popcnt,lzcnt,bmi,bmi2")
#endif
