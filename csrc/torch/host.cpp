// What the loops of samplers and solvers do on the CPU between two operators. An operation of torch takes 1 to 3 us in
// a loop of its own, and 10 where a network has run since it was last used and its code is no longer in the cache: more
// than the kernels of a small batch. These are a page of code in all.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <numeric>
#include <utility>

#include "torch/operators.h"
#include "torch/python.h"

namespace scoresde {
namespace {

using at::Tensor;

constexpr int lanes = 8;  // of a result that are worked on side by side, for the compiler to make vectors of

// A new tensor (n,), float32 or float64.
Tensor empty(int64_t n, bool is_double) { return at::detail::empty_cpu({n}, is_double ? at::kDouble : at::kFloat); }

// f(data, n) for a tensor (n,) on the CPU, in its own type.
template <class F>
auto with_numbers(const Tensor& numbers, F f) {
  TORCH_CHECK_VALUE(numbers.is_cpu() && numbers.dim() == 1, "numbers: expected shape (n,) on the CPU.");
  // Not what torch.neg and the like leave for later: there is no dispatcher between this and Python.
  const Tensor dense = is_plain(numbers) ? numbers.contiguous()
                                         : empty(numbers.size(0), numbers.scalar_type() == at::kDouble).copy_(numbers);
  return dense.scalar_type() == at::kFloat ? f(dense.const_data_ptr<float>(), dense.size(0))
                                           : f(dense.const_data_ptr<double>(), dense.size(0));
}

// f(lane, number) for each.
template <class T, class F>
void for_each(const T* data, int64_t n, F f) {
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (int lane = 0; lane < lanes; ++lane) f(lane, data[i + lane]);
  }
  for (int lane = 0; i + lane < n; ++lane) f(lane, data[i + lane]);
}

template <class F>
double sum_of(const Tensor& numbers, F f) {
  return with_numbers(numbers, [f](const auto* data, int64_t n) {
    double sums[lanes] = {};
    for_each(data, n, [&](int lane, auto number) { sums[lane] += f(number); });
    return std::accumulate(sums, sums + lanes, 0.0);
  });
}

Tensor filled(int64_t n, double number, bool is_double) {
  Tensor result = empty(n, is_double);
  if (is_double) {
    std::fill_n(result.mutable_data_ptr<double>(), n, number);
  } else {
    std::fill_n(result.mutable_data_ptr<float>(), n, static_cast<float>(number));
  }
  return result;
}

Tensor new_key() {
  Tensor key(at::detail::empty_cpu({2}, at::kLong));
  auto* generator = at::get_generator_or_default<at::CPUGeneratorImpl>({}, at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(generator->mutex_);
  for (int i = 0; i < 2; ++i) {
    key.mutable_data_ptr<int64_t>()[i] = static_cast<int64_t>(generator->random64() & ((uint64_t{1} << 62) - 1));
  }
  return key;
}

Tensor next_draw(const Tensor& key) {
  TORCH_CHECK_VALUE(key.is_cpu() && key.sizes() == at::IntArrayRef({2}) && key.is_contiguous(),
                    "key: expected (seed, first draw) on the CPU.");
  Tensor next(at::detail::empty_cpu({2}, at::kLong));
  const int64_t* numbers = key.const_data_ptr<int64_t>();
  next.mutable_data_ptr<int64_t>()[0] = numbers[0];
  next.mutable_data_ptr<int64_t>()[1] = numbers[1] + 1;
  return next;
}

double total(const Tensor& numbers) {
  return sum_of(numbers, [](auto number) { return number; });
}

double norm_ratio(const Tensor& squares, const Tensor& other_squares) {
  const auto root = [](auto number) { return std::sqrt(number); };
  return sum_of(squares, root) / sum_of(other_squares, root);
}

std::pair<double, double> extremes(const Tensor& numbers) {
  return with_numbers(numbers, [](const auto* data, int64_t n) {
    using T = std::decay_t<decltype(*data)>;
    T least[lanes], most[lanes], zeros[lanes] = {};  // 0 times a number is NaN where that is NaN or Inf
    std::fill_n(least, lanes, std::numeric_limits<T>::infinity());
    std::fill_n(most, lanes, -std::numeric_limits<T>::infinity());
    for_each(data, n, [&](int lane, T v) {
      least[lane] = v < least[lane] ? v : least[lane];
      most[lane] = v > most[lane] ? v : most[lane];
      zeros[lane] += 0 * v;
    });
    const T zero = std::accumulate(zeros, zeros + lanes, T{0});
    return std::pair<double, double>(*std::min_element(least, least + lanes) + zero,
                                     *std::max_element(most, most + lanes) + zero);
  });
}

}  // namespace

void define_host(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("filled", &filled, py::arg("n"), py::arg("number"), py::arg("is_double"),
             "A number n times, shape (n,): float32 or float64.");
  module.def("new_key", &new_key, "Two numbers of torch's generator, as torch.randint(2**62, (2,)).");
  module.def("next_draw", &next_draw, py::arg("key"), "The key (seed, first draw) of the draw after.");
  module.def("total", &total, py::arg("numbers"), "The sum of numbers (n,), float32 or float64.");
  module.def("norm_ratio", &norm_ratio, py::arg("squares"), py::arg("other_squares"),
             "The sum of the square roots of numbers (n,), over that of others; Inf or NaN where that is 0.");
  module.def("extremes", &extremes, py::arg("numbers"),
             "The least and the largest of numbers (n,); NaN for both where there is one, or Inf.");
}

}  // namespace scoresde
