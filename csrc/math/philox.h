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

// log(u) for positive normal u: u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); minimax polynomial, relative error
// 6e-9.
SCORESDE_HD float log_positive(float u) {
  const int32_t shifted = bits_as<int32_t>(u) - 0x3f3504f3;  // sqrt(1/2)
  const int32_t e = shifted >> 23;
  const float f = bits_as<float>((shifted & 0x007fffff) + 0x3f3504f3) - 1.0f;
  float p = -0x1.38b4ccp-4f;
  p = mul_add(p, f, 0x1.055b46p-3f);
  p = mul_add(p, f, -0x1.0d8552p-3f);
  p = mul_add(p, f, 0x1.22da22p-3f);
  p = mul_add(p, f, -0x1.547244p-3f);
  p = mul_add(p, f, 0x1.99a008p-3f);
  p = mul_add(p, f, -0x1.000228p-2f);
  p = mul_add(p, f, 0x1.555554p-2f);
  const float f2 = f * f;
  const float tail = mul_add(p * f, f2, -0.5f * f2);
  // ln 2 in two parts, the first short enough that e times it is exact.
  const float scale = static_cast<float>(e);
  return mul_add(scale, 0x1.62ep-1f, f + mul_add(scale, 0x1.0bfbe8p-15f, tail));
}

struct Pair {
  float a, b;
};

// Two independent standard normals from two words (Box and Muller 1958): radius sqrt(-2 log u), u = (word + 1/2) /
// 2^32, and an angle of `turn` 2^-32 turns, reduced exactly in integers to at most an eighth of a turn.
SCORESDE_HD Pair normals_from(uint32_t word, uint32_t turn) {
  // Two 16-bit halves convert exactly; the sum rounds once.
  const float u = mul_add(static_cast<float>(static_cast<int32_t>(word >> 16)), 0x1p-16f,
                          mul_add(static_cast<float>(static_cast<int32_t>(word & 0xffffu)), 0x1p-32f, 0x1p-33f));
  const float radius = __builtin_sqrtf(-2.0f * log_positive(u));

  const uint32_t quadrant = (turn + 0x20000000u) >> 30;
  const float r =
      static_cast<float>(static_cast<int32_t>(turn - (quadrant << 30))) * 0x1p-31f;  // half turns, |r| <= 1/4
  const float r2 = r * r;
  float s = 0.08099587f;
  s = mul_add(s, r2, -0.5992014f);
  s = mul_add(s, r2, 2.5501626f);
  s = mul_add(s, r2, -5.1677127f);
  s = mul_add(s, r2, 3.1415927f) * r;
  float c = 0.23126093f;
  c = mul_add(c, r2, -1.3350359f);
  c = mul_add(c, r2, 4.0587068f);
  c = mul_add(c, r2, -4.934802f);
  c = mul_add(c, r2, 1.0f);
  const uint32_t swap = 0u - (quadrant & 1u);
  const uint32_t sb = bits_as<uint32_t>(s), cb = bits_as<uint32_t>(c);
  const uint32_t cos_bits = ((cb & ~swap) | (sb & swap)) ^ (((quadrant + 1u) & 2u) << 30);
  const uint32_t sin_bits = ((sb & ~swap) | (cb & swap)) ^ ((quadrant & 2u) << 30);
  return {radius * bits_as<float>(cos_bits), radius * bits_as<float>(sin_bits)};
}

// The standard normal of one of the four elements of a block.
SCORESDE_HD float normal_of(Words w, uint32_t element) {
  const bool second = element & 2u;
  const Pair pair = normals_from(second ? w.z : w.x, second ? w.w : w.y);
  return element & 1u ? pair.b : pair.a;
}

}  // namespace scoresde::SCORESDE_ISA
