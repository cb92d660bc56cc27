// The CPU loops around the functors of csrc/math, compiled once for each instruction set (cpu_generic.cpp,
// cpu_avx2.cpp, cpu_avx512.cpp).
//
// A tile is a stretch of memory that fits in the L1 cache. Inside it every pass is one flat loop over arrays in the
// compute type, which the compiler vectorises; storage types are converted on the way in and out. Coefficients are
// either one number for the tile (a piece of a long row) or spread to one number an element (several short rows).

#include <type_traits>

#include "kernels/arguments.h"
#include "kernels/cpu_normals.h"
#include "math/affine.h"
#include "math/runge_kutta.h"

namespace scoresde::SCORESDE_ISA {

constexpr int64_t tile_size = Tiling::tile;

template <class A>
struct alignas(64) Scratch {
  A values[tile_size + 16];  // the last vector may stick out
};

// A tile: whole rows [row, row + rows), or columns [col, col + n) of one row; in both cases n elements from `offset`
// on.
struct Tile {
  int64_t row, rows, col, offset, n, index;
};

inline Tile tile_at(const Tiling& t, int64_t i) {
  if (t.tiles_per_row > 1) {
    const int64_t row = i / t.tiles_per_row, col = (i % t.tiles_per_row) * tile_size;
    const int64_t n = t.cols - col < tile_size ? t.cols - col : tile_size;
    return {row, 1, col, row * t.cols + col, n, i};
  }
  const int64_t row = i * t.rows_per_tile;
  const int64_t rows = t.rows - row < t.rows_per_tile ? t.rows - row : t.rows_per_tile;
  return {row, rows, 0, row * t.cols, rows * t.cols, row};
}

// Elements of a tile in the compute type: where they lie, or a converted copy.
template <class T, class A>
const A* load(const void* array, const Tile& t, Scratch<A>& scratch) {
  const T* from = static_cast<const T*>(array) + t.offset;
  if constexpr (sizeof(T) == sizeof(A)) {
    return reinterpret_cast<const A*>(from);
  } else {
    for (int64_t i = 0; i < t.n; ++i) scratch.values[i] = static_cast<A>(widen(from[i]));
    return scratch.values;
  }
}

// Where results of a tile are to be written, and the conversion afterwards.
template <class T, class A>
A* target(void* array, const Tile& t, Scratch<A>& scratch) {
  if constexpr (sizeof(T) == sizeof(A)) {
    if (array) return reinterpret_cast<A*>(static_cast<T*>(array) + t.offset);
  }
  return scratch.values;
}

template <class T, class A>
void store(void* array, const Tile& t, const A* values) {
  if constexpr (sizeof(T) != sizeof(A)) {
    T* to = static_cast<T*>(array) + t.offset;
    for (int64_t i = 0; i < t.n; ++i) to[i] = narrow<T>(values[i]);
  }
}

// A coefficient as seen by a flat loop over a tile.
template <class A>
struct Constant {
  A value;
  A operator[](int64_t) const { return value; }
};

// Each number of c repeated `cols` times, in vectors of `width` numbers: what sticks out is overwritten by the next.
// Loops over a few columns are vectorised only where their number is a constant.
template <int64_t width, class A>
void repeat(const A* c, int64_t rows, int64_t cols, A* values) {
  for (int64_t r = 0; r < rows; ++r) {
    const A v = c[r];
    for (int64_t j = 0; j < width; ++j) values[r * cols + j] = v;
  }
}

// One number a row spread to one an element.
template <class A>
const A* spread(const A* c, int64_t rows, int64_t cols, Scratch<A>& scratch) {
  switch (cols) {
    case 1:
      return c;
    case 2:
      repeat<2>(c, rows, 2, scratch.values);
      break;
    case 3:
      repeat<3>(c, rows, 3, scratch.values);
      break;
    case 4:
      repeat<4>(c, rows, 4, scratch.values);
      break;
    default:
      if (cols <= 8) {
        repeat<8>(c, rows, cols, scratch.values);
      } else if (cols <= 16) {
        repeat<16>(c, rows, cols, scratch.values);
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          const A v = c[r];
          for (int64_t j = 0; j < cols; ++j) scratch.values[r * cols + j] = v;
        }
      }
  }
  return scratch.values;
}

// Calls body(c) with the coefficient as a constant or as an array.
template <class A, class Body>
void with_coefficient(Coefficient c, const Tile& t, int64_t cols, Body body) {
  if (t.rows == 1 || c.stride == 0) {
    body(Constant<A>{at_row<A>(c, t.row)});
  } else {
    Scratch<A> scratch;
    body(spread(static_cast<const A*>(c.data) + t.row * c.stride, t.rows, cols, scratch));
  }
}

// ---- noise ----

// The normals of `rows` rows of `cols` columns from one array a word of their blocks. Loops over a few columns are
// vectorised only where their number is a constant: `few`, or 0.
template <int few>
void order_by_element(const float (&words)[4][Blocks::most], int64_t rows, int64_t cols, float* z) {
  if constexpr (few > 0) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < few; ++j) z[r * few + j] = words[j][r];
    }
    return;
  }
  const int64_t whole = cols / 4, blocks = (cols + 3) / 4;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < whole; ++k) {
      for (int64_t l = 0; l < 4; ++l) z[r * cols + 4 * k + l] = words[l][r * blocks + k];
    }
    for (int64_t j = 4 * whole; j < cols; ++j) z[r * cols + j] = words[j % 4][r * blocks + whole];
  }
}

// The blocks of a tile's rows, or of its piece of one.
inline void set_blocks(const Noise& noise, const Tile& t, int64_t blocks, Blocks& b) {
  b.n = t.rows * blocks;
  const auto number_blocks = [&](auto id_of, int64_t blocks_a_row) {
    for (int64_t r = 0; r < t.rows; ++r) {
      const uint64_t id = static_cast<uint64_t>(id_of(t.row + r));
      for (int64_t k = 0; k < blocks_a_row; ++k) {
        b.block[r * blocks_a_row + k] = static_cast<uint32_t>(t.col / 4 + k);
        b.id_low[r * blocks_a_row + k] = static_cast<uint32_t>(id);
        b.id_high[r * blocks_a_row + k] = static_cast<uint32_t>(id >> 32);
      }
    }
  };
  // One block a row, and rows that are numbered: plain vector loops.
  const auto number = [](int64_t row) { return row; };
  const auto given = [ids = noise.ids](int64_t row) { return ids[row]; };
  if (blocks == 1) {
    noise.ids ? number_blocks(given, 1) : number_blocks(number, 1);
  } else {
    noise.ids ? number_blocks(given, blocks) : number_blocks(number, blocks);
  }
}

// Standard normals of a tile, in element order.
inline void fill_normals(const Noise& noise, const Tile& t, int64_t cols, float* z) {
  const int64_t width = t.rows == 1 ? t.n : cols;
#ifdef SCORESDE_VECTOR
  constexpr int64_t group = 4 * group_blocks;
  if (t.rows == 1 || width % group == 0 || width >= 2 * group) {
    for (int64_t r = 0; r < t.rows; ++r) {
      normals_of_stream(stream_of(noise, t.row + r), static_cast<uint32_t>(t.col / 4), width, z + r * width);
    }
    return;
  }
#endif
  Blocks b;
  set_blocks(noise, t, (width + 3) / 4, b);
  alignas(64) float words[4][Blocks::most];
  const Stream s = stream_of(noise, t.row);
  if (width <= 2) {
    normals_of_blocks<true>(s.seed, s.draw, b, words);
  } else {
    normals_of_blocks<false>(s.seed, s.draw, b, words);
  }
  switch (width) {
    case 1:
      return order_by_element<1>(words, t.rows, width, z);
    case 2:
      return order_by_element<2>(words, t.rows, width, z);
    case 3:
      return order_by_element<3>(words, t.rows, width, z);
    default:
      if (width % 4 == 0) return order_by_element<4>(words, b.n, 4, z);  // block after block
      return order_by_element<0>(words, t.rows, width, z);
  }
}

// The noise of a tile in the compute type, whatever its source.
template <class T, class A>
const A* load_noise(const Noise& noise, const Tile& t, int64_t cols, Scratch<A>& scratch) {
  if (noise.array && (!noise.key || t.row + t.rows <= noise.array_rows)) return load<T, A>(noise.array, t, scratch);
  if constexpr (sizeof(A) == sizeof(float)) {
    fill_normals(noise, t, cols, scratch.values);
  } else {
    Scratch<float> single;
    fill_normals(noise, t, cols, single.values);
    for (int64_t i = 0; i < t.n; ++i) scratch.values[i] = single.values[i];
  }
  return scratch.values;
}

// ---- sums ----

template <class A>
double sum_of(const A (&lanes)[16]) {
  double sum = 0;
  for (int64_t l = 0; l < 16; ++l) sum += static_cast<double>(lanes[l]);
  return sum;
}

// Sum of squares in a fixed order: 16 interleaved sums, then a double. The same on every instruction set and with any
// thread count.
template <class A>
double sum_of_squares(const A* r, int64_t n) {
  if (n < 16) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(r[i]) * static_cast<double>(r[i]);
    return sum;
  }
  A lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int64_t l = 0; l < 16; ++l) lanes[l] += r[i + l] * r[i + l];
  }
  for (int64_t l = 0; i + l < n; ++l) lanes[l] += r[i + l] * r[i + l];
  return sum_of(lanes);
}

// The same for rows of a few elements, whose number is a constant: vector loops over rows.
template <int width, class A>
void short_row_sums(const A* r, int64_t rows, double* sums) {
  for (int64_t row = 0; row < rows; ++row) {
    double sum = 0;
    for (int i = 0; i < width; ++i) {
      const double v = static_cast<double>(r[row * width + i]);
      sum += v * v;
    }
    sums[row] = sum;
  }
}

template <class A>
void row_sums(const A* r, const Tile& t, int64_t cols, double* partials) {
  const int64_t width = t.rows == 1 ? t.n : cols;
  if (width == 1) return short_row_sums<1>(r, t.rows, partials + t.index);
  if (width == 2) return short_row_sums<2>(r, t.rows, partials + t.index);
  if (width == 3) return short_row_sums<3>(r, t.rows, partials + t.index);
  if (width == 4) return short_row_sums<4>(r, t.rows, partials + t.index);
  for (int64_t row = 0; row < t.rows; ++row) partials[t.index + row] = sum_of_squares(r + row * width, width);
}

// ---- kernels ----

inline void noise_tiles(const NoiseArgs& args, int64_t begin, int64_t end) {
  const Tiling tiling(args.rows, args.cols);
  for (int64_t i = begin; i < end; ++i) {
    const Tile t = tile_at(tiling, i);
    if (args.law == Law::normal) {
      float* z = static_cast<float*>(args.values) + t.offset;
      fill_normals(args.noise, t, args.cols, z);
      if (args.squares) row_sums(z, t, args.cols, args.squares);
      continue;
    }
    if (args.law == Law::uniform && args.cols == 1) {  // the times of a training step
      Blocks b;
      set_blocks(args.noise, t, 1, b);
      alignas(64) uint32_t words[Blocks::most];
      const Stream s = stream_of(args.noise, t.row);
      first_words_of_blocks(s.seed, s.draw, b, words);
      float* u = static_cast<float*>(args.values) + t.offset;
      for (int64_t r = 0; r < t.rows; ++r) u[r] = uniform_from(words[r]);
      continue;
    }
    const int64_t width = t.rows == 1 ? t.n : args.cols;
    for (int64_t r = 0; r < t.rows; ++r) {
      const Stream s = stream_of(args.noise, t.row + r);
      for (int64_t j = 0; j < width; ++j) {
        const int64_t element = t.col + j, at = t.offset + r * width + j;
        const Words w = random_words(s, static_cast<uint32_t>(element / 4));
        const uint32_t words[4] = {w.x, w.y, w.z, w.w};
        const uint32_t word = words[element % 4];
        if (args.law == Law::uniform) {
          static_cast<float*>(args.values)[at] = uniform_from(word);
        } else {
          static_cast<int64_t*>(args.values)[at] = integer_from(word, args.high);
        }
      }
    }
  }
}

// Reads the bits of floats as integers, of which the compiler may take the largest in any order.
inline uint32_t largest_magnitude(const float* x, int64_t n) {
  uint32_t largest = 0;
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t magnitude = bits_of(x[j]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// The noise of a tile, kept in an array for the first rows of a float32 call that asks for it.
template <class T, class A>
const A* load_kept_noise(const AffineArgs& args, const Tile& t, Scratch<A>& scratch) {
  if constexpr (std::is_same_v<T, float>) {
    if (t.row + t.rows <= args.z_rows) {
      fill_normals(args.noise, t, args.cols, args.z + t.offset);
      return args.z + t.offset;
    }
    if (t.row < args.z_rows) {
      fill_normals(args.noise, t, args.cols, scratch.values);
      memcpy(args.z + t.offset, scratch.values, static_cast<size_t>((args.z_rows - t.row) * args.cols) * sizeof(float));
      return scratch.values;
    }
  }
  return load_noise<T>(args.noise, t, args.cols, scratch);
}

template <class T>
void affine_tiles(const AffineArgs& args, int64_t begin, int64_t end) {
  using A = compute_t<T>;
  const Tiling tiling(args.rows, args.cols);
  Scratch<A> scratch_x, scratch_out, scratch_z, scratch_mean, scratch_next;
  for (int64_t i = begin; i < end; ++i) {
    const Tile t = tile_at(tiling, i);
    const A* x = load<T>(args.x, t, scratch_x);
    if constexpr (std::is_same_v<T, float>) {
      if (args.largest) args.largest[i] = largest_magnitude(x, t.n);
    }
    A* mean = target<T>(args.mean, t, scratch_mean);
    with_coefficient<A>(args.p, t, args.cols, [&](auto p) {
      if (!args.out) {
        for (int64_t j = 0; j < t.n; ++j) mean[j] = p[j] * x[j];
        return;
      }
      const A* out = load<T>(args.out, t, scratch_out);
      with_coefficient<A>(args.q, t, args.cols, [&](auto q) {
        for (int64_t j = 0; j < t.n; ++j) mean[j] = affine_mean<A>(x[j], out[j], p[j], q[j]);
      });
    });
    if (args.mean) store<T>(args.mean, t, mean);
    if (!args.next) continue;
    A* next = target<T>(args.next, t, scratch_next);
    const A* z = load_kept_noise<T>(args, t, scratch_z);
    with_coefficient<A>(args.n, t, args.cols, [&](auto n) {
      for (int64_t j = 0; j < t.n; ++j) next[j] = affine_next<A>(mean[j], z[j], n[j]);
    });
    store<T>(args.next, t, next);
  }
}

// A piece of a row in one pass: the sum of r^2, in the order of sum_of_squares, and 2 w c r. Arrays that are null do
// not count.
template <class A>
double residual_of_piece(const A* out, const A* z, A c, A d, A slope, int64_t n, A* __restrict grad) {
  A lanes[16] = {};
  const auto add = [&](int64_t j, A& lane) {
    const A r = !z ? c * out[j] : !out ? d * z[j] : residual<A>(out[j], z[j], c, d);
    lane += r * r;
    if (grad) grad[j] = residual_gradient<A>(r, slope);
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int64_t l = 0; l < 16; ++l) add(i + l, lanes[l]);
  }
  for (int64_t l = 0; i + l < n; ++l) add(i + l, lanes[l]);
  return sum_of(lanes);
}

template <class T>
void residual_tiles(const ResidualArgs& args, int64_t begin, int64_t end) {
  using A = compute_t<T>;
  const Tiling tiling(args.rows, args.cols);
  Scratch<A> scratch_out, scratch_z, scratch_r, scratch_grad;
  for (int64_t i = begin; i < end; ++i) {
    const Tile t = tile_at(tiling, i);
    const A* out = args.c.data ? load<T>(args.out, t, scratch_out) : nullptr;
    const A* z = has_noise(args.noise) ? load_noise<T>(args.noise, t, args.cols, scratch_z) : nullptr;
    A* grad = args.grad ? target<T>(args.grad, t, scratch_grad) : nullptr;
    if (t.rows == 1 && t.n >= 16) {
      const A c = out ? at_row<A>(args.c, t.row) : A{0}, d = z ? at_row<A>(args.d, t.row) : A{0};
      const A slope = grad && args.weighted_grad ? A{2} * at_row<A>(args.w, t.row) * c : A{2} * c;
      args.partials[t.index] = residual_of_piece(out, z, c, d, slope, t.n, grad);
      if (grad) store<T>(args.grad, t, grad);
      continue;
    }
    A* r = scratch_r.values;
    if (out) {
      with_coefficient<A>(args.c, t, args.cols, [&](auto c) {
        if (!z) {
          for (int64_t j = 0; j < t.n; ++j) r[j] = c[j] * out[j];
          return;
        }
        with_coefficient<A>(args.d, t, args.cols, [&](auto d) {
          for (int64_t j = 0; j < t.n; ++j) r[j] = residual<A>(out[j], z[j], c[j], d[j]);
        });
      });
    } else {
      with_coefficient<A>(args.d, t, args.cols, [&](auto d) {
        for (int64_t j = 0; j < t.n; ++j) r[j] = d[j] * z[j];
      });
    }
    row_sums(r, t, args.cols, args.partials);
    if (!grad) continue;
    with_coefficient<A>(args.c, t, args.cols, [&](auto c) {
      if (!args.weighted_grad) {
        for (int64_t j = 0; j < t.n; ++j) grad[j] = residual_gradient<A>(r[j], A{2} * c[j]);
        return;
      }
      with_coefficient<A>(args.w, t, args.cols, [&](auto w) {
        for (int64_t j = 0; j < t.n; ++j) grad[j] = residual_gradient<A>(r[j], A{2} * w[j] * c[j]);
      });
    });
    store<T>(args.grad, t, grad);
  }
}

inline void marginal_rows(const MarginalArgs& args, int64_t begin, int64_t end) {
  const auto of_type = [&](auto number) {
    using A = decltype(number);
    const A* u = static_cast<const A*>(args.u);
    A* __restrict t = static_cast<A*>(args.t), * __restrict m = static_cast<A*>(args.m);
    A* __restrict s = static_cast<A*>(args.s);
    with_process(args.process, [&, args = args](auto process) {
      for (int64_t i = begin; i < end; ++i) set_marginal<process()>(args, u[i], t[i], m[i], s[i]);
    });
  };
  args.dtype == DType::f64 ? of_type(double{}) : of_type(float{});
}

constexpr int group = 8;  // terms of a linear combination that are added in one pass over a tile

// Begins a sum, or goes on with it, by n terms.
template <int n, bool begin, class A, class C>
__attribute__((noinline)) void add_terms(const A* const* a, const C* c, int64_t size, A* __restrict sum) {
  for (int64_t j = 0; j < size; ++j) {
    A s = begin ? c[0][j] * a[0][j] : add_term<A>(sum[j], a[0][j], c[0][j]);
    for (int k = 1; k < n; ++k) s = add_term<A>(s, a[k][j], c[k][j]);
    sum[j] = s;
  }
}

// The first group has as many terms, n of at most `most`, as leave full ones after it.
template <int most = group, class A, class C>
void begin_sum(int n, const A* const* a, const C* c, int64_t size, A* sum) {
  if constexpr (most > 1) {
    if (n < most) return begin_sum<most - 1>(n, a, c, size, sum);
  }
  add_terms<most, true>(a, c, size, sum);
}

template <class A, class C>
void add_group(bool begin, int n, const A* const* a, const C* c, int64_t size, A* sum) {
  if (begin) {
    begin_sum(n, a, c, size, sum);
  } else {
    add_terms<group, false>(a, c, size, sum);
  }
}

// Coefficient (m, k) of each row of a tile: where they lie, or a converted copy.
template <class A>
const A* load_entries(const Matrices& c, int64_t m, int64_t k, const Tile& t, Scratch<A>& scratch) {
  if (c.is_double == (sizeof(A) == sizeof(double)) && c.stride_row == 1) {
    return static_cast<const A*>(c.data) + m * c.stride_m + k * c.stride_k + t.row;
  }
  for (int64_t r = 0; r < t.rows; ++r) scratch.values[r] = at_entry<A>(c, m, k, t.row + r);
  return scratch.values;
}

template <class T>
void combine_tiles(const CombineArgs& args, int64_t begin, int64_t end) {
  using A = compute_t<T>;
  const Tiling tiling(args.rows, args.cols);
  Scratch<A> scratch_a[group], scratch_c[group], scratch_entries[group], scratch_sums[max_results];
  for (int64_t i = begin; i < end; ++i) {
    const Tile t = tile_at(tiling, i);
    A* sums[max_results];
    for (int m = 0; m < args.n_results; ++m) sums[m] = target<T>(args.results[m], t, scratch_sums[m]);
    int n = (args.n_terms - 1) % group + 1;
    for (int k = 0; k < args.n_terms; k += n, n = group) {
      const A* a[group];
      for (int l = 0; l < n; ++l) a[l] = load<T>(args.arrays[k + l], t, scratch_a[l]);
      for (int m = 0; m < args.n_results; ++m) {
        if (t.rows == 1 || args.c.stride_row == 0) {
          Constant<A> c[group];
          for (int l = 0; l < n; ++l) c[l] = {at_entry<A>(args.c, m, k + l, t.row)};
          add_group(k == 0, n, a, c, t.n, sums[m]);
        } else {
          const A* c[group];
          for (int l = 0; l < n; ++l) {
            const A* entries = load_entries(args.c, m, k + l, t, scratch_entries[l]);
            c[l] = spread(entries, t.rows, args.cols, scratch_c[l]);
          }
          add_group(k == 0, n, a, c, t.n, sums[m]);
        }
      }
    }
    for (int m = 0; m < args.n_results; ++m) store<T>(args.results[m], t, sums[m]);
  }
}

// Slopes over a tile with their coefficients.
template <class A>
struct Slopes {
  int32_t n = 0;
  const A* k[max_stages + 1];
  double c[max_stages + 1];
};

// result[j] = finish(j, c_1 k_1[j] + ... + c_n k_n[j]), summed in type W; `begun`: the sum goes on from sum[j].
template <int n, bool begun, class W, class A, class Finish, class R>
__attribute__((noinline)) void sum_slopes(const A* const* k, const double* c, const W* sum, int64_t size, Finish finish,
                                          R* __restrict result) {
  W factor[n];
  for (int s = 0; s < n; ++s) factor[s] = static_cast<W>(c[s]);
  for (int64_t j = 0; j < size; ++j) {
    W total = factor[0] * static_cast<W>(k[0][j]);
    if constexpr (begun) total = sum[j] + total;
    for (int s = 1; s < n; ++s) total += factor[s] * static_cast<W>(k[s][j]);
    result[j] = finish(j, total);
  }
}

// The same for any number of slopes, in one pass up to `group` of them. A pass adds at least one.
template <class W, int most = group, class A, class Finish, class R>
void with_slopes(const Slopes<A>& slopes, int64_t size, Scratch<W>& sum, Finish finish, R* result) {
  if constexpr (most > 1) {
    if (slopes.n < most) return with_slopes<W, most - 1>(slopes, size, sum, finish, result);
  }
  if (slopes.n <= 0) {
    for (int64_t j = 0; j < size; ++j) result[j] = finish(j, W{0});
  } else if (slopes.n == most) {
    sum_slopes<most, false>(slopes.k, slopes.c, sum.values, size, finish, result);
  } else {
    const auto keep = [](int64_t, W total) { return total; };
    int32_t i = group;
    sum_slopes<group, false>(slopes.k, slopes.c, sum.values, size, keep, sum.values);
    for (; i < slopes.n - 1; ++i) {
      sum_slopes<1, true>(slopes.k + i, slopes.c + i, sum.values, size, keep, sum.values);
    }
    sum_slopes<1, true>(slopes.k + i, slopes.c + i, sum.values, size, finish, result);
  }
}

// The sums that end a step, in one pass: two states y + h sum and one sum alone, with the coefficients c[0], c[1],
// c[2].
template <int n, class A, class H>
__attribute__((noinline)) void last_sums(const A* const* k, const double (&c)[3][max_stages + 1], const A* y, H h,
                                         int64_t size, A* __restrict stage, A* __restrict state, A* __restrict error) {
  A factor[3][n];
  for (int m = 0; m < 3; ++m) {
    for (int s = 0; s < n; ++s) factor[m][s] = static_cast<A>(c[m][s]);
  }
  for (int64_t j = 0; j < size; ++j) {
    A sums[3] = {factor[0][0] * k[0][j], factor[1][0] * k[0][j], factor[2][0] * k[0][j]};
    for (int s = 1; s < n; ++s) {
      const A slope = k[s][j];
      for (int m = 0; m < 3; ++m) sums[m] += factor[m][s] * slope;
    }
    stage[j] = affine_next<A>(y[j], sums[0], h[j]);
    state[j] = affine_next<A>(y[j], sums[1], h[j]);
    error[j] = sums[2];
  }
}

template <int most = group, class... Arguments>
void with_last_sums(int32_t n, Arguments&&... arguments) {
  if constexpr (most > 1) {
    if (n < most) return with_last_sums<most - 1>(n, arguments...);
  }
  last_sums<most>(arguments...);
}

// The slope f x + q out over a tile, or q out without x.
template <class A>
void drift_tile(const A* x, const A* out, Coefficient f, Coefficient q, const Tile& t, int64_t cols, A* slope) {
  with_coefficient<A>(q, t, cols, [&](auto q) {
    if (!x) {
      for (int64_t j = 0; j < t.n; ++j) slope[j] = q[j] * out[j];
      return;
    }
    with_coefficient<A>(f, t, cols, [&](auto f) {
      for (int64_t j = 0; j < t.n; ++j) slope[j] = affine_mean<A>(x[j], out[j], f[j], q[j]);
    });
  });
}

template <class T>
void stage_tiles(const StageArgs& args, int64_t begin, int64_t end) {
  using A = compute_t<T>;
  const Tiling tiling(args.rows, args.cols);
  Scratch<A> sum, scratch_x, scratch_out, scratch_new, scratch_y, scratch_result[3], scratch_k[max_stages];
  for (int64_t i = begin; i < end; ++i) {
    const Tile t = tile_at(tiling, i);
    const A* y = load<T>(args.y, t, scratch_y);
    Slopes<A> slopes;
    for (; slopes.n < args.stages; ++slopes.n) slopes.k[slopes.n] = load<T>(args.k[slopes.n], t, scratch_k[slopes.n]);
    const auto next = [&](const double* c, A* result) {
      std::memcpy(slopes.c, c, sizeof(double) * args.stages);
      with_coefficient<A>(args.h, t, args.cols, [&](auto h) {
        const auto step = [y, h](int64_t j, A total) { return affine_next<A>(y[j], total, h[j]); };
        with_slopes<A>(slopes, t.n, sum, step, result);
      });
    };
    A* k_new = nullptr;
    if (args.out) {
      const A* x = args.f.data && args.x ? load<T>(args.x, t, scratch_x) : nullptr;
      if (args.f.data && !args.x) {
        next(args.at, scratch_x.values);
        x = scratch_x.values;
      }
      k_new = target<T>(args.k_new, t, scratch_new);
      drift_tile(x, load<T>(args.out, t, scratch_out), args.f, args.q, t, args.cols, k_new);
      if (args.k_new) store<T>(args.k_new, t, k_new);
      slopes.k[slopes.n++] = k_new;
    }
    if (args.lines == 3 && args.states == 2 && slopes.n >= 1 && slopes.n <= group) {
      A* results[3];
      double c[3][max_stages + 1];
      for (int m = 0; m < 3; ++m) {
        results[m] = target<T>(args.results[m], t, scratch_result[m]);
        std::memcpy(c[m], args.a[m], sizeof(double) * args.stages);
        c[m][args.stages] = args.a_new[m];
      }
      with_coefficient<A>(args.h, t, args.cols, [&](auto h) {
        with_last_sums(slopes.n, slopes.k, c, y, h, t.n, results[0], results[1], results[2]);
      });
      for (int m = 0; m < 3; ++m) store<T>(args.results[m], t, results[m]);
      continue;
    }
    for (int32_t m = 0; m < args.lines; ++m) {
      A* result = target<T>(args.results[m], t, scratch_result[0]);
      slopes.c[args.stages] = args.a_new[m];
      if (m < args.states) {
        next(args.a[m], result);
      } else {
        std::memcpy(slopes.c, args.a[m], sizeof(double) * args.stages);
        with_slopes<A>(slopes, t.n, sum, [](int64_t, A total) { return total; }, result);
      }
      store<T>(args.results[m], t, result);
    }
  }
}

template <class T>
void error_tiles(const ErrorArgs& args, int64_t begin, int64_t end) {
  using A = compute_t<T>;
  const Tiling tiling(args.rows, args.cols);
  const A rtol = static_cast<A>(args.rtol), atol = static_cast<A>(args.atol);
  Scratch<double> sum;
  Scratch<A> scaled, scratch0, scratch1, scratch_out, scratch_new, scratch_k[max_stages];
  for (int64_t i = begin; i < end; ++i) {
    const Tile t = tile_at(tiling, i);
    const A* y0 = load<T>(args.y0, t, scratch0);
    const A* y1 = load<T>(args.y1, t, scratch1);
    Slopes<A> slopes;
    for (; slopes.n < args.stages; ++slopes.n) {
      slopes.k[slopes.n] = load<T>(args.k[slopes.n], t, scratch_k[slopes.n]);
      slopes.c[slopes.n] = args.e[slopes.n];
    }
    if (args.out) {
      A* k_new = target<T>(args.k_new, t, scratch_new);
      const A* out = load<T>(args.out, t, scratch_out);
      drift_tile(args.f.data ? y1 : nullptr, out, args.f, args.q, t, args.cols, k_new);
      store<T>(args.k_new, t, k_new);
      slopes.k[slopes.n] = k_new, slopes.c[slopes.n++] = args.e_new;
    }
    // Two loops: one that holds doubles beside floats works on half as many numbers at a time.
    with_slopes<double>(slopes, t.n, sum, [](int64_t, double total) { return static_cast<A>(total); }, scaled.values);
    with_coefficient<A>(args.h, t, args.cols, [&](auto h) {
      for (int64_t j = 0; j < t.n; ++j) {
        scaled.values[j] = scaled_error<A>(h[j] * scaled.values[j], y0[j], y1[j], rtol, atol);
      }
    });
    row_sums(scaled.values, t, args.cols, args.partials);
  }
}

template <class T>
void put_tiles(const PutArgs& args, int64_t begin, int64_t end) {
  const Tiling tiling(args.rows, args.cols);
  for (int64_t i = begin; i < end; ++i) {
    const Tile t = tile_at(tiling, i);
    const int64_t n = t.n / t.rows;
    for (int64_t r = 0; r < t.rows; ++r) {
      const int64_t offset = t.offset + r * n;
      if (!args.chosen[(t.row + r) * args.stride]) continue;
      memcpy(static_cast<T*>(args.into) + offset, static_cast<const T*>(args.values) + offset, n * sizeof(T));
    }
  }
}

// ---- dispatch over the storage type ----

#define SCORESDE_BY_DTYPE(function)                  \
  [](const auto& args, int64_t begin, int64_t end) { \
    switch (args.dtype) {                            \
      case DType::f32:                               \
        return function<float>(args, begin, end);    \
      case DType::f64:                               \
        return function<double>(args, begin, end);   \
      case DType::bf16:                              \
        return function<bf16>(args, begin, end);     \
      case DType::f16:                               \
        return function<f16>(args, begin, end);      \
    }                                                \
  }

inline const CpuKernels& kernels(const char* capability) {
  static const CpuKernels table{capability,
                                SCORESDE_BY_DTYPE(affine_tiles),
                                SCORESDE_BY_DTYPE(residual_tiles),
                                SCORESDE_BY_DTYPE(combine_tiles),
                                SCORESDE_BY_DTYPE(stage_tiles),
                                SCORESDE_BY_DTYPE(error_tiles),
                                SCORESDE_BY_DTYPE(put_tiles),
                                noise_tiles,
                                marginal_rows};
  return table;
}

#undef SCORESDE_BY_DTYPE

}  // namespace scoresde::SCORESDE_ISA
