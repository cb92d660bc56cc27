// The perturbation kernels p(x_t | x_0) = N(m x_0, s^2) that are formulas (Song et al. 2021, eq. 29, 33, 34 and 31).
#pragma once

#include "kernels/kernels.h"
#include "math/scalar.h"

namespace scoresde::SCORESDE_ISA {

struct Marginal {
  double m, s;
};

// 1 - m^2 for m = exp(log_m), to float32's precision at least, at a quarter of what expm1 costs.
template <class A>
SCORESDE_HD double one_minus_square(double m, double log_m) {
  if constexpr (sizeof(A) == sizeof(double)) return -expm1(2.0 * log_m);
  const double y = 2.0 * log_m;
  return y > -1e-3 ? -y * (1.0 + y / 2.0 * (1.0 + y / 3.0 * (1.0 + y / 4.0))) : 1.0 - m * m;
}

// At time t, for results of type A. vp and subvp: a, b are beta(0), beta(1); ve: sigma(0), sigma(1).
template <class A>
SCORESDE_HD Marginal marginal_at(Process process, double a, double b, double t) {
  if (process == Process::ve) return {1.0, a * exp(t * log(b / a))};
  const double log_m = -t * (0.25 * t * (b - a) + 0.5 * a), m = exp(log_m);
  const double variance = one_minus_square<A>(m, log_m);
  return {m, process == Process::vp ? sqrt(variance) : variance};
}

}  // namespace scoresde::SCORESDE_ISA
