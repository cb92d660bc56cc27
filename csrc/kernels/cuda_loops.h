// What the CUDA kernels share: the loop over the arrays, reading and writing them, noise, sums.
//
// A thread works on a chunk at a time: neighbouring elements of one row, as many as make whole 16-byte words and whole
// Philox blocks. A block is two-dimensional: x runs along the chunks of a row, y over rows, so that no index is
// divided. Every loop is right for every grid. `vector`: all arrays are aligned to 16 bytes and rows are whole chunks;
// otherwise elements are read and written one at a time, and a chunk is one Philox block.
#pragma once

#include <cuda_runtime.h>

#include "kernels/arguments.h"
#include "math/affine.h"
#include "math/runge_kutta.h"

namespace scoresde::SCORESDE_ISA {

constexpr int block_threads = 256;

template <class T, bool vector>
constexpr int chunk_size = vector && sizeof(T) == 2 ? 8 : 4;
template <class T>
constexpr int words_in = chunk_size<T, true> * sizeof(T) / sizeof(uint4);  // 16-byte words of a chunk

// Elements [col, col + n) of a row, which lie from `offset` on. Only the last chunk of a row may be shorter than a
// chunk.
struct Chunk {
  int64_t row, col, offset;
  int n;
};

template <class T, bool vector>
__device__ __forceinline__ Chunk chunk_at(int64_t row, int64_t col, int64_t cols) {
  constexpr int whole = chunk_size<T, vector>;
  const int n = !vector && cols - col < whole ? static_cast<int>(cols - col) : whole;
  // Hides from the compiler that a row is the same for all its chunks. It would compute the addresses of all arrays and
  // coefficients before the loop over the chunks, and keep them in two registers each.
  asm("" : "+l"(row), "+l"(col));
  return {row, col, row * cols + col, n};
}

// Calls body(chunk) for every chunk of the arrays.
template <class T, bool vector, class Body>
__device__ __forceinline__ void for_each_chunk(int64_t rows, int64_t cols, Body body) {
  constexpr int size = chunk_size<T, vector>;
  const int64_t first_col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * size;
  const int64_t row_step = int64_t{gridDim.y} * blockDim.y, col_step = int64_t{gridDim.x} * blockDim.x * size;
  for (int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; row < rows; row += row_step) {
#pragma unroll 1  // rows seldom have more chunks than the grid has threads for them
    for (int64_t col = first_col; col < cols; col += col_step) body(chunk_at<T, vector>(row, col, cols));
  }
}

// ---- arrays ----

// The elements of a chunk in the compute type; those beyond the end of the row are zero.
template <class T, bool vector>
struct Values {
  static constexpr int size = chunk_size<T, vector>;
  compute_t<T> v[size];
  __device__ __forceinline__ compute_t<T>& operator[](int i) { return v[i]; }
  __device__ __forceinline__ compute_t<T> operator[](int i) const { return v[i]; }
};

// The compiler finds out that an array is in global memory, but not where it has made copies of a loop, with and
// without arrays that may be absent.
__device__ __forceinline__ void known_as_global([[maybe_unused]] const void* array) {
#ifdef __CUDACC__
  __builtin_assume(__isGlobal(array));
#endif
}

template <class T, bool vector>
__device__ __forceinline__ void load_raw(const void* array, const Chunk& c, T (&stored)[chunk_size<T, vector>]) {
  const T* from = static_cast<const T*>(array) + c.offset;
  if constexpr (vector) {
    uint4 words[words_in<T>];
    for (int i = 0; i < words_in<T>; ++i) words[i] = reinterpret_cast<const uint4*>(from)[i];
    memcpy(stored, words, sizeof(stored));
  } else {
    known_as_global(from);
    for (int i = 0; i < chunk_size<T, vector>; ++i) {
      stored[i] = T{};
      if (i < c.n) stored[i] = from[i];
    }
  }
}

template <class T, bool vector>
__device__ __forceinline__ Values<T, vector> load(const void* array, const Chunk& c) {
  Values<T, vector> values;
  T stored[values.size];
  load_raw<T, vector>(array, c, stored);
  for (int i = 0; i < values.size; ++i) values[i] = widen(stored[i]);
  return values;
}

template <class T, bool vector>
__device__ __forceinline__ void store_raw(void* array, const Chunk& c, const T (&stored)[chunk_size<T, vector>]) {
  T* to = static_cast<T*>(array) + c.offset;
  if constexpr (vector) {
    uint4 words[words_in<T>];
    memcpy(words, stored, sizeof(stored));
    // A plain assignment may be taken apart into narrower stores.
    for (int i = 0; i < words_in<T>; ++i) __stwb(reinterpret_cast<uint4*>(to) + i, words[i]);
  } else {
    known_as_global(to);
    for (int i = 0; i < chunk_size<T, vector>; ++i) {
      if (i < c.n) to[i] = stored[i];
    }
  }
}

template <class T, bool vector>
__device__ __forceinline__ void store(void* array, const Chunk& c, const Values<T, vector>& values) {
  T stored[values.size];
  for (int i = 0; i < values.size; ++i) stored[i] = narrow<T>(values[i]);
  store_raw<T, vector>(array, c, stored);
}

// ---- noise ----

// The random words of a chunk's elements.
template <int n>
__device__ __forceinline__ void random_words_of(const Noise& noise, const Chunk& c, Words (&words)[n]) {
  const Stream stream = stream_of(noise, c.row);
  for (int b = 0; b < n; ++b) words[b] = random_words(stream, static_cast<uint32_t>(c.col / 4) + b);
}

// Standard normals of neighbours in channels_last memory: each is of another block. That is four times the arithmetic,
// and less than the passes over memory that another order of the arrays would take.
template <class T, bool vector>
__device__ __forceinline__ Values<T, vector> channels_last_noise(const Noise& noise, const Chunk& c) {
  const Stream stream = stream_of(noise, c.row);
  int64_t pixel = c.col / noise.channels, channel = c.col % noise.channels;
  Values<T, vector> z;
#pragma unroll  // or z, whose index is not a constant then, lies in local memory
  for (int i = 0; i < z.size; ++i) {
    const int64_t element = channel * noise.pixels + pixel;
    z[i] = normal_of(random_words(stream, static_cast<uint32_t>(element / 4)), static_cast<uint32_t>(element % 4));
    if (++channel == noise.channels) channel = 0, ++pixel;
  }
  return z;
}

// Standard normals, whatever their source. `channels_last`: a stream whose elements lie in that order; kernels of their
// own have it, for it takes twice the registers.
template <class T, bool vector, bool channels_last = false>
__device__ __forceinline__ Values<T, vector> load_noise(const Noise& noise, const Chunk& c) {
  if constexpr (channels_last) return channels_last_noise<T, vector>(noise, c);
  if (noise.array) return load<T, vector>(noise.array, c);
  Values<T, vector> z;
  Words words[z.size / 4];
  random_words_of(noise, c, words);
  for (int b = 0; b < z.size / 4; ++b) {
    const Pair first = normals_from(words[b].x, words[b].y), second = normals_from(words[b].z, words[b].w);
    z[4 * b] = first.a;
    z[4 * b + 1] = first.b;
    z[4 * b + 2] = second.a;
    z[4 * b + 3] = second.b;
  }
  return z;
}

// ---- sums ----

// The sum over the threads of a row of the block (those of one threadIdx.y), added in a fixed order; thread x = 0 gets
// it. To be called by all threads of the block.
__device__ __forceinline__ double sum_over_row_of_block(double v) {
  constexpr unsigned all_lanes = 0xffffffffu;
  constexpr int warp_size = 32;
  __shared__ double of_warp[block_threads / warp_size];
  const int width = blockDim.x < warp_size ? blockDim.x : warp_size;
  for (int offset = width / 2; offset > 0; offset /= 2) v += __shfl_down_sync(all_lanes, v, offset, width);
  if (blockDim.x <= warp_size) return v;

  const int warp = (threadIdx.y * blockDim.x + threadIdx.x) / warp_size;
  if (threadIdx.x % warp_size == 0) of_warp[warp] = v;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < static_cast<int>(blockDim.x) / warp_size; ++i) v += of_warp[warp + i];
  }
  __syncthreads();  // the next call writes where this one reads
  return v;
}

// Sums body(chunk) over each tile of each row: one number a thread, added in double. A block is as wide as a tile, or
// as the whole row where that is shorter.
template <class T, bool vector, class Body>
__device__ __forceinline__ void sum_tiles(int64_t rows, int64_t cols, double* partials, Body body) {
  const int64_t tiles = (cols + Tiling::tile - 1) / Tiling::tile;
  for (int64_t first = int64_t{blockIdx.y} * blockDim.y; first < rows; first += int64_t{gridDim.y} * blockDim.y) {
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const int64_t row = first + threadIdx.y, col = tile * Tiling::tile + int64_t{threadIdx.x} * chunk_size<T, vector>;
      const bool inside = row < rows && col < cols;
      const double sum = sum_over_row_of_block(inside ? body(chunk_at<T, vector>(row, col, cols)) : 0.0);
      if (threadIdx.x == 0 && row < rows) partials[row * tiles + tile] = sum;
    }
  }
}

// The sum of squares of a chunk.
template <class T, bool vector>
__device__ __forceinline__ double sum_of_squares(const Values<T, vector>& r, const Chunk& c) {
  compute_t<T> sum = 0;
  for (int i = 0; i < r.size; ++i) {
    if (i < c.n) sum += r[i] * r[i];
  }
  return sum;
}

}  // namespace scoresde::SCORESDE_ISA
