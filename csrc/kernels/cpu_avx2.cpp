// The loops for AVX2. What other files share comes first, so that none of it is compiled for this set.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif
#define SCORESDE_ISA avx2
#define SCORESDE_VECTOR 8
#define SCORESDE_FMA  // the compiler's own macro does not follow the pragma
#include "kernels/cpu_loops.h"

namespace scoresde::avx2 {
const CpuKernels& table() { return kernels("avx2"); }
}  // namespace scoresde::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
