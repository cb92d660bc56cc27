// The loops for AVX-512. What other files share comes first, so that none of it is compiled for this set.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/kernels.h"

#if defined(__x86_64__)
// gcc 12 takes its own _mm512_undefined_ps for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,prefer-vector-width=512")
#endif
#define SCORESDE_ISA avx512
#define SCORESDE_VECTOR 16
#define SCORESDE_FMA  // the compiler's own macro does not follow the pragma
#include "kernels/cpu_loops.h"

namespace scoresde::avx512 {
const CpuKernels& table() { return kernels("avx512"); }
}  // namespace scoresde::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
