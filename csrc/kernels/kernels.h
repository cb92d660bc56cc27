// What csrc/torch asks of csrc/kernels: plain structs of pointers and numbers, and the functions that take them. No
// torch here.
//
// Every array is `rows` dense rows of `cols` elements (row = sample). All arrays of one call share one storage type and
// one element order.
#pragma once

#include <cstdint>

namespace scoresde {

enum class DType : int32_t { f32, f64, bf16, f16 };

constexpr int max_stages = 16;  // DOP853 has 12

// One coefficient a row, or one for all rows (stride 0). CPU kernels are given the former in the compute type, dense;
// single ones, and all of CUDA kernels, as they come: a conversion would be an operation of its own.
struct Coefficient {
  const void* data = nullptr;
  int64_t stride = 0;
  bool is_double = false;  // else float
};

constexpr int max_terms = 16, max_results = 4;

// Coefficients c[m, k, row], one matrix a row (or row stride 0: one for all), as they come: kernels round them to the
// compute type, which costs less than a pass of its own.
struct Matrices {
  const void* data;
  bool is_double;  // else float
  int64_t stride_m, stride_k, stride_row;
};

// Where the noise of a call comes from: an array, a counter-based stream, or nowhere. On the CPU also from both: the
// array then holds what the stream gives for the first rows.
struct Noise {
  const void* array = nullptr;   // explicit noise in the storage type of the call
  int64_t array_rows = 0;        // rows of the array; read where there is a key too
  const int64_t* key = nullptr;  // {seed, first draw}
  const int64_t* ids = nullptr;  // a stream id a row; null: the row's number
  int64_t draw = 0;              // added to the first draw
  // Streams count elements in logical order. CUDA kernels take rows that lie in memory as (pixels, channels) too, where
  // the logical order is (channels, pixels): channels_last. 0: memory is in logical order.
  int64_t channels = 0, pixels = 0;
};

// mean = p x + q out; next = mean + n z. `out` may be null (then q is not read), and either result. On the CPU, `z` of
// a float32 call receives the noise of the first z_rows rows, and `largest`, where it is not null, the bits of the
// largest |x| of each tile: those of Inf or more where x has Inf or NaN.
struct AffineArgs {
  DType dtype;
  int64_t rows, cols;
  const void* x;
  const void* out;
  Coefficient p, q, n;
  Noise noise;
  void* mean;
  void* next;
  float* z = nullptr;
  int64_t z_rows = 0;
  uint32_t* largest = nullptr;
};

// r = c out + d z; loss[row] = w sum r^2; grad = 2 w c r, or 2 c r where it is kept unweighted. `c.data` null: out is
// not read. No noise: d is not read. `grad` may be null.
struct ResidualArgs {
  DType dtype;
  int64_t rows, cols;
  const void* out;
  Coefficient c, d, w;
  Noise noise;
  bool weighted_grad;
  void* grad;
  double* partials;  // row-major (rows, tiles a row): sums of r^2, not yet weighted
};

// results[m] = sum_k c[m, k] arrays[k], added in the order of k
struct CombineArgs {
  DType dtype;
  int64_t rows, cols;
  int32_t n_terms, n_results;
  const void* arrays[max_terms];
  Matrices c;
  void* results[max_results];
};

// The slope k_new = f x + q out of an evaluation, where there is an `out`; without f.data it is q out. k_new may be
// null: then it is not written. And sums over the slopes k_j and, with the coefficients a_new, k_new: for m < states
// results[m] = y + h sum_j a[m][j] k_j, for the other lines the sum alone.
struct StageArgs {
  DType dtype;
  int64_t rows, cols;
  int32_t stages, lines, states;
  const void* k[max_stages];
  double a[max_results][max_stages];
  double a_new[max_results];
  Coefficient h;
  const void* y;
  void* results[max_results];
  const void* x;  // null: x = y + h sum_j at[j] k_j, which is less to read
  double at[max_stages];
  const void* out;
  Coefficient f, q;
  void* k_new;
};

// partials: sums over a tile of (h sum_j e_j k_j / (atol + rtol max(|y0|, |y1|)))^2. Where there is an `out`, one more
// slope is k_new = f y1 + q out, or q out without f.data, with the coefficient e_new. The slopes cancel: their sum is
// taken in double, or float32's rounding would steer the step size.
struct ErrorArgs {
  DType dtype;
  int64_t rows, cols;
  int32_t stages;
  const void* k[max_stages];
  double e[max_stages];
  Coefficient h;
  const void* y0;
  const void* y1;
  double rtol, atol;
  double* partials;
  const void* out;
  Coefficient f, q;
  double e_new;
  void* k_new;
};

// Rows of `values` in the place of those of `into`, where chosen[row * stride]. Others are neither read nor written.
struct PutArgs {
  DType dtype;
  int64_t rows, cols;
  const void* values;
  const bool* chosen;
  int64_t stride;
  void* into;
};

enum class Law : int32_t { normal, uniform, integer };

struct NoiseArgs {
  int64_t rows, cols;
  Noise noise;
  Law law;
  uint64_t high;              // integer: uniform on {0, ..., high - 1}
  void* values;               // float; integer: int64
  double* squares = nullptr;  // normal, on the CPU: where not null, as ResidualArgs::partials
};

// The second stage of a sum: sums[row] = w sum_i partials[row][i], in order. `w.data` null: not weighted.
struct SumArgs {
  DType dtype;  // of w and sums: f32 or f64
  int64_t rows, cols;
  const double* partials;
  Coefficient w;
  void* sums;
};

// One step decision a row: accepted[r] is 1 or 0, h_next[r] the |h| to try next.
struct ControlArgs {
  int64_t rows;
  const double* norm;
  const double* h;
  const bool* after_rejection;
  double exponent;
  double* accepted;
  double* h_next;
};

enum class Process : int32_t { vp, subvp, ve };

// t = first + span u, and m and s at t: with log m = -(p t + q) t and s^2 = 1 - m^2 (vp) or s = 1 - m^2 (subvp), or m =
// 1 and s = p exp(q t) (ve).
struct MarginalArgs {
  DType dtype;  // f32 or f64
  int64_t rows;
  const void* u;
  double first, span;
  Process process;
  double p, q;
  void* t;
  void* m;
  void* s;
};

// Work is cut into tiles of at most `tile` elements: pieces of a long row, or several whole short rows. Tiles do not
// depend on the number of threads, and sums are kept per tile and added in order, so that results do not depend on it
// either.
struct Tiling {
  static constexpr int64_t tile =
      1024;  // a multiple of 4 (one Philox block); four float arrays of it fit in half an L1 cache
  int64_t rows, cols;
  int64_t tiles_per_row, rows_per_tile;
  Tiling(int64_t rows_, int64_t cols_) : rows(rows_), cols(cols_) {
    tiles_per_row = cols > tile ? (cols + tile - 1) / tile : 1;
    const int64_t padded = (cols + 3) / 4 * 4;
    rows_per_tile = cols > tile ? 1 : (padded == 0 ? tile : tile / padded);
  }
  int64_t count() const {
    return tiles_per_row > 1 ? rows * tiles_per_row : (rows + rows_per_tile - 1) / rows_per_tile;
  }
};

// One function a kernel; each works on tiles [begin, end).
struct CpuKernels {
  const char* capability;
  void (*affine)(const AffineArgs&, int64_t begin, int64_t end);
  void (*residual)(const ResidualArgs&, int64_t begin, int64_t end);
  void (*combine)(const CombineArgs&, int64_t begin, int64_t end);
  void (*stage)(const StageArgs&, int64_t begin, int64_t end);
  void (*error)(const ErrorArgs&, int64_t begin, int64_t end);
  void (*put)(const PutArgs&, int64_t begin, int64_t end);
  void (*noise)(const NoiseArgs&, int64_t begin, int64_t end);
  void (*marginal)(const MarginalArgs&, int64_t begin, int64_t end);  // rows
};

void control_steps(const ControlArgs& args);

// The best of the compiled sets that this processor runs. SCORESDE_EXT_CPU=generic|avx2|avx512 in the environment asks
// for a lower one.
const CpuKernels& cpu_kernels();
const char* cpu_capability();

// The CUDA kernels: enqueued on `stream`, a cudaStream_t of the current device. Nothing is allocated, copied to the
// host or waited for. The arrays must not be empty. Returns an error code, 0 if all is well, and what such a code
// means.
int cuda_launch(const AffineArgs& args, void* stream);
int cuda_launch(const ResidualArgs& args, void* stream);
int cuda_launch(const CombineArgs& args, void* stream);
int cuda_launch(const StageArgs& args, void* stream);
int cuda_launch(const ErrorArgs& args, void* stream);
int cuda_launch(const PutArgs& args, void* stream);
int cuda_launch(const NoiseArgs& args, void* stream);
int cuda_launch(const SumArgs& args, void* stream);
int cuda_launch(const ControlArgs& args, void* stream);
int cuda_launch(const MarginalArgs& args, void* stream);
const char* cuda_error(int code);

// A loop on the device: an instantiated graph that runs a captured step, a cudaGraph_t of the current device, at least
// once and as long as *flag is not 0 afterwards. The step is copied; the memory it works on is not.
int cuda_loop_create(void* step, const int32_t* flag, void** loop);
int cuda_loop_launch(void* loop, void* stream);
int cuda_loop_destroy(void* loop);
// Versions of CUDA, as 12040 for 12.4, of the library these kernels were built with and of the driver, 0 without one.
// Loops need 12.4 of both.
constexpr int cuda_loop_version = 12040;
int cuda_versions(int* library, int* driver);

}  // namespace scoresde
