// How kernels read their arguments, for host and device.
#pragma once

#include <type_traits>

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

// The marginal of a row.
template <Process process, class A>
SCORESDE_HD void set_marginal(const MarginalArgs& args, A u, A& t, A& m, A& s) {
  t = u * static_cast<A>(args.span) + static_cast<A>(args.first);
  const Marginal at = marginal_at<process>(args.p, args.q, static_cast<double>(t));
  m = static_cast<A>(at.m);
  s = static_cast<A>(at.s);
}

// Calls f with the process as a constant.
template <class F>
auto with_process(Process process, F f) {
  switch (process) {
    case Process::vp:
      return f(std::integral_constant<Process, Process::vp>{});
    case Process::subvp:
      return f(std::integral_constant<Process, Process::subvp>{});
    default:
      return f(std::integral_constant<Process, Process::ve>{});
  }
}

// The stream of random numbers of a row.
SCORESDE_HD Stream stream_of(const Noise& noise, int64_t row) {
  const uint64_t id = static_cast<uint64_t>(noise.ids ? noise.ids[row] : row);
  return {static_cast<uint64_t>(noise.key[0]), id, static_cast<uint32_t>(noise.key[1] + noise.draw)};
}

}  // namespace scoresde::SCORESDE_ISA
