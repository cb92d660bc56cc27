// How kernels read their arguments, for host and device.
#pragma once

#include "kernels/kernels.h"
#include "math/marginal.h"
#include "math/philox.h"

namespace scoresde::SCORESDE_ISA {

// The coefficient of a row.
template <class A>
SCORESDE_HD A at_row(Coefficient c, int64_t row) {
  const int64_t i = row * c.stride;
  return c.is_double ? static_cast<A>(static_cast<const double*>(c.data)[i])
                     : static_cast<A>(static_cast<const float*>(c.data)[i]);
}

// A coefficient of a row's matrix.
template <class A>
SCORESDE_HD A at_entry(const Matrices& c, int64_t m, int64_t k, int64_t row) {
  const int64_t i = m * c.stride_m + k * c.stride_k + row * c.stride_row;
  return c.is_double ? static_cast<A>(static_cast<const double*>(c.data)[i])
                     : static_cast<A>(static_cast<const float*>(c.data)[i]);
}

SCORESDE_HD bool has_noise(const Noise& noise) { return noise.array || noise.key; }

// A row of a call for marginals.
template <class A>
SCORESDE_HD void set_marginal(const MarginalArgs& args, int64_t row) {
  const A t = static_cast<const A*>(args.u)[row] * static_cast<A>(args.span) + static_cast<A>(args.first);
  const Marginal at = marginal_at<A>(args.process, args.a, args.b, static_cast<double>(t));
  static_cast<A*>(args.t)[row] = t;
  static_cast<A*>(args.m)[row] = static_cast<A>(at.m);
  static_cast<A*>(args.s)[row] = static_cast<A>(at.s);
}

// The stream of random numbers of a row.
SCORESDE_HD Stream stream_of(const Noise& noise, int64_t row) {
  const uint64_t id = static_cast<uint64_t>(noise.ids ? noise.ids[row] : row);
  return {static_cast<uint64_t>(noise.key[0]), id, static_cast<uint32_t>(noise.key[1] + noise.draw)};
}

}  // namespace scoresde::SCORESDE_ISA
