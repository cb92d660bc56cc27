// The perturbation kernels p(x_t | x_0) = N(m x_0, s^2) that are formulas (Song et al. 2021, eq. 29, 33, 34 and 31).
#pragma once

#include "kernels/kernels.h"
#include "math/scalar.h"

namespace scoresde::SCORESDE_ISA {

template <int n>
constexpr double factorial = n * factorial<n - 1>;
template <>
inline constexpr double factorial<1> = 1.0;

// (e^x - 1) / x near 0 by n terms of Taylor's series; `sum` is what has been added of it.
template <int n>
SCORESDE_HD double taylor(double x, double sum = 0.0) {
  constexpr double c = 1.0 / factorial<n>;
  sum = mul_add(sum, x, c);
  if constexpr (n == 1) {
    return sum;
  } else {
    return taylor<n - 1>(x, sum);
  }
}

// exp(x) to 3e-16 of it, within 1e-304 and 1e307, in operations that every compiler vectorises.
SCORESDE_HD double exponential(double x) {
  x = x < -700.0 ? -700.0 : x;
  x = x > 708.0 ? 708.0 : x;
  // The sum's last bits are the integer next to x / ln 2.
  const double shifted = mul_add(x, 0x1.71547652b82fep0, 0x1.8p52), n = shifted - 0x1.8p52;
  const double r = mul_add(n, -0x1.abc9e3b39803fp-56, mul_add(n, -0x1.62e42fefa39efp-1, x));  // at most 0.35
  return mul_add(taylor<12>(r), r, 1.0) * bits_as<double>((bits_as<uint64_t>(shifted) + 1023u) << 52);
}

// 1 - m^2 for m = exp(y / 2) below 1, to 1e-15 of it: near 1, where the difference cancels, by Taylor's series.
SCORESDE_HD double one_minus_square(double m, double y) {
  const double series = -y * taylor<17>(y), difference = 1.0 - m * m;
  return y > -0.7 ? series : difference;
}

struct Marginal {
  double m, s;
};

// At time t; what p and q are, MarginalArgs says.
template <Process process>
SCORESDE_HD Marginal marginal_at(double p, double q, double t) {
  if constexpr (process == Process::ve) return {1.0, p * exponential(q * t)};
  const double log_m = -t * (p * t + q), m = exponential(log_m), variance = one_minus_square(m, 2.0 * log_m);
  return {m, process == Process::vp ? sqrt(variance) : variance};
}

}  // namespace scoresde::SCORESDE_ISA
