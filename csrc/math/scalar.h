// Number types and the few operations that every functor is built from, for host and device. No torch here.
//
// Each translation unit that includes csrc/math defines SCORESDE_ISA (avx512, avx2, generic, device) first: the headers
// live in a namespace of that name, so that code compiled for one instruction set can never be linked into another's
// place.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifndef SCORESDE_ISA
#error "define SCORESDE_ISA before including csrc/math"
#endif

#if defined(__CUDACC__)
#define SCORESDE_HD __host__ __device__ __forceinline__
#else
#define SCORESDE_HD inline __attribute__((always_inline))
#endif

namespace scoresde::SCORESDE_ISA {

template <class To, class From>
SCORESDE_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// a * b + c with one rounding where the machine has a fused multiply-add, for polynomials: their results then are the
// same bits on AVX2, AVX-512 and CUDA. On the generic path, where fma() would be a slow library call, two roundings.
// All other formulas are written plainly, and the compilers are told not to contract them (-ffp-contract=off,
// -fmad=false): the same bits on every machine.
template <class A>
SCORESDE_HD A mul_add(A a, A b, A c) {
#if defined(__CUDA_ARCH__) || defined(SCORESDE_FMA) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  if constexpr (sizeof(A) == 4) {
    return __builtin_fmaf(a, b, c);
  } else {
    return __builtin_fma(a, b, c);
  }
#else
  return a * b + c;
#endif
}

// What functors do to single numbers; kernels/cpu_normals.h has the same for vectors.
SCORESDE_HD uint32_t bits_of(float v) { return bits_as<uint32_t>(v); }
SCORESDE_HD float float_of(uint32_t bits) { return bits_as<float>(bits); }
SCORESDE_HD float from_signed(uint32_t v) { return static_cast<float>(static_cast<int32_t>(v)); }
SCORESDE_HD uint32_t shift_signed(uint32_t v, int n) { return static_cast<uint32_t>(static_cast<int32_t>(v) >> n); }
SCORESDE_HD float root(float v) { return __builtin_sqrtf(v); }
// a where the highest bit of m is set, else b
SCORESDE_HD float where_highest_bit(uint32_t m, float a, float b) {
  const uint32_t mask = shift_signed(m, 31);
  return float_of((bits_of(a) & mask) | (bits_of(b) & ~mask));
}
// v with its sign changed where the highest bit of m is set
SCORESDE_HD float change_sign(float v, uint32_t m) { return float_of(bits_of(v) ^ (m & 0x80000000u)); }

// bfloat16 and IEEE half as stored bits. Conversions are branch-free integer arithmetic, which every compiler
// vectorises.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

SCORESDE_HD float widen(float v) { return v; }
SCORESDE_HD double widen(double v) { return v; }
SCORESDE_HD float widen(bf16 v) { return bits_as<float>(uint32_t{v.bits} << 16); }
SCORESDE_HD float widen(f16 v) {
  const uint32_t sign = uint32_t{v.bits & 0x8000u} << 16;
  const uint32_t magnitude = uint32_t{v.bits & 0x7fffu} << 13;
  // Read with a float's exponent field, a half is 2^112 too small: the product is exact, subnormals included.
  const uint32_t finite = bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;  // Inf and NaN
  return bits_as<float>(sign | (magnitude >= 0x0f800000u ? special : finite));
}

template <class T>
SCORESDE_HD T narrow(float v);
template <class T>
SCORESDE_HD T narrow(double v);

template <>
SCORESDE_HD float narrow<float>(float v) {
  return v;
}
template <>
SCORESDE_HD double narrow<double>(double v) {
  return v;
}
template <>
SCORESDE_HD bf16 narrow<bf16>(float v) {
  const uint32_t u = bits_as<uint32_t>(v);
  const uint32_t nearest_even = u + 0x7fffu + ((u >> 16) & 1u);
  const uint32_t rounded = (u & 0x7fffffffu) > 0x7f800000u ? (u | 0x00400000u) : nearest_even;  // NaN stays NaN
  return bf16{static_cast<uint16_t>(rounded >> 16)};
}
template <>
SCORESDE_HD f16 narrow<f16>(float v) {
  const uint32_t u = bits_as<uint32_t>(v);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  // Normal halves: rebias the exponent and round the 13 lost bits to nearest even. A carry may run into the exponent,
  // up to Inf.
  const uint32_t normal = (a - 0x38000000u + 0x0fffu + ((a >> 13) & 1u)) >> 13;
  // Subnormal halves: adding 0.5 aligns the wanted bits with the end of the significand, and the addition rounds.
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(a) + 0.5f) - 0x3f000000u;
  uint32_t h = a < 0x38800000u ? subnormal : normal;
  h = a >= 0x477ff000u ? 0x7c00u : h;
  h = a > 0x7f800000u ? 0x7e00u : h;
  return f16{static_cast<uint16_t>(sign | h)};
}

// The type that a stored type is computed in.
template <class T>
struct compute {
  using type = float;
};
template <>
struct compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename compute<T>::type;

}  // namespace scoresde::SCORESDE_ISA
