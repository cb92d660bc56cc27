// The perturbation kernels p(x_t | x_0) = N(m x_0, s^2) that are formulas (Song et al. 2021, eq. 29, 33, 34 and 31).
#pragma once

#include "kernels/kernels.h"
#include "math/scalar.h"

namespace scoresde::SCORESDE_ISA {

// exp(x) for x of at most 700, to 3e-16 of it, in operations that every compiler vectorises.
SCORESDE_HD double exponential(double x) {
  x = x < -700.0 ? -700.0 : x;  // and below that what float32 cannot hold either
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

struct Marginal {
  double m, s;
};

// At time t, for results of type A; what p and q are, MarginalArgs says. float32's 1 - m^2 is a short series where
// m is near 1, so that one exponential is all it takes.
template <Process process, class A>
SCORESDE_HD Marginal marginal_at(double p, double q, double t) {
  constexpr bool exact = sizeof(A) == sizeof(double);
  if constexpr (process == Process::ve) return {1.0, p * (exact ? exp(q * t) : exponential(q * t))};
  const double log_m = -t * (p * t + q), m = exact ? exp(log_m) : exponential(log_m), y = 2.0 * log_m;
  const double series = -y * (1.0 + y * (0.5 + y * (1.0 / 6.0 + y * (1.0 / 24.0))));
  const double variance = exact ? -expm1(y) : y > -1e-3 ? series : 1.0 - m * m;
  return {m, process == Process::vp ? sqrt(variance) : variance};
}

}  // namespace scoresde::SCORESDE_ISA
