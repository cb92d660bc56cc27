// Embedded Runge-Kutta steps (Dormand and Prince 1980; Hairer, Norsett, Wanner, "Solving Ordinary Differential
// Equations I", II.4).
#pragma once

#include "math/scalar.h"

namespace scoresde::SCORESDE_ISA {

// err / (atol + rtol max(|y0|, |y1|)). A NaN in y0 or y1 must not hide behind a comparison, so it is added back.
template <class A>
SCORESDE_HD A scaled_error(A err, A y0, A y1, A rtol, A atol) {
  const A a0 = y0 < 0 ? -y0 : y0;
  const A a1 = y1 < 0 ? -y1 : y1;
  const A scale = atol + rtol * (a0 > a1 ? a0 : a1);
  return err / scale + (y0 - y0) + (y1 - y1);
}

struct StepDecision {
  bool accept;
  double h;  // the next |h| to try
};

// The controller of scipy's RungeKutta: accepted iff norm < 1; factor safety * norm^exponent within [0.2, 10]; no
// growth right after a rejection. A norm that is not finite is a rejection by the smallest factor: who called decides
// whether to go on.
SCORESDE_HD StepDecision control_step(double norm, double h, bool after_rejection, double exponent) {
  constexpr double safety = 0.9, smallest = 0.2, largest = 10.0;
  if (norm < 1.0) {
    double factor = norm == 0.0 ? largest : safety * pow(norm, exponent);
    factor = factor < largest ? factor : largest;
    if (after_rejection && factor > 1.0) factor = 1.0;
    return {true, h * factor};
  }
  const double factor = safety * pow(norm, exponent);
  return {false, h * (factor > smallest ? factor : smallest)};
}

}  // namespace scoresde::SCORESDE_ISA
