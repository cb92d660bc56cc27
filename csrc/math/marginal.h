// The perturbation kernels p(x_t | x_0) = N(m x_0, s^2) that are formulas (Song et al. 2021, eq. 29, 33, 34 and 31).
#pragma once

#include "kernels/kernels.h"
#include "math/scalar.h"

namespace scoresde::SCORESDE_ISA {

// exp(x) to 3e-16 of it, within 1e-304 and 1e307, in operations that every compiler vectorises.
SCORESDE_HD double exponential(double x) {
  x = x < -700.0 ? -700.0 : x;
  x = x > 708.0 ? 708.0 : x;
  // The sum's last bits are the integer next to x / ln 2.
  const double shifted = mul_add(x, 0x1.71547652b82fep0, 0x1.8p52), n = shifted - 0x1.8p52;
  const double r = mul_add(n, -0x1.abc9e3b39803fp-56, mul_add(n, -0x1.62e42fefa39efp-1, x));
  double p = 1.0 / 479001600.0;  // Taylor's series: |r| is at most 0.35
  p = mul_add(p, r, 1.0 / 39916800.0);
  p = mul_add(p, r, 1.0 / 3628800.0);
  p = mul_add(p, r, 1.0 / 362880.0);
  p = mul_add(p, r, 1.0 / 40320.0);
  p = mul_add(p, r, 1.0 / 5040.0);
  p = mul_add(p, r, 1.0 / 720.0);
  p = mul_add(p, r, 1.0 / 120.0);
  p = mul_add(p, r, 1.0 / 24.0);
  p = mul_add(p, r, 1.0 / 6.0);
  p = mul_add(p, r, 0.5);
  p = mul_add(p, r, 1.0);
  p = mul_add(p, r, 1.0);
  return p * bits_as<double>((bits_as<uint64_t>(shifted) + 1023u) << 52);
}

// 1 - m^2 for m = exp(y / 2) below 1, to 1e-15 of it: near 1, where the difference cancels, by Taylor's series.
SCORESDE_HD double one_minus_square(double m, double y) {
  double p = 1.0 / 355687428096000.0;  // 1 / 17!
  p = mul_add(p, y, 1.0 / 20922789888000.0);
  p = mul_add(p, y, 1.0 / 1307674368000.0);
  p = mul_add(p, y, 1.0 / 87178291200.0);
  p = mul_add(p, y, 1.0 / 6227020800.0);
  p = mul_add(p, y, 1.0 / 479001600.0);
  p = mul_add(p, y, 1.0 / 39916800.0);
  p = mul_add(p, y, 1.0 / 3628800.0);
  p = mul_add(p, y, 1.0 / 362880.0);
  p = mul_add(p, y, 1.0 / 40320.0);
  p = mul_add(p, y, 1.0 / 5040.0);
  p = mul_add(p, y, 1.0 / 720.0);
  p = mul_add(p, y, 1.0 / 120.0);
  p = mul_add(p, y, 1.0 / 24.0);
  p = mul_add(p, y, 1.0 / 6.0);
  p = mul_add(p, y, 0.5);
  p = mul_add(p, y, 1.0);
  const double series = -y * p, difference = 1.0 - m * m;
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
