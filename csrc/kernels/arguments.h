// How kernels read their arguments, for host and device.
#pragma once

#include "kernels/kernels.h"
#include "math/philox.h"

namespace scoresde::SCORESDE_ISA {

// The coefficient of a row.
template <class A>
SCORESDE_HD A at_row(Coefficient c, int64_t row) {
  return static_cast<const A*>(c.data)[row * c.stride];
}

SCORESDE_HD bool has_noise(const Noise& noise) { return noise.array || noise.key; }

// The stream of random numbers of a row.
SCORESDE_HD Stream stream_of(const Noise& noise, int64_t row) {
  const uint64_t id = static_cast<uint64_t>(noise.ids ? noise.ids[row] : row);
  return {static_cast<uint64_t>(noise.key[0]), id, static_cast<uint32_t>(noise.key[1] + noise.draw)};
}

}  // namespace scoresde::SCORESDE_ISA
