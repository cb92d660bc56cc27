// The operators: schemas, argument checks, layouts, and dispatch to csrc/kernels. scoresde_ext/ops.py documents each
// one.
#include <ATen/DeviceAccelerator.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/kernels.h"
#include "torch/operators.h"

namespace scoresde {
namespace {

// ---- argument checks ----

DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kDouble:
      return DType::f64;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    default:
      TORCH_CHECK_TYPE(false, name, ": expected float32, float64, bfloat16 or float16, got ", t.scalar_type(),
                       ". Convert it first, for example with .float().");
  }
}

at::ScalarType compute_type(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

void check_same(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  TORCH_CHECK_VALUE(t.sizes() == like.sizes(), name, ": expected the shape of ", like_name, ", ", like.sizes(),
                    ", got ", t.sizes(), ".");
  TORCH_CHECK_VALUE(t.device() == like.device(), name, ": expected the device of ", like_name, ", ", like.device(),
                    ", got ", t.device(), ". Move it with .to().");
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), name, ": expected the dtype of ", like_name, ", ",
                   like.scalar_type(), ", got ", t.scalar_type(), ". Convert it with .to().");
}

struct Shape {
  int64_t rows, cols;
};

Shape shape_of(const Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.dim() >= 1, name,
                    ": expected shape (B, ...), got a tensor without dimensions. Add a batch dimension.");
  int64_t cols = 1;
  for (int64_t d = 1; d < t.dim(); ++d) cols *= t.size(d);
  return {t.size(0), cols};
}

// ---- layouts ----

// A new contiguous array on the device of `like`. On the CPU without the dispatcher, which is most of what it would
// take.
Tensor empty(at::IntArrayRef size, at::ScalarType dtype, const Tensor& like) {
  return like.is_cpu() ? Tensor(at::detail::empty_cpu(size, dtype)) : at::empty(size, like.options().dtype(dtype));
}

// Brings every array of a call into one element order. The order of `like` itself serves where its rows are dense
// (contiguous, channels_last, ...). Generated noise is indexed in logical order: it asks for contiguous arrays, or, on
// CUDA, for channels_last.
class Layout {
 public:
  Layout(const Tensor& like, const char* name, bool logical_order) : like_(like), name_(name) {
    const Shape s = shape_of(like, name);
    const bool dense = like.is_non_overlapping_and_dense() && (s.rows <= 1 || s.cols == 0 || like.stride(0) == s.cols);
    direct_ = like.is_contiguous() || (dense && (!logical_order || (like.is_cuda() && is_channels_last())));
  }

  // How the noise of a stream lies in these arrays.
  void set_order(Noise& noise) const {
    if (!direct_ || like_.is_contiguous() || like_.numel() == 0) return;
    noise.channels = like_.size(1);
    noise.pixels = like_.numel() / like_.size(0) / like_.size(1);
  }

  Tensor input(const Tensor& t, const char* name) const {
    check_same(t, name, like_, name_);
    if (!direct_ || like_.is_contiguous()) return t.contiguous();
    return t.strides() == like_.strides() ? t : at::empty_like(like_).copy_(t);
  }

  Tensor output() const {
    return direct_ && !like_.is_contiguous() ? at::empty_like(like_) : empty(like_.sizes(), like_.scalar_type(), like_);
  }

  // Results always have the strides of torch.empty_like(like).
  Tensor result(const Tensor& computed) const { return direct_ ? computed : at::empty_like(like_).copy_(computed); }

 private:
  // Whether a row lies in memory as (pixels, channels).
  bool is_channels_last() const {
    if (like_.dim() < 3 || like_.stride(1) != 1) return false;
    int64_t stride = like_.size(1);
    for (int64_t d = like_.dim() - 1; d >= 2; stride *= like_.size(d), --d) {
      if (like_.size(d) > 1 && like_.stride(d) != stride) return false;
    }
    return true;
  }

  const Tensor& like_;
  const char* name_;
  bool direct_;
};

// A coefficient argument, kept alive for the call.
struct Numbers {
  Tensor held;
  Coefficient coefficient;

  Numbers() = default;
  Numbers(const Tensor& t, const char* name, const Tensor& x) {
    TORCH_CHECK_VALUE(t.dim() <= 1 && (t.numel() == 1 || t.numel() == x.size(0)), name,
                      ": expected one number or one a sample, shape (", x.size(0), ",), got shape ", t.sizes(), ".");
    TORCH_CHECK_VALUE(t.device() == x.device(), name, ": expected device ", x.device(), ", got ", t.device(),
                      ". Move it with .to().");
    TORCH_CHECK_TYPE(t.is_floating_point(), name, ": expected a floating-point tensor, got ", t.scalar_type(), ".");
    // Kernels read float32 and float64; the loops of a CPU take one number a sample in their own type.
    const bool is_read =
        (x.is_cuda() || t.numel() == 1) && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble);
    held = is_read || t.scalar_type() == compute_type(x) ? t : t.to(compute_type(x));
    if (!is_read) held = held.contiguous();
    coefficient = {held.const_data_ptr(), held.numel() == 1 ? 0 : held.stride(0), held.scalar_type() == at::kDouble};
  }
  Numbers(const OptTensor& t, const char* name, const Tensor& x) {
    if (t) *this = Numbers(*t, name, x);
  }
};

// The coefficient matrices of a linear combination of `n_terms` arrays like `x`, kept alive for the call.
struct MatricesInput {
  Tensor held;
  Matrices matrices;

  MatricesInput(const Tensor& t, int64_t n_terms, const Tensor& x) {
    TORCH_CHECK_VALUE((t.dim() == 2 || (t.dim() == 3 && t.size(2) == x.size(0))) && t.size(0) >= 1 &&
                          t.size(0) <= max_results && t.size(1) == n_terms,
                      "coefficients: expected shape (M, ", n_terms, ") or (M, ", n_terms, ", ", x.size(0),
                      "), one column an array, M from 1 to ", max_results, ", got ", t.sizes(), ".");
    TORCH_CHECK_VALUE(t.device() == x.device(), "coefficients: expected device ", x.device(), ", got ", t.device(),
                      ". Move them with .to().");
    TORCH_CHECK_TYPE(t.is_floating_point(), "coefficients: expected a floating-point tensor, got ", t.scalar_type(),
                     ".");
    const bool is_read = t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble;
    held = is_read ? t : t.to(at::kFloat);
    matrices = {held.const_data_ptr(), held.scalar_type() == at::kDouble, held.stride(0), held.stride(1),
                held.dim() == 3 ? held.stride(2) : 0};
  }
};

// The noise arguments of an op: an array `z`, or a `key` (with `ids`, `draw`), or nothing.
struct NoiseInput {
  Tensor z, key, ids;
  Noise noise;

  NoiseInput(const OptTensor& array, const OptTensor& stream_key, const OptTensor& stream_ids, int64_t draw,
             const Tensor& like, const Layout& layout) {
    TORCH_CHECK_VALUE(!(array && stream_key), "z, key: expected one of them, got both.");
    if (array) {
      z = layout.input(*array, "z");
      noise.array = z.const_data_ptr();
    } else if (stream_key) {
      *this = NoiseInput(*stream_key, stream_ids, draw, shape_of(like, "x"), like.device());
      layout.set_order(noise);
    }
  }

  // A stream of which the array `kept` holds the first samples' noise.
  NoiseInput(const Tensor& kept, const Tensor& stream_key, const OptTensor& stream_ids, int64_t draw,
             const Tensor& like)
      : NoiseInput(stream_key, stream_ids, draw, shape_of(like, "x"), like.device()) {
    TORCH_CHECK_VALUE(like.is_cpu() && like.scalar_type() == at::kFloat && kept.scalar_type() == at::kFloat &&
                          kept.is_cpu() && kept.is_contiguous() && kept.dim() == like.dim() &&
                          kept.size(0) <= like.size(0) && kept.sizes().slice(1) == like.sizes().slice(1),
                      "z, key: expected one of them, or the noise that perturb_keeping kept: a contiguous float32 "
                      "tensor on the CPU of the first samples of ",
                      like.sizes(), ", got ", kept.scalar_type(), " ", kept.sizes(), " on ", kept.device(), ".");
    z = kept;
    noise.array = z.const_data_ptr();
    noise.array_rows = z.size(0);
  }

  NoiseInput(const Tensor& stream_key, const OptTensor& stream_ids, int64_t draw, Shape shape, at::Device device)
      : key(stream_key.contiguous()) {
    TORCH_CHECK_VALUE(key.scalar_type() == at::kLong && key.sizes() == at::IntArrayRef({2}) && key.device() == device,
                      "key: expected an int64 tensor (seed, first draw) of shape (2,) on ", device, ", got ",
                      key.scalar_type(), " ", key.sizes(), " on ", key.device(), ".");
    TORCH_CHECK_VALUE(draw >= 0, "draw: expected a count from 0 on, got ", draw, ".");
    TORCH_CHECK_VALUE(shape.cols <= (int64_t{1} << 34),
                      "x: expected at most 2^34 elements a sample where noise is generated, got ", shape.cols, ".");
    noise.key = key.const_data_ptr<int64_t>();
    noise.draw = draw;
    if (stream_ids) {
      TORCH_CHECK_VALUE(stream_ids->scalar_type() == at::kLong && stream_ids->dim() == 1 &&
                            stream_ids->size(0) == shape.rows && stream_ids->device() == device,
                        "ids: expected an int64 tensor of shape (", shape.rows, ",) on ", device, ", got ",
                        stream_ids->scalar_type(), " ", stream_ids->sizes(), " on ", stream_ids->device(), ".");
      ids = stream_ids->contiguous();
      noise.ids = ids.const_data_ptr<int64_t>();
    }
  }
};

// ---- running kernels ----

// Enqueues a kernel on the current stream of a CUDA device.
template <class Args>
void launch([[maybe_unused]] const Args& args, at::Device device) {
#ifdef SCORESDE_EXT_WITH_CUDA
  const c10::DeviceGuard guard(device);
  const int error = cuda_launch(args, at::accelerator::getCurrentStream(device.index()).native_handle());
  TORCH_CHECK(error == 0, "scoresde_ext: CUDA could not start a kernel on ", device, ": ", cuda_error(error),
              ". The kernels were built for the architectures " SCORESDE_EXT_CUDA_ARCHS
              "; TORCH_CUDA_ARCH_LIST chooses others in a rebuild.");
#else
  TORCH_CHECK(false, "scoresde_ext: this build has no kernels for ", device, ".");
#endif
}

// Runs a kernel where its arrays are: on a CUDA device, or on the threads of the CPU.
template <class Args>
void run(void (*cpu_kernel)(const Args&, int64_t, int64_t), const Args& args, at::Device device) {
  if (args.rows == 0 || args.cols == 0) return;
  if (device.is_cuda()) return launch(args, device);
  constexpr int64_t grain = 16;  // tiles a thread is worth waking for
  at::parallel_for(0, Tiling(args.rows, args.cols).count(), grain,
                   [&](int64_t begin, int64_t end) { cpu_kernel(args, begin, end); });
}

// Where a kernel leaves the sums of its tiles: (rows, tiles a row).
Tensor partial_sums(Shape shape, const Tensor& like) {
  const int64_t tiles = shape.cols == 0 ? 0 : Tiling(shape.rows, shape.cols).tiles_per_row;
  return empty({shape.rows, tiles}, at::kDouble, like);
}

template <class A>
void sum_on_cpu(const SumArgs& args) {
  const auto weight = [w = args.w](int64_t r) -> double {
    if (!w.data) return 1;
    return w.is_double ? static_cast<const double*>(w.data)[r * w.stride]
                       : static_cast<const float*>(w.data)[r * w.stride];
  };
  for (int64_t r = 0; r < args.rows; ++r) {
    double sum = 0;
    for (int64_t i = 0; i < args.cols; ++i) sum += args.partials[r * args.cols + i];
    static_cast<A*>(args.sums)[r] = static_cast<A>(weight(r) * sum);
  }
}

// w sum_i partials[row, i], without w where that is none, of the rows in `partials`.
Tensor sum_rows(const Tensor& partials, at::IntArrayRef rows, const Numbers& w, at::ScalarType dtype) {
  const Tensor sums = empty(rows, dtype, partials);
  const int64_t n = sums.numel();
  const SumArgs args{
      dtype_of(sums, "sums"), n, n == 0 ? 0 : partials.numel() / n, partials.const_data_ptr<double>(), w.coefficient,
      sums.mutable_data_ptr()};
  if (args.rows == 0) return sums;
  if (partials.is_cuda()) {
    launch(args, partials.device());
  } else if (args.dtype == DType::f64) {
    sum_on_cpu<double>(args);
  } else {
    sum_on_cpu<float>(args);
  }
  return sums;
}

// ---- affine ----

// Shared by the three affine schemas: `mean` and `next` are written where wanted.
std::pair<Tensor, Tensor> run_affine(const Tensor& x, const OptTensor& out, const Tensor& p, const OptTensor& q,
                                     const OptTensor& n, const OptTensor& z, const OptTensor& key, const OptTensor& ids,
                                     int64_t draw, bool want_mean) {
  const DType dtype = dtype_of(x, "x");
  const Layout layout(x, "x", key.has_value());
  const Shape shape = shape_of(x, "x");
  const NoiseInput noise(z, key, ids, draw, x, layout);
  TORCH_CHECK_VALUE(out.has_value() == q.has_value(), "out, q: expected both or neither.");
  TORCH_CHECK_VALUE(n.has_value() == (z.has_value() || key.has_value()),
                    "n: expected exactly where there is noise (z or key).");
  const Tensor xs = layout.input(x, "x");
  const Tensor outs = out ? layout.input(*out, "out") : Tensor();
  const Numbers ps(p, "p", x), qs(q, "q", x), ns(n, "n", x);
  Tensor mean, next;
  if (want_mean) mean = layout.output();
  if (n) next = layout.output();
  const AffineArgs args{dtype,
                        shape.rows,
                        shape.cols,
                        xs.const_data_ptr(),
                        out ? outs.const_data_ptr() : nullptr,
                        ps.coefficient,
                        qs.coefficient,
                        ns.coefficient,
                        noise.noise,
                        want_mean ? mean.mutable_data_ptr() : nullptr,
                        n ? next.mutable_data_ptr() : nullptr};
  run(cpu_kernels().affine, args, x.device());
  return {want_mean ? layout.result(mean) : mean, n ? layout.result(next) : next};
}

Tensor affine(const Tensor& x, const OptTensor& out, const Tensor& p, const OptTensor& q) {
  return run_affine(x, out, p, q, {}, {}, {}, {}, 0, true).first;
}

std::tuple<Tensor, Tensor> affine_noise(const Tensor& x, const OptTensor& out, const Tensor& p, const OptTensor& q,
                                        const Tensor& n, const OptTensor& z, const OptTensor& key, const OptTensor& ids,
                                        int64_t draw) {
  return run_affine(x, out, p, q, n, z, key, ids, draw, true);
}

// The second result of affine_noise alone: an array less to write.
Tensor affine_next(const Tensor& x, const OptTensor& out, const Tensor& p, const OptTensor& q, const Tensor& n,
                   const OptTensor& z, const OptTensor& key, const OptTensor& ids, int64_t draw) {
  return run_affine(x, out, p, q, n, z, key, ids, draw, false).second;
}

Tensor perturb(const Tensor& x, const Tensor& m, const Tensor& s, const OptTensor& z, const OptTensor& key,
               const OptTensor& ids, int64_t draw) {
  return affine_next(x, {}, m, {}, s, z, key, ids, draw);
}

// perturb of a float32 batch on the CPU, and the noise of its first `kept` samples, which score_loss takes with the
// key. NaN and Inf in the batch are found on the way.
std::tuple<Tensor, Tensor> perturb_keeping(const Tensor& x, const Tensor& m, const Tensor& s, const Tensor& key,
                                           const OptTensor& ids, int64_t draw, int64_t kept) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "x0: expected float32, got ", x.scalar_type(), ".");
  const Layout layout(x, "x", true);
  const Shape shape = shape_of(x, "x");
  TORCH_CHECK_VALUE(kept >= 0 && kept <= shape.rows, "kept: expected 0 to ", shape.rows, " samples, got ", kept, ".");
  const NoiseInput noise(key, ids, draw, shape, x.device());
  const Tensor xs = layout.input(x, "x");
  const Numbers ms(m, "m", x), ss(s, "s", x);
  std::vector<int64_t> size = x.sizes().vec();
  size[0] = kept;
  const Tensor next = layout.output(), z = empty(size, at::kFloat, x);
  AffineArgs args{DType::f32, shape.rows, shape.cols};
  args.x = xs.const_data_ptr(), args.p = ms.coefficient, args.n = ss.coefficient, args.noise = noise.noise;
  args.next = next.mutable_data_ptr(), args.z = z.mutable_data_ptr<float>(), args.z_rows = kept;
  std::vector<uint32_t> largest(shape.cols == 0 ? 0 : Tiling(shape.rows, shape.cols).count());
  args.largest = largest.data();
  run(cpu_kernels().affine, args, x.device());
  constexpr uint32_t infinity = 0x7f800000;
  TORCH_CHECK_VALUE(std::all_of(largest.begin(), largest.end(), [](uint32_t v) { return v < infinity; }),
                    "x0: expected finite values, got NaN or Inf.");
  return {layout.result(next), z};
}

// ---- score-matching loss ----

std::tuple<Tensor, Tensor> score_loss(const Tensor& out, const OptTensor& c, const OptTensor& d, const Tensor& w,
                                      const OptTensor& z, const OptTensor& key, const OptTensor& ids, int64_t draw,
                                      bool with_grad, bool total) {
  const DType dtype = dtype_of(out, "out");
  const Layout layout(out, "out", key.has_value());
  const Shape shape = shape_of(out, "out");
  const NoiseInput noise = z && key ? NoiseInput(*z, *key, ids, draw, out) : NoiseInput(z, key, ids, draw, out, layout);
  TORCH_CHECK_VALUE(d.has_value() == (z.has_value() || key.has_value()),
                    "d: expected exactly where there is noise (z or key).");
  TORCH_CHECK_VALUE(c.has_value() || (d.has_value() && !with_grad),
                    "c: expected a coefficient of out, or d and no gradient.");
  const Tensor outs = layout.input(out, "out");
  const Numbers cs(c, "c", out), ds(d, "d", out), ws(w, "w", out);
  const Tensor partials = partial_sums(shape, out);
  const Tensor grad = with_grad ? layout.output() : empty({0}, out.scalar_type(), out);
  const ResidualArgs args{dtype, shape.rows, shape.cols, outs.const_data_ptr(), cs.coefficient, ds.coefficient,
                          ws.coefficient, noise.noise,
                          // a weight of one over the batch's elements would underflow in half precision
                          dtype == DType::f32 || dtype == DType::f64, with_grad ? grad.mutable_data_ptr() : nullptr,
                          partials.mutable_data_ptr<double>()};
  run(cpu_kernels().residual, args, out.device());
  const Tensor loss = total ? sum_rows(sum_rows(partials, {shape.rows}, ws, at::kDouble), {}, {}, compute_type(out))
                            : sum_rows(partials, {shape.rows}, ws, compute_type(out));
  return {loss, with_grad ? layout.result(grad) : grad};
}

// ---- multistep ----

std::vector<Tensor> combine(at::TensorList arrays, const Tensor& coefficients) {
  TORCH_CHECK_VALUE(arrays.size() >= 1 && arrays.size() <= max_terms, "arrays: expected 1 to ", max_terms,
                    " arrays, got ", arrays.size(), ".");
  const Tensor& first = arrays[0];
  CombineArgs args{};
  args.dtype = dtype_of(first, "arrays");
  const Layout layout(first, "arrays[0]", false);
  const Shape shape = shape_of(first, "arrays");
  const MatricesInput c(coefficients, static_cast<int64_t>(arrays.size()), first);
  args.rows = shape.rows, args.cols = shape.cols, args.c = c.matrices;
  std::vector<Tensor> held, results;
  held.reserve(arrays.size());
  for (const Tensor& array : arrays) {
    held.push_back(layout.input(array, "arrays"));
    args.arrays[args.n_terms++] = held.back().const_data_ptr();
  }
  results.reserve(max_results);
  for (int64_t m = 0; m < coefficients.size(0); ++m) {
    results.push_back(layout.output());
    args.results[args.n_results++] = results.back().mutable_data_ptr();
  }
  run(cpu_kernels().combine, args, first.device());
  for (Tensor& result : results) result = layout.result(result);
  return results;
}

// ---- Runge-Kutta ----

// The slopes that count: pointers and coefficients, without those whose coefficient is zero.
struct Slopes {
  std::vector<Tensor> held;
  int32_t n = 0;
  const void* k[max_stages];
  double a[max_stages];

  Slopes(at::TensorList ks, at::ArrayRef<double> as, const Layout& layout) {
    TORCH_CHECK_VALUE(ks.size() <= max_stages, "ks: expected at most ", max_stages, " slopes, got ", ks.size(), ".");
    for (size_t i = 0; i < ks.size(); ++i) {
      const Tensor slope = layout.input(ks[i], "ks");
      if (as[i] == 0.0) continue;
      held.push_back(slope);
      k[n] = slope.const_data_ptr();
      a[n++] = as[i];
    }
  }
};

void check_weights(size_t given, size_t wanted, const char* name) {
  TORCH_CHECK_VALUE(given == wanted, name, ": expected ", wanted, " coefficients, one a slope, got ", given, ".");
}

// The arguments of a stage without those of an evaluation; `a` has a coefficient a slope.
StageArgs stage_args(const Shape& shape, DType dtype, const Tensor& y, const Slopes& slopes, const Numbers& h) {
  StageArgs args{};
  args.dtype = dtype, args.rows = shape.rows, args.cols = shape.cols, args.stages = slopes.n;
  std::copy_n(slopes.k, slopes.n, args.k);
  args.h = h.coefficient, args.y = y.const_data_ptr();
  return args;
}

Tensor rk_stage(const Tensor& y, at::TensorList ks, at::ArrayRef<double> a, const Tensor& h) {
  check_weights(a.size(), ks.size(), "a");
  const DType dtype = dtype_of(y, "y");
  const Layout layout(y, "y", false);
  const Tensor ys = layout.input(y, "y");
  const Slopes slopes(ks, a, layout);
  const Numbers hs(h, "h", y);
  const Tensor next = layout.output();
  StageArgs args = stage_args(shape_of(y, "y"), dtype, ys, slopes, hs);
  args.lines = args.states = 1, args.results[0] = next.mutable_data_ptr();
  std::copy_n(slopes.a, slopes.n, args.a[0]);
  run(cpu_kernels().stage, args, y.device());
  return layout.result(next);
}

std::vector<Tensor> rk_drift_stage(const Tensor& y, at::TensorList ks, at::ArrayRef<double> a, const Tensor& h,
                                   const OptTensor& x, at::ArrayRef<double> at, const Tensor& out, const OptTensor& f,
                                   const Tensor& q, int64_t states, bool keep) {
  const size_t n = ks.size() + 1;
  const int32_t lines = static_cast<int32_t>(a.size() / n);
  TORCH_CHECK_VALUE(a.size() == lines * n && lines >= 1 && lines <= max_results, "a: expected 1 to ", max_results,
                    " lines of ", n, " coefficients, one a slope and one for the new slope, got ", a.size(),
                    " numbers.");
  TORCH_CHECK_VALUE(states >= 0 && states <= lines, "states: expected 0 to ", lines, " lines, got ", states, ".");
  const bool at_stage = f && !x;  // x is to be computed
  if (at_stage) check_weights(at.size(), ks.size(), "x");
  const DType dtype = dtype_of(y, "y");
  const Layout layout(y, "y", false);
  const Tensor ys = layout.input(y, "y"), outs = layout.input(out, "out");
  // Slopes that no line needs are left out.
  std::vector<double> needed(n - 1);
  for (size_t j = 0; j < n - 1; ++j) {
    for (int32_t m = 0; m < lines; ++m) needed[j] += a[m * n + j] != 0.0;
    if (at_stage) needed[j] += at[j] != 0.0;
  }
  const Slopes slopes(ks, needed, layout);
  const Numbers hs(h, "h", y), fs(f, "f", y), qs(q, "q", y);
  StageArgs args = stage_args(shape_of(y, "y"), dtype, ys, slopes, hs);
  args.lines = lines, args.states = static_cast<int32_t>(states);
  for (size_t j = 0, used = 0; j < n - 1; ++j) {
    if (needed[j] == 0.0) continue;
    for (int32_t m = 0; m < lines; ++m) args.a[m][used] = a[m * n + j];
    args.at[used++] = at_stage ? at[j] : 0.0;
  }
  Tensor xs;
  if (f && x) {
    xs = layout.input(*x, "x");
    args.x = xs.const_data_ptr();
  }
  args.out = outs.const_data_ptr(), args.f = fs.coefficient, args.q = qs.coefficient;
  std::vector<Tensor> results;
  for (int32_t m = 0; m < lines; ++m) {
    args.a_new[m] = a[m * n + n - 1];
    results.push_back(layout.output());
    args.results[m] = results.back().mutable_data_ptr();
  }
  if (keep) {
    results.push_back(layout.output());
    args.k_new = results.back().mutable_data_ptr();
  }
  run(cpu_kernels().stage, args, y.device());
  for (Tensor& result : results) result = layout.result(result);
  return results;
}

// Shared by the two schemas; the second has one more slope, of an evaluation at y1.
std::pair<Tensor, Tensor> run_error(const Tensor& y0, const Tensor& y1, at::TensorList ks, at::ArrayRef<double> e,
                                    const Tensor& h, const OptTensor& out, const OptTensor& f, const OptTensor& q,
                                    double rtol, double atol) {
  check_weights(e.size(), ks.size() + out.has_value(), "e");
  const DType dtype = dtype_of(y0, "y0");
  const Layout layout(y0, "y0", false);
  const Shape shape = shape_of(y0, "y0");
  const Tensor y0s = layout.input(y0, "y0"), y1s = layout.input(y1, "y1");
  const Tensor outs = out ? layout.input(*out, "out") : Tensor();
  const Slopes slopes(ks, e, layout);
  const Numbers hs(h, "h", y0), fs(f, "f", y0), qs(q, "q", y0);
  const Tensor partials = partial_sums(shape, y0), slope = out ? layout.output() : Tensor();
  ErrorArgs args{};
  args.dtype = dtype, args.rows = shape.rows, args.cols = shape.cols, args.stages = slopes.n;
  std::copy_n(slopes.k, slopes.n, args.k);
  std::copy_n(slopes.a, slopes.n, args.e);
  args.h = hs.coefficient, args.y0 = y0s.const_data_ptr(), args.y1 = y1s.const_data_ptr();
  args.rtol = rtol, args.atol = atol, args.partials = partials.mutable_data_ptr<double>();
  if (out) {
    args.out = outs.const_data_ptr(), args.f = fs.coefficient, args.q = qs.coefficient;
    args.e_new = e.back(), args.k_new = slope.mutable_data_ptr();
  }
  run(cpu_kernels().error, args, y0.device());
  return {sum_rows(partials, {shape.rows}, Numbers(), at::kDouble), out ? layout.result(slope) : slope};
}

Tensor rk_error(const Tensor& y0, const Tensor& y1, at::TensorList ks, at::ArrayRef<double> e, const Tensor& h,
                double rtol, double atol) {
  return run_error(y0, y1, ks, e, h, {}, {}, {}, rtol, atol).first;
}

std::tuple<Tensor, Tensor> rk_drift_error(const Tensor& y0, const Tensor& y1, at::TensorList ks, at::ArrayRef<double> e,
                                          const Tensor& h, const Tensor& out, const OptTensor& f, const Tensor& q,
                                          double rtol, double atol) {
  return run_error(y0, y1, ks, e, h, out, f, q, rtol, atol);
}

Tensor rk_control(const Tensor& norm, const Tensor& h, const Tensor& after_rejection, double exponent) {
  TORCH_CHECK_VALUE(norm.dim() == 1 && norm.scalar_type() == at::kDouble && h.sizes() == norm.sizes() &&
                        h.scalar_type() == at::kDouble && after_rejection.sizes() == norm.sizes() &&
                        after_rejection.scalar_type() == at::kBool,
                    "norm, h, after_rejection: expected float64, float64 and bool tensors of one shape (R,), got ",
                    norm.scalar_type(), " ", norm.sizes(), ", ", h.scalar_type(), " ", h.sizes(), ", ",
                    after_rejection.scalar_type(), " ", after_rejection.sizes(), ".");
  TORCH_CHECK_VALUE(h.device() == norm.device() && after_rejection.device() == norm.device(),
                    "h, after_rejection: expected the device of norm, ", norm.device(), ", got ", h.device(), " and ",
                    after_rejection.device(), ". Move them with .to().");
  const int64_t rows = norm.size(0);
  const Tensor norms = norm.contiguous(), hs = h.contiguous(), rejected = after_rejection.contiguous();
  const Tensor result = at::empty({2, rows}, norm.options());
  const ControlArgs args{rows,
                         norms.const_data_ptr<double>(),
                         hs.const_data_ptr<double>(),
                         rejected.const_data_ptr<bool>(),
                         exponent,
                         result.mutable_data_ptr<double>(),
                         result.mutable_data_ptr<double>() + rows};
  if (rows == 0) return result;
  if (norm.is_cuda()) {
    launch(args, norm.device());
  } else {
    control_steps(args);
  }
  return result;
}

// ---- marginals ----

std::tuple<Tensor, Tensor, Tensor> marginal(const Tensor& u, double first, double last, int64_t process, double a,
                                            double b) {
  TORCH_CHECK_TYPE(u.scalar_type() == at::kFloat || u.scalar_type() == at::kDouble,
                   "u: expected float32 or float64, got ", u.scalar_type(), ".");
  TORCH_CHECK_VALUE(u.dim() == 1, "u: expected shape (B,), got ", u.sizes(), ".");
  TORCH_CHECK_VALUE(process >= 0 && process <= static_cast<int64_t>(Process::ve),
                    "process: expected 0 for vp, 1 for subvp or 2 for ve, got ", process, ".");
  const Process kind = static_cast<Process>(process);
  const double p = kind == Process::ve ? a : 0.25 * (b - a), q = kind == Process::ve ? std::log(b / a) : 0.5 * a;
  const Tensor us = u.contiguous();
  const Tensor t = empty(u.sizes(), u.scalar_type(), u), m = empty(u.sizes(), u.scalar_type(), u),
               s = empty(u.sizes(), u.scalar_type(), u);
  const MarginalArgs args{dtype_of(u, "u"),
                          u.numel(),
                          us.const_data_ptr(),
                          first,
                          last - first,
                          kind,
                          p,
                          q,
                          t.mutable_data_ptr(),
                          m.mutable_data_ptr(),
                          s.mutable_data_ptr()};
  if (args.rows == 0) return {t, m, s};
  if (u.is_cuda()) {
    launch(args, u.device());
  } else {
    at::parallel_for(0, args.rows, 4096, [&](int64_t begin, int64_t end) { cpu_kernels().marginal(args, begin, end); });
  }
  return {t, m, s};
}

void put(const Tensor& into, const Tensor& values, const Tensor& chosen) {
  const DType dtype = dtype_of(into, "into");
  const Shape shape = shape_of(into, "into");
  TORCH_CHECK_VALUE(into.is_contiguous(), "into: expected a contiguous tensor, got strides ", into.strides(), ".");
  const Tensor held = Layout(into, "into", true).input(values, "values");
  TORCH_CHECK_VALUE(chosen.scalar_type() == at::kBool && chosen.dim() == 1 && chosen.device() == into.device() &&
                        (chosen.size(0) == 1 || chosen.size(0) == shape.rows),
                    "chosen: expected a bool tensor of one element or (", shape.rows, ",) on ", into.device(), ", got ",
                    chosen.scalar_type(), " ", chosen.sizes(), " on ", chosen.device(), ".");
  const PutArgs args{dtype,
                     shape.rows,
                     shape.cols,
                     held.const_data_ptr(),
                     chosen.const_data_ptr<bool>(),
                     chosen.size(0) == 1 ? 0 : chosen.stride(0),
                     into.mutable_data_ptr()};
  run(cpu_kernels().put, args, into.device());
  into.unsafeGetTensorImpl()->bump_version();  // for what autograd has saved of it
}

// ---- noise ----

Tensor run_noise(const Tensor& key, const OptTensor& ids, int64_t draw, at::IntArrayRef size, Law law, uint64_t high,
                 at::ScalarType dtype, double* squares = nullptr) {
  const Tensor values = empty(size, dtype, key);
  const Shape shape = shape_of(values, "size");
  const NoiseInput noise(key, ids, draw, shape, key.device());
  run(cpu_kernels().noise,
      NoiseArgs{shape.rows, shape.cols, noise.noise, law, high, values.mutable_data_ptr(), squares}, key.device());
  return values;
}

// Normals on the CPU, and their sum of squares in each sample.
std::tuple<Tensor, Tensor> noise_with_squares(const Tensor& key, const OptTensor& ids, int64_t draw,
                                              at::IntArrayRef size) {
  TORCH_CHECK_VALUE(!size.empty(), "size: expected a shape (B, ...), got an empty one.");
  int64_t cols = 1;
  for (const int64_t n : size.slice(1)) cols *= n;
  const Tensor partials = partial_sums({size[0], cols}, key);
  const Tensor z = run_noise(key, ids, draw, size, Law::normal, 0, at::kFloat, partials.mutable_data_ptr<double>());
  return {z, sum_rows(partials, {size[0]}, {}, at::kFloat)};
}

Tensor noise_normal(const Tensor& key, const OptTensor& ids, int64_t draw, at::IntArrayRef size) {
  return run_noise(key, ids, draw, size, Law::normal, 0, at::kFloat);
}

Tensor noise_uniform(const Tensor& key, const OptTensor& ids, int64_t draw, at::IntArrayRef size) {
  return run_noise(key, ids, draw, size, Law::uniform, 0, at::kFloat);
}

Tensor noise_integers(const Tensor& key, const OptTensor& ids, int64_t draw, at::IntArrayRef size, int64_t high) {
  TORCH_CHECK_VALUE(high >= 1 && high <= (int64_t{1} << 32), "high: expected 1 to 2^32, got ", high, ".");
  return run_noise(key, ids, draw, size, Law::integer, static_cast<uint64_t>(high), at::kLong);
}

// The same functions for every device: they differ below `run` only.
void implement(torch::Library& m) {
  m.impl("affine", &affine);
  m.impl("affine_noise", &affine_noise);
  m.impl("affine_next", &affine_next);
  m.impl("perturb", &perturb);
  m.impl("score_loss", &score_loss);
  m.impl("combine", &combine);
  m.impl("rk_stage", &rk_stage);
  m.impl("rk_drift_stage", &rk_drift_stage);
  m.impl("rk_error", &rk_error);
  m.impl("rk_drift_error", &rk_drift_error);
  m.impl("rk_control", &rk_control);
  m.impl("marginal", &marginal);
  m.impl("put", &put);
  m.impl("noise_normal", &noise_normal);
  m.impl("noise_uniform", &noise_uniform);
  m.impl("noise_integers", &noise_integers);
}

}  // namespace

TORCH_LIBRARY(scoresde_ext, m) {
  m.def("affine(Tensor x, Tensor? out, Tensor p, Tensor? q) -> Tensor");
  m.def(
      "affine_noise(Tensor x, Tensor? out, Tensor p, Tensor? q, Tensor n, Tensor? z, Tensor? key, Tensor? ids, int "
      "draw) -> (Tensor, Tensor)");
  m.def(
      "affine_next(Tensor x, Tensor? out, Tensor p, Tensor? q, Tensor n, Tensor? z, Tensor? key, Tensor? ids, int "
      "draw) "
      "-> Tensor");
  m.def("perturb(Tensor x, Tensor m, Tensor s, Tensor? z, Tensor? key, Tensor? ids, int draw) -> Tensor");
  m.def(
      "perturb_keeping(Tensor x, Tensor m, Tensor s, Tensor key, Tensor? ids, int draw, SymInt kept) -> (Tensor, "
      "Tensor)");
  m.def(
      "score_loss(Tensor out, Tensor? c, Tensor? d, Tensor w, Tensor? z, Tensor? key, Tensor? ids, int draw, bool "
      "with_grad, bool total) -> (Tensor, Tensor)");
  m.def("combine(Tensor[] arrays, Tensor coefficients) -> Tensor[]");
  m.def("rk_stage(Tensor y, Tensor[] ks, float[] a, Tensor h) -> Tensor");
  m.def(
      "rk_drift_stage(Tensor y, Tensor[] ks, float[] a, Tensor h, Tensor? x, float[] at, Tensor out, Tensor? f, Tensor "
      "q, "
      "int states, bool keep) -> Tensor[]");
  m.def("rk_error(Tensor y0, Tensor y1, Tensor[] ks, float[] e, Tensor h, float rtol, float atol) -> Tensor");
  m.def(
      "rk_drift_error(Tensor y0, Tensor y1, Tensor[] ks, float[] e, Tensor h, Tensor out, Tensor? f, Tensor q, float "
      "rtol, float atol) -> (Tensor, Tensor)");
  m.def("put(Tensor(a!) into, Tensor values, Tensor chosen) -> ()");
  m.def("rk_control(Tensor norm, Tensor h, Tensor after_rejection, float exponent) -> Tensor");
  m.def("marginal(Tensor u, float first, float last, int process, float a, float b) -> (Tensor, Tensor, Tensor)");
  m.def("noise_normal(Tensor key, Tensor? ids, int draw, SymInt[] size) -> Tensor");
  m.def("noise_with_squares(Tensor key, Tensor? ids, int draw, SymInt[] size) -> (Tensor, Tensor)");
  m.def("noise_uniform(Tensor key, Tensor? ids, int draw, SymInt[] size) -> Tensor");
  m.def("noise_integers(Tensor key, Tensor? ids, int draw, SymInt[] size, int high) -> Tensor");
}

TORCH_LIBRARY_IMPL(scoresde_ext, CPU, m) {
  implement(m);
  m.impl("perturb_keeping", &perturb_keeping);
  m.impl("noise_with_squares", &noise_with_squares);
}
#ifdef SCORESDE_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(scoresde_ext, CUDA, m) { implement(m); }
#endif

}  // namespace scoresde
