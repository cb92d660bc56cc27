// The one idea: perturbation, loss, predictors, correctors and the probability-flow drift are affine in (state, network
// output, noise), with one coefficient per sample. docs/equations.md says which coefficients make which equation.
#pragma once

#include "math/scalar.h"

namespace scoresde::SCORESDE_ISA {

// mean = p x + q out
template <class A>
SCORESDE_HD A affine_mean(A x, A out, A p, A q) {
  return p * x + q * out;
}

// next = mean + n z
template <class A>
SCORESDE_HD A affine_next(A mean, A z, A n) {
  return mean + n * z;
}

// sum + c a: one more term of a linear combination
template <class A>
SCORESDE_HD A add_term(A sum, A a, A c) {
  return sum + c * a;
}

// r = c out + d z, the residual whose weighted square is the denoising score-matching loss
template <class A>
SCORESDE_HD A residual(A out, A z, A c, A d) {
  return c * out + d * z;
}

// d (w r^2) / d out = 2 w c r, from slope = 2 w c
template <class A>
SCORESDE_HD A residual_gradient(A r, A slope) {
  return slope * r;
}

}  // namespace scoresde::SCORESDE_ISA
