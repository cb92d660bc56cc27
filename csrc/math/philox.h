// Counter-based random numbers: every number is a pure function of (seed, sample id, draw, element).
//
// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is the
// seed; the counter is (element / 4, draw, sample id); the four words of a block belong to four neighbouring elements.
#pragma once

#include "math/scalar.h"

namespace scoresde::SCORESDE_ISA {

struct Words {
  uint32_t x, y, z, w;
};

// The stream of one sample within one draw.
struct Stream {
  uint64_t seed;
  uint64_t id;
  uint32_t draw;
};

SCORESDE_HD uint32_t mul_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t{a} * b) >> 32); }

SCORESDE_HD Words philox_round(Words c, uint32_t k0, uint32_t k1) {
  constexpr uint32_t m0 = 0xD2511F53u, m1 = 0xCD9E8D57u;
  return {mul_high(m1, c.z) ^ c.y ^ k0, m1 * c.z, mul_high(m0, c.x) ^ c.w ^ k1, m0 * c.x};
}

SCORESDE_HD Words philox(Words c, uint32_t k0, uint32_t k1) {
  constexpr uint32_t w0 = 0x9E3779B9u, w1 = 0xBB67AE85u;
  c = philox_round(c, k0, k1);
  c = philox_round(c, k0 + w0, k1 + w1);
  c = philox_round(c, k0 + 2 * w0, k1 + 2 * w1);
  c = philox_round(c, k0 + 3 * w0, k1 + 3 * w1);
  c = philox_round(c, k0 + 4 * w0, k1 + 4 * w1);
  c = philox_round(c, k0 + 5 * w0, k1 + 5 * w1);
  c = philox_round(c, k0 + 6 * w0, k1 + 6 * w1);
  c = philox_round(c, k0 + 7 * w0, k1 + 7 * w1);
  c = philox_round(c, k0 + 8 * w0, k1 + 8 * w1);
  return philox_round(c, k0 + 9 * w0, k1 + 9 * w1);
}

// Block `block` of a stream: the words of elements 4 block .. 4 block + 3.
SCORESDE_HD Words random_words(Stream s, uint32_t block) {
  return philox({block, s.draw, static_cast<uint32_t>(s.id), static_cast<uint32_t>(s.id >> 32)},
                static_cast<uint32_t>(s.seed), static_cast<uint32_t>(s.seed >> 32));
}

// Uniform on [0, 1) with 24 bits, as torch.rand has them in float32.
SCORESDE_HD float uniform_from(uint32_t word) { return static_cast<float>(static_cast<int32_t>(word >> 8)) * 0x1p-24f; }

// Uniform on {0, ..., high - 1} for high <= 2^32. The bias is below high / 2^32.
SCORESDE_HD int64_t integer_from(uint32_t word, uint64_t high) {
  return static_cast<int64_t>((uint64_t{word} * high) >> 32);
}

// The functions below take one number, or the vectors of kernels/cpu_normals.h.

// -2 log(u) for positive normal u: u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); minimax polynomial, relative
// error 6e-9. The factor -2 is in the coefficients.
template <class F>
SCORESDE_HD F minus_two_log(F u) {
  const auto shifted = bits_of(u) - 0x3f3504f3u;  // sqrt(1/2)
  const F e = from_signed(shift_signed(shifted, 23));
  const F f = float_of((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  F p = 0x1.38b4ccp-3f;
  p = mul_add(p, f, F(-0x1.055b46p-2f));
  p = mul_add(p, f, F(0x1.0d8552p-2f));
  p = mul_add(p, f, F(-0x1.22da22p-2f));
  p = mul_add(p, f, F(0x1.547244p-2f));
  p = mul_add(p, f, F(-0x1.99a008p-2f));
  p = mul_add(p, f, F(0x1.000228p-1f));
  p = mul_add(p, f, F(-0x1.555554p-1f));
  const F f2 = f * f;
  const F tail = mul_add(p * f, f2, f2);
  // 2 ln 2 in two parts, the first short enough that e times it is exact.
  return mul_add(e, F(-0x1.62ep0f), mul_add(f, F(-2.0f), mul_add(e, F(-0x1.0bfbe8p-14f), tail)));
}

template <class F>
struct Pair {
  F a, b;
};

// Two independent standard normals from two words (Box and Muller 1958): radius sqrt(-2 log u), u = (word + 1/2) /
// 2^32, and an angle of `turn` 2^-32 turns, reduced exactly in integers to at most an eighth of a turn.
template <class U>
SCORESDE_HD auto normals_from(U word, U turn) {
  using F = decltype(float_of(word));
  // Two 16-bit halves convert exactly; the sum rounds once.
  const F u =
      mul_add(from_signed(word >> 16), F(0x1p-16f), mul_add(from_signed(word & 0xffffu), F(0x1p-32f), F(0x1p-33f)));
  const F radius = root(minus_two_log(u));

  const U quadrant = turn + 0x20000000u;                                   // its two highest bits
  const F r = from_signed(turn - (quadrant & 0xc0000000u)) * F(0x1p-31f);  // half turns, |r| <= 1/4
  const F r2 = r * r;
  F s = 0.08099587f;
  F c = 0.23126093f;
  s = mul_add(s, r2, F(-0.5992014f));
  c = mul_add(c, r2, F(-1.3350359f));
  s = mul_add(s, r2, F(2.5501626f));
  c = mul_add(c, r2, F(4.0587068f));
  s = mul_add(s, r2, F(-5.1677127f));
  c = mul_add(c, r2, F(-4.934802f));
  s = mul_add(s, r2, F(3.1415927f)) * r;
  c = mul_add(c, r2, F(1.0f));
  const U odd = quadrant << 1;
  return Pair<F>{radius * change_sign(where_highest_bit(odd, s, c), odd ^ quadrant),
                 radius * change_sign(where_highest_bit(odd, c, s), quadrant)};
}

// The standard normal of one of the four elements of a block.
SCORESDE_HD float normal_of(Words w, uint32_t element) {
  const bool second = element & 2u;
  const Pair pair = normals_from(second ? w.z : w.x, second ? w.w : w.y);
  return element & 1u ? pair.b : pair.a;
}

}  // namespace scoresde::SCORESDE_ISA
