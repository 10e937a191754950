// SPDX-License-Identifier: BSD-3-Clause
//
// What follows may use AVX2 and FMA, and the compiler may vectorise it: to be included after all
// headers that others compile too. The machine is asked at the first launch.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,popcnt,lzcnt,bmi,bmi2")
#endif
