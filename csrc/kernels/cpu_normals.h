// Normals on the CPU. Where the file of an instruction set defines SCORESDE_VECTOR, the floats in a register (8 or 16),
// by hand-written vectors: Philox on the 64-bit lanes that the processor multiplies, then the functor of math/philox.h.
//
// A plain loop over normals_from(random_words()) gives the same bits in 2.5 times the time: compilers shuffle 32-bit
// words to and fro to multiply them, and work on one long chain of operations at a time.
#pragma once

#include "kernels/kernels.h"
#include "math/philox.h"

namespace scoresde::SCORESDE_ISA {

// The Philox blocks of a tile: which block of which stream. A row's last block may stick out of the row.
struct Blocks {
  static constexpr int64_t most = Tiling::tile / 4;
  int64_t n;
  alignas(64) uint32_t block[most], id_low[most], id_high[most];
};

#ifdef SCORESDE_VECTOR

// ---- registers ----

#if SCORESDE_VECTOR == 8
#define SCORESDE_MM(name) _mm256_##name
using FloatRegister = __m256;
using WordRegister = __m256i;

SCORESDE_HD WordRegister odd_lanes_of(WordRegister even, WordRegister odd) {
  return _mm256_blend_epi32(even, odd, 0xaa);
}
SCORESDE_HD FloatRegister where_highest_bit(WordRegister m, FloatRegister a, FloatRegister b) {
  return _mm256_blendv_ps(b, a, (FloatRegister)m);
}
#else
#define SCORESDE_MM(name) _mm512_##name
using FloatRegister = __m512;
using WordRegister = __m512i;

SCORESDE_HD WordRegister odd_lanes_of(WordRegister even, WordRegister odd) {
  return _mm512_mask_blend_epi32(0xaaaa, even, odd);
}
SCORESDE_HD FloatRegister where_highest_bit(WordRegister m, FloatRegister a, FloatRegister b) {
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(m), b, a);
}
#endif

constexpr int lanes = SCORESDE_VECTOR;

// n registers side by side: functors then work on n chains of operations at a time.
#define SCORESDE_EACH for (int i = 0; i < n; ++i)

template <int n>
struct Floats {
  FloatRegister v[n];

  Floats() = default;
  SCORESDE_HD Floats(float c) { SCORESDE_EACH v[i] = SCORESDE_MM(set1_ps)(c); }
  friend SCORESDE_HD Floats operator+(Floats a, Floats b) {
    SCORESDE_EACH a.v[i] = a.v[i] + b.v[i];
    return a;
  }
  friend SCORESDE_HD Floats operator-(Floats a, Floats b) {
    SCORESDE_EACH a.v[i] = a.v[i] - b.v[i];
    return a;
  }
  friend SCORESDE_HD Floats operator*(Floats a, Floats b) {
    SCORESDE_EACH a.v[i] = a.v[i] * b.v[i];
    return a;
  }
  friend SCORESDE_HD Floats mul_add(Floats a, Floats b, Floats c) {
    SCORESDE_EACH a.v[i] = SCORESDE_MM(fmadd_ps)(a.v[i], b.v[i], c.v[i]);
    return a;
  }
  friend SCORESDE_HD Floats root(Floats a) {
    SCORESDE_EACH a.v[i] = SCORESDE_MM(sqrt_ps)(a.v[i]);
    return a;
  }
};

template <int n>
struct Ints {
  WordRegister v[n];

  Ints() = default;
  SCORESDE_HD Ints(uint32_t c) { SCORESDE_EACH v[i] = SCORESDE_MM(set1_epi32)(static_cast<int>(c)); }
  friend SCORESDE_HD Ints operator+(Ints a, Ints b) {
    SCORESDE_EACH a.v[i] = SCORESDE_MM(add_epi32)(a.v[i], b.v[i]);
    return a;
  }
  friend SCORESDE_HD Ints operator-(Ints a, Ints b) {
    SCORESDE_EACH a.v[i] = SCORESDE_MM(sub_epi32)(a.v[i], b.v[i]);
    return a;
  }
  friend SCORESDE_HD Ints operator&(Ints a, Ints b) {
    SCORESDE_EACH a.v[i] = a.v[i] & b.v[i];
    return a;
  }
  friend SCORESDE_HD Ints operator^(Ints a, Ints b) {
    SCORESDE_EACH a.v[i] = a.v[i] ^ b.v[i];
    return a;
  }
  friend SCORESDE_HD Ints operator>>(Ints a, int bits) {
    SCORESDE_EACH a.v[i] = SCORESDE_MM(srli_epi32)(a.v[i], bits);
    return a;
  }
  friend SCORESDE_HD Ints operator<<(Ints a, int bits) {
    SCORESDE_EACH a.v[i] = SCORESDE_MM(slli_epi32)(a.v[i], bits);
    return a;
  }
  friend SCORESDE_HD Ints shift_signed(Ints a, int bits) {
    SCORESDE_EACH a.v[i] = SCORESDE_MM(srai_epi32)(a.v[i], bits);
    return a;
  }
};

template <int n>
SCORESDE_HD Floats<n> from_signed(Ints<n> a) {
  Floats<n> result;
  SCORESDE_EACH result.v[i] = SCORESDE_MM(cvtepi32_ps)(a.v[i]);
  return result;
}
template <int n>
SCORESDE_HD Floats<n> float_of(Ints<n> a) {
  Floats<n> result;
  SCORESDE_EACH result.v[i] = (FloatRegister)a.v[i];
  return result;
}
template <int n>
SCORESDE_HD Ints<n> bits_of(Floats<n> a) {
  Ints<n> result;
  SCORESDE_EACH result.v[i] = (WordRegister)a.v[i];
  return result;
}
template <int n>
SCORESDE_HD Floats<n> where_highest_bit(Ints<n> m, Floats<n> a, Floats<n> b) {
  SCORESDE_EACH a.v[i] = where_highest_bit(m.v[i], a.v[i], b.v[i]);
  return a;
}
template <int n>
SCORESDE_HD Floats<n> change_sign(Floats<n> a, Ints<n> m) {
  return float_of(bits_of(a) ^ (m & Ints<n>(0x80000000u)));
}

// ---- Philox ----

constexpr int chains = 4;                         // registers of counters that are worked on at a time
constexpr int group_blocks = chains * lanes / 2;  // the blocks in them

// Counters, one word of a block in the low half of each 64-bit lane. Whatever is in the high halves is not read: a
// product's low word can stay where it is.
struct Counters {
  WordRegister x[chains], y[chains], z[chains], w[chains];
};

SCORESDE_HD WordRegister in_all_lanes(uint32_t v) { return WordRegister{} + static_cast<long long>(v); }
SCORESDE_HD WordRegister high_words(WordRegister v) { return SCORESDE_MM(srli_epi64)(v, 32); }

// philox() of math/philox.h. What is the same for all blocks of a stream, much of the first three rounds, the compiler
// takes out of the loop around it.
SCORESDE_HD void philox(Counters& c, uint64_t seed) {
  const WordRegister m0 = in_all_lanes(0xD2511F53u), m1 = in_all_lanes(0xCD9E8D57u);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    WordRegister a[chains], b[chains];
    for (int i = 0; i < chains; ++i) {
      a[i] = SCORESDE_MM(mul_epu32)(m1, c.z[i]);
      b[i] = SCORESDE_MM(mul_epu32)(m0, c.x[i]);
    }
    for (int i = 0; i < chains; ++i) {
      c.x[i] = high_words(a[i]) ^ (c.y[i] ^ in_all_lanes(k0));
      c.z[i] = high_words(b[i]) ^ (c.w[i] ^ in_all_lanes(k1));
      c.y[i] = a[i];
      c.w[i] = b[i];
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Words of two neighbouring registers of counters in one: those of the second go between those of the first.
SCORESDE_HD WordRegister merged(const WordRegister* v) { return odd_lanes_of(v[0], SCORESDE_MM(slli_epi64)(v[1], 32)); }

// ---- normals ----

// The normals of words x, y and, unless `first_only`, of z, w, of the blocks of two registers of counters each: that of
// words z, w follows that of x, y.
template <bool first_only>
SCORESDE_HD auto normals_of(const Counters& c) {
  constexpr int step = first_only ? 1 : 2, n = chains / 2 * step;
  Ints<n> word, turn;
  for (int i = 0; i < chains / 2; ++i) {
    word.v[step * i] = merged(c.x + 2 * i), turn.v[step * i] = merged(c.y + 2 * i);
    if (first_only) continue;
    word.v[step * i + 1] = merged(c.z + 2 * i), turn.v[step * i + 1] = merged(c.w + 2 * i);
  }
  return normals_from(word, turn);
}

// The four normals of each block, in registers by word, stored block by block. Lane 4 q + j holds block
// lanes / 4 j + q: a transposition within each quarter of a register is all it takes.
SCORESDE_HD void store_blocks(FloatRegister x, FloatRegister y, FloatRegister z, FloatRegister w, float* to) {
  const auto xy = SCORESDE_MM(unpacklo_ps)(x, y), xy_high = SCORESDE_MM(unpackhi_ps)(x, y);
  const auto zw = SCORESDE_MM(unpacklo_ps)(z, w), zw_high = SCORESDE_MM(unpackhi_ps)(z, w);
  using Doubles = decltype(SCORESDE_MM(setzero_pd)());
  const auto store = [](float* at, Doubles v) { SCORESDE_MM(storeu_ps)(at, (FloatRegister)v); };
  store(to, SCORESDE_MM(unpacklo_pd)((Doubles)xy, (Doubles)zw));
  store(to + lanes, SCORESDE_MM(unpackhi_pd)((Doubles)xy, (Doubles)zw));
  store(to + 2 * lanes, SCORESDE_MM(unpacklo_pd)((Doubles)xy_high, (Doubles)zw_high));
  store(to + 3 * lanes, SCORESDE_MM(unpackhi_pd)((Doubles)xy_high, (Doubles)zw_high));
}

// The order of blocks in the lanes of merged registers that store_blocks expects: even lanes, then odd ones.
struct Order {
  alignas(64) uint64_t block[2][lanes / 2];
  constexpr Order() : block{} {
    for (int lane = 0; lane < lanes; ++lane) block[lane % 2][lane / 2] = lanes / 4 * (lane % 4) + lane / 4;
  }
};
constexpr Order order;

// Normals of elements 4 block .. 4 block + n - 1 of a stream.
__attribute__((noinline)) inline void normals_of_stream(Stream s, uint32_t block, int64_t n, float* z) {
  constexpr int64_t group = 4 * group_blocks;
  alignas(64) float rest[group];
  for (int64_t done = 0; done < n; done += group, block += group_blocks) {
    Counters c;
    for (int i = 0; i < chains; ++i) {
      const auto offsets = *reinterpret_cast<const WordRegister*>(order.block[i % 2]);
      c.x[i] = SCORESDE_MM(add_epi64)(in_all_lanes(block + i / 2 * lanes), offsets);
      c.y[i] = in_all_lanes(s.draw);
      c.z[i] = in_all_lanes(static_cast<uint32_t>(s.id));
      c.w[i] = in_all_lanes(static_cast<uint32_t>(s.id >> 32));
    }
    philox(c, s.seed);
    const auto normals = normals_of<false>(c);
    const bool whole = done + group <= n;
    float* to = whole ? z + done : rest;
    for (int i = 0; i < chains; i += 2) {
      store_blocks(normals.a.v[i], normals.b.v[i], normals.a.v[i + 1], normals.b.v[i + 1], to + 2 * i * lanes);
    }
    if (!whole) memcpy(z + done, rest, static_cast<size_t>(n - done) * sizeof(float));
  }
}

// The counters of blocks from number i on; merged() undoes what is done to their order.
SCORESDE_HD Counters counters_of(const Blocks& b, int64_t i, uint32_t draw) {
  Counters c;
  const auto load = [i](const uint32_t* words, WordRegister* counters) {
    for (int k = 0; k < chains; k += 2) {
      counters[k] = *reinterpret_cast<const WordRegister*>(words + i + k / 2 * lanes);
      counters[k + 1] = high_words(counters[k]);
    }
  };
  load(b.block, c.x);
  load(b.id_low, c.z);
  load(b.id_high, c.w);
  for (int k = 0; k < chains; ++k) c.y[k] = in_all_lanes(draw);
  return c;
}

// The first words of any blocks.
__attribute__((noinline)) inline void first_words_of_blocks(uint64_t seed, uint32_t draw, const Blocks& b,
                                                            uint32_t (&words)[Blocks::most]) {
  static_assert(Blocks::most % group_blocks == 0);
  for (int64_t i = 0; i < b.n; i += group_blocks) {
    Counters c = counters_of(b, i, draw);
    philox(c, seed);
    for (int k = 0; k < chains; k += 2) {
      *reinterpret_cast<WordRegister*>(&words[i + k / 2 * lanes]) = merged(c.x + k);
    }
  }
}

// Normals of any blocks, one array a word of the block; with `first_only`, those of its first two words.
template <bool first_only>
__attribute__((noinline)) void normals_of_blocks(uint64_t seed, uint32_t draw, const Blocks& b,
                                                 float (&z)[4][Blocks::most]) {
  for (int64_t i = 0; i < b.n; i += group_blocks) {
    Counters c = counters_of(b, i, draw);
    philox(c, seed);
    const auto normals = normals_of<first_only>(c);
    constexpr int step = first_only ? 1 : 2;
    for (int k = 0; k < chains / 2 * step; ++k) {
      const int64_t at = i + k / step * lanes;
      *reinterpret_cast<FloatRegister*>(&z[2 * (k % step)][at]) = normals.a.v[k];
      *reinterpret_cast<FloatRegister*>(&z[2 * (k % step) + 1][at]) = normals.b.v[k];
    }
  }
}

#undef SCORESDE_EACH
#undef SCORESDE_MM

#else

inline Words words_of_block(uint64_t seed, uint32_t draw, const Blocks& b, int64_t i) {
  return philox({b.block[i], draw, b.id_low[i], b.id_high[i]}, static_cast<uint32_t>(seed),
                static_cast<uint32_t>(seed >> 32));
}

inline void first_words_of_blocks(uint64_t seed, uint32_t draw, const Blocks& b, uint32_t (&words)[Blocks::most]) {
  for (int64_t i = 0; i < b.n; ++i) words[i] = words_of_block(seed, draw, b, i).x;
}

template <bool first_only>
__attribute__((noinline)) void normals_of_blocks(uint64_t seed, uint32_t draw, const Blocks& b,
                                                 float (&z)[4][Blocks::most]) {
  for (int64_t i = 0; i < b.n; ++i) {
    const Words w = words_of_block(seed, draw, b, i);
    const Pair first = normals_from(w.x, w.y);
    z[0][i] = first.a;
    z[1][i] = first.b;
    if (first_only) continue;
    const Pair second = normals_from(w.z, w.w);
    z[2][i] = second.a;
    z[3][i] = second.b;
  }
}

#endif

}  // namespace scoresde::SCORESDE_ISA
