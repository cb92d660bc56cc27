// The CUDA kernels: the functors of csrc/math in the loops of cuda_loops.h, and how they are launched.
#define SCORESDE_ISA device
#include <initializer_list>
#include <type_traits>

#include "kernels/cuda_loops.h"

namespace scoresde {
namespace device {
namespace {

#define SCORESDE_KERNEL __global__ void __launch_bounds__(block_threads)

template <class T, bool vector, bool channels_last>
SCORESDE_KERNEL affine_kernel(const __grid_constant__ AffineArgs args) {
  using A = compute_t<T>;
  for_each_chunk<T, vector>(args.rows, args.cols, [&](const Chunk& c) {
    Values<T, vector> mean = load<T, vector>(args.x, c);
    const A p = at_row<A>(args.p, c.row);
    if (args.out) {
      const Values<T, vector> out = load<T, vector>(args.out, c);
      const A q = at_row<A>(args.q, c.row);
      for (int i = 0; i < mean.size; ++i) mean[i] = affine_mean(mean[i], out[i], p, q);
    } else {
      for (int i = 0; i < mean.size; ++i) mean[i] = p * mean[i];
    }
    Values<T, vector> next;
    if (args.next) {
      const Values<T, vector> z = load_noise<T, vector, channels_last>(args.noise, c);
      const A n = at_row<A>(args.n, c.row);
      for (int i = 0; i < next.size; ++i) next[i] = affine_next(mean[i], z[i], n);
    }
    // All reads come before the writes, which would hold them up.
    if (args.mean) store(args.mean, c, mean);
    if (args.next) store(args.next, c, next);
  });
}

template <class T, bool vector, bool channels_last>
SCORESDE_KERNEL residual_kernel(const __grid_constant__ ResidualArgs args) {
  using A = compute_t<T>;
  sum_tiles<T, vector>(args.rows, args.cols, args.partials, [&](const Chunk& chunk) {
    Values<T, vector> r;
    const A c = args.c.data ? at_row<A>(args.c, chunk.row) : A{0};
    if (args.c.data) {
      r = load<T, vector>(args.out, chunk);
      if (has_noise(args.noise)) {
        const Values<T, vector> z = load_noise<T, vector, channels_last>(args.noise, chunk);
        const A d = at_row<A>(args.d, chunk.row);
        for (int i = 0; i < r.size; ++i) r[i] = residual(r[i], z[i], c, d);
      } else {
        for (int i = 0; i < r.size; ++i) r[i] = c * r[i];
      }
    } else {
      r = load_noise<T, vector, channels_last>(args.noise, chunk);
      const A d = at_row<A>(args.d, chunk.row);
      for (int i = 0; i < r.size; ++i) r[i] = d * r[i];
    }
    const double sum = sum_of_squares(r, chunk);
    if (args.grad) {
      const A slope = args.weighted_grad ? A{2} * at_row<A>(args.w, chunk.row) * c : A{2} * c;
      for (int i = 0; i < r.size; ++i) r[i] = residual_gradient(r[i], slope);
      store(args.grad, chunk, r);
    }
    return sum;
  });
}

template <class T, bool vector, int n_results>
SCORESDE_KERNEL combine_kernel(const __grid_constant__ CombineArgs args) {
  using A = compute_t<T>;
  for_each_chunk<T, vector>(args.rows, args.cols, [&](const Chunk& chunk) {
    Values<T, vector> sums[n_results];
    const Values<T, vector> first = load<T, vector>(args.arrays[0], chunk);
    for (int m = 0; m < n_results; ++m) {
      const A c = at_entry<A>(args.c, m, 0, chunk.row);
      for (int i = 0; i < sums[m].size; ++i) sums[m][i] = c * first[i];
    }
    // Two arrays at a time: enough reads under way. But where the sums leave no registers for that, or reading an array
    // is several reads anyway.
#pragma unroll(vector&& words_in<T> == 1 && sizeof(sums) <= 64 ? 2 : 1)
    for (int32_t k = 1; k < args.n_terms; ++k) {
      const Values<T, vector> a = load<T, vector>(args.arrays[k], chunk);
      for (int m = 0; m < n_results; ++m) {
        const A c = at_entry<A>(args.c, m, k, chunk.row);
        for (int i = 0; i < sums[m].size; ++i) sums[m][i] = add_term(sums[m][i], a[i], c);
      }
    }
    for (int m = 0; m < n_results; ++m) store(args.results[m], chunk, sums[m]);
  });
}

// The slope f x + q out of a chunk, or q out without f.
template <class T, bool vector>
__device__ __forceinline__ Values<T, vector> drift_of(const Values<T, vector>& x, const void* out, Coefficient f,
                                                      Coefficient q, const Chunk& c) {
  using A = compute_t<T>;
  Values<T, vector> slope = load<T, vector>(out, c);
  const A factor = at_row<A>(q, c.row);
  if (f.data) {
    const A of_x = at_row<A>(f, c.row);
    for (int i = 0; i < slope.size; ++i) slope[i] = affine_mean(x[i], slope[i], of_x, factor);
  } else {
    for (int i = 0; i < slope.size; ++i) slope[i] = factor * slope[i];
  }
  return slope;
}

template <class T, bool vector, int lines>
SCORESDE_KERNEL stage_kernel(const __grid_constant__ StageArgs args) {
  using A = compute_t<T>;
  for_each_chunk<T, vector>(args.rows, args.cols, [&](const Chunk& c) {
    Values<T, vector> sums[lines] = {}, x = {};
    const bool with_x = args.out && args.f.data;
#pragma unroll 2  // as above, and all sums leave registers for it
    for (int32_t s = 0; s < args.stages; ++s) {
      const Values<T, vector> slope = load<T, vector>(args.k[s], c);
      for (int m = 0; m < lines; ++m) {
        const A weight = static_cast<A>(args.a[m][s]);
        for (int i = 0; i < sums[m].size; ++i) sums[m][i] += weight * slope[i];
      }
      if (with_x && !args.x) {
        const A weight = static_cast<A>(args.at[s]);
        for (int i = 0; i < x.size; ++i) x[i] += weight * slope[i];
      }
    }
    const Values<T, vector> y = load<T, vector>(args.y, c);
    const A h = at_row<A>(args.h, c.row);
    if (args.out) {
      if (with_x && args.x) {
        x = load<T, vector>(args.x, c);
      } else {
        for (int i = 0; i < x.size; ++i) x[i] = affine_next(y[i], x[i], h);
      }
      const Values<T, vector> slope = drift_of<T, vector>(x, args.out, args.f, args.q, c);
      for (int m = 0; m < lines; ++m) {
        const A weight = static_cast<A>(args.a_new[m]);
        for (int i = 0; i < sums[m].size; ++i) sums[m][i] += weight * slope[i];
      }
      if (args.k_new) store(args.k_new, c, slope);
    }
    for (int m = 0; m < lines; ++m) {
      if (m < args.states) {
        for (int i = 0; i < sums[m].size; ++i) sums[m][i] = affine_next(y[i], sums[m][i], h);
      }
      store(args.results[m], c, sums[m]);
    }
  });
}

template <class T, bool vector>
SCORESDE_KERNEL error_kernel(const __grid_constant__ ErrorArgs args) {
  using A = compute_t<T>;
  sum_tiles<T, vector>(args.rows, args.cols, args.partials, [&](const Chunk& c) {
    double sum[chunk_size<T, vector>] = {};
    for (int32_t s = 0; s < args.stages; ++s) {
      const Values<T, vector> slope = load<T, vector>(args.k[s], c);
      for (int i = 0; i < slope.size; ++i) sum[i] += args.e[s] * slope[i];
    }
    Values<T, vector> error;
    const Values<T, vector> y0 = load<T, vector>(args.y0, c), y1 = load<T, vector>(args.y1, c);
    if (args.out) {
      const Values<T, vector> slope = drift_of<T, vector>(y1, args.out, args.f, args.q, c);
      for (int i = 0; i < slope.size; ++i) sum[i] += args.e_new * slope[i];
      store(args.k_new, c, slope);
    }
    const A h = at_row<A>(args.h, c.row), rtol = static_cast<A>(args.rtol), atol = static_cast<A>(args.atol);
    for (int i = 0; i < error.size; ++i) {
      error[i] = scaled_error(h * static_cast<A>(sum[i]), y0[i], y1[i], rtol, atol);
    }
    return sum_of_squares(error, c);
  });
}

template <class T, bool vector>
SCORESDE_KERNEL put_kernel(const __grid_constant__ PutArgs args) {
  for_each_chunk<T, vector>(args.rows, args.cols, [&](const Chunk& c) {
    if (!args.chosen[c.row * args.stride]) return;
    T values[chunk_size<T, vector>];
    load_raw<T, vector>(args.values, c, values);
    store_raw<T, vector>(args.into, c, values);
  });
}

template <Law law, bool vector>
SCORESDE_KERNEL noise_kernel(const __grid_constant__ NoiseArgs args) {
  for_each_chunk<float, vector>(args.rows, args.cols, [&](const Chunk& c) {
    if constexpr (law == Law::normal) {
      store(args.values, c, load_noise<float, vector>(args.noise, c));
      return;
    }
    Words words[1];
    random_words_of(args.noise, c, words);
    const auto [x, y, z, w] = words[0];
    if constexpr (law == Law::uniform) {
      const float values[4] = {uniform_from(x), uniform_from(y), uniform_from(z), uniform_from(w)};
      store_raw<float, vector>(args.values, c, values);
    } else {
      const int64_t values[4] = {integer_from(x, args.high), integer_from(y, args.high), integer_from(z, args.high),
                                 integer_from(w, args.high)};
      store_raw<int64_t, vector>(args.values, c, values);
    }
  });
}

// Rows from tiles: the second stage of every sum.
template <class A>
SCORESDE_KERNEL sum_kernel(const __grid_constant__ SumArgs args) {
  for (int64_t first = int64_t{blockIdx.y} * blockDim.y; first < args.rows; first += int64_t{gridDim.y} * blockDim.y) {
    const int64_t row = first + threadIdx.y;
    double sum = 0;
    if (row < args.rows) {
      for (int64_t i = threadIdx.x; i < args.cols; i += blockDim.x) sum += args.partials[row * args.cols + i];
    }
    sum = sum_over_row_of_block(sum);
    if (threadIdx.x == 0 && row < args.rows) {
      static_cast<A*>(args.sums)[row] = static_cast<A>(args.w.data ? at_row<A>(args.w, row) * sum : sum);
    }
  }
}

SCORESDE_KERNEL control_kernel(const __grid_constant__ ControlArgs args) {
  const int64_t step = int64_t{gridDim.y} * blockDim.y;
  for (int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; row < args.rows; row += step) {
    const StepDecision decision = control_step(args.norm[row], args.h[row], args.after_rejection[row], args.exponent);
    args.accepted[row] = decision.accept ? 1.0 : 0.0;
    args.h_next[row] = decision.h;
  }
}

template <Process process, class A>
SCORESDE_KERNEL marginal_kernel(const __grid_constant__ MarginalArgs args) {
  const int64_t step = int64_t{gridDim.y} * blockDim.y;
  for (int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; row < args.rows; row += step) {
    set_marginal<process>(args, static_cast<const A*>(args.u)[row], static_cast<A*>(args.t)[row],
                          static_cast<A*>(args.m)[row], static_cast<A*>(args.s)[row]);
  }
}

#undef SCORESDE_KERNEL

// ---- launching ----

// Launches over `rows` rows of `width` threads. Rows of more than `most` threads are cut into several blocks.
template <class Args>
int launch(void (*kernel)(Args), int64_t rows, int64_t width, int64_t most, Args args, void* stream) {
  constexpr int64_t largest_grid_x = 0x7fffffff, largest_grid_y = 65535;
  int64_t x = 1;
  while (x < width && x < most) x *= 2;
  const int64_t y = block_threads / x;
  const auto blocks = [](int64_t n, int64_t a_block, int64_t largest) {
    const int64_t needed = (n + a_block - 1) / a_block;
    return static_cast<unsigned>(needed < largest ? needed : largest);
  };
  const dim3 grid(blocks(width, x, largest_grid_x), blocks(rows, y, largest_grid_y));
  const dim3 block(static_cast<unsigned>(x), static_cast<unsigned>(y));
  void* parameters[] = {&args};
  return cudaLaunchKernel(kernel, grid, block, parameters, 0, static_cast<cudaStream_t>(stream));
}

// Addresses of arrays joined into one number, a multiple of 16 if all are. An array that is absent is null.
template <class... Array>
uintptr_t join(Array... arrays) {
  return (reinterpret_cast<uintptr_t>(arrays) | ...);
}
template <class Array>
uintptr_t join(Array* const* arrays, int32_t n) {
  uintptr_t joined = 0;
  for (int32_t i = 0; i < n; ++i) joined |= reinterpret_cast<uintptr_t>(arrays[i]);
  return joined;
}

// Launches over chunks of elements of type T: the vector kernel where the arrays allow it. Long rows are cut where the
// CPU cuts them.
template <class T, class Args>
int launch_chunks(void (*vector)(Args), void (*scalar)(Args), uintptr_t addresses, const Args& args, void* stream) {
  const bool aligned = args.cols % chunk_size<T, true> == 0 && addresses % 16 == 0;
  const int64_t size = aligned ? chunk_size<T, true> : chunk_size<T, false>;
  return launch(aligned ? vector : scalar, args.rows, (args.cols + size - 1) / size, Tiling::tile / size, args, stream);
}

// Calls f with a number of the storage type.
template <class F>
int with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::f64:
      return f(double{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
  }
  return cudaErrorInvalidValue;
}

// Calls f with the number of results as a constant.
template <class F>
int with_results(int32_t n, F f) {
  switch (n) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace device

using namespace device;

int cuda_launch(const AffineArgs& args, void* stream) {
  const uintptr_t arrays = join(args.x, args.out, args.noise.array, args.mean, args.next);
  return with_type(args.dtype, [&](auto number) {
    using T = decltype(number);
    return args.noise.channels
               ? launch_chunks<T>(affine_kernel<T, true, true>, affine_kernel<T, false, true>, arrays, args, stream)
               : launch_chunks<T>(affine_kernel<T, true, false>, affine_kernel<T, false, false>, arrays, args, stream);
  });
}

int cuda_launch(const ResidualArgs& args, void* stream) {
  const uintptr_t arrays = join(args.out, args.noise.array, args.grad);
  return with_type(args.dtype, [&](auto number) {
    using T = decltype(number);
    return args.noise.channels
               ? launch_chunks<T>(residual_kernel<T, true, true>, residual_kernel<T, false, true>, arrays, args, stream)
               : launch_chunks<T>(residual_kernel<T, true, false>, residual_kernel<T, false, false>, arrays, args,
                                  stream);
  });
}

int cuda_launch(const CombineArgs& args, void* stream) {
  const uintptr_t arrays = join(args.arrays, args.n_terms) | join(args.results, args.n_results);
  return with_type(args.dtype, [&](auto number) {
    using T = decltype(number);
    return with_results(args.n_results, [&](auto n) {
      return launch_chunks<T>(combine_kernel<T, true, n>, combine_kernel<T, false, n>, arrays, args, stream);
    });
  });
}

int cuda_launch(const StageArgs& args, void* stream) {
  const uintptr_t arrays =
      join(args.y, args.x, args.out, args.k_new) | join(args.k, args.stages) | join(args.results, args.lines);
  return with_type(args.dtype, [&](auto number) {
    using T = decltype(number);
    return with_results(args.lines, [&](auto n) {
      return launch_chunks<T>(stage_kernel<T, true, n>, stage_kernel<T, false, n>, arrays, args, stream);
    });
  });
}

int cuda_launch(const ErrorArgs& args, void* stream) {
  const uintptr_t arrays = join(args.y0, args.y1, args.out, args.k_new) | join(args.k, args.stages);
  return with_type(args.dtype, [&](auto number) {
    using T = decltype(number);
    return launch_chunks<T>(error_kernel<T, true>, error_kernel<T, false>, arrays, args, stream);
  });
}

int cuda_launch(const PutArgs& args, void* stream) {
  return with_type(args.dtype, [&](auto number) {
    using T = decltype(number);
    return launch_chunks<T>(put_kernel<T, true>, put_kernel<T, false>, join(args.values, args.into), args, stream);
  });
}

int cuda_launch(const NoiseArgs& args, void* stream) {
  const auto launch_law = [&](auto* vector, auto* scalar) {
    return launch_chunks<float>(vector, scalar, join(args.values), args, stream);
  };
  switch (args.law) {
    case Law::normal:
      return launch_law(noise_kernel<Law::normal, true>, noise_kernel<Law::normal, false>);
    case Law::uniform:
      return launch_law(noise_kernel<Law::uniform, true>, noise_kernel<Law::uniform, false>);
    case Law::integer:
      return launch_law(noise_kernel<Law::integer, true>, noise_kernel<Law::integer, false>);
  }
  return cudaErrorInvalidValue;
}

int cuda_launch(const SumArgs& args, void* stream) {
  auto* kernel = args.dtype == DType::f64 ? sum_kernel<double> : sum_kernel<float>;
  // A row is the work of one block, however many tiles it has.
  const int64_t width = args.cols < 1 ? 1 : args.cols < block_threads ? args.cols : block_threads;
  return launch(kernel, args.rows, width, block_threads, args, stream);
}

int cuda_launch(const ControlArgs& args, void* stream) { return launch(control_kernel, args.rows, 1, 1, args, stream); }

int cuda_launch(const MarginalArgs& args, void* stream) {
  return with_process(args.process, [&](auto process) {
    auto* kernel = args.dtype == DType::f64 ? marginal_kernel<process(), double> : marginal_kernel<process(), float>;
    return launch(kernel, args.rows, 1, 1, args, stream);
  });
}

const char* cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace scoresde
