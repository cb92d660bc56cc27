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

#include "torch/python.h"

namespace scoresde {
namespace {

using at::Tensor;

// The numbers of a tensor (n,) on the CPU, in double precision, to f.
template <class F>
void for_each(const Tensor& numbers, F f) {
  TORCH_CHECK_VALUE(numbers.is_cpu() && numbers.dim() == 1, "numbers: expected shape (n,) on the CPU.");
  const auto visit = [&](const auto* data) {
    for (int64_t i = 0; i < numbers.size(0); ++i) f(static_cast<double>(data[i * numbers.stride(0)]));
  };
  if (numbers.scalar_type() == at::kFloat) {
    visit(numbers.const_data_ptr<float>());
  } else {
    visit(numbers.const_data_ptr<double>());
  }
}

Tensor filled(int64_t n, double number, bool is_double) {
  Tensor result(at::detail::empty_cpu({n}, is_double ? at::kDouble : at::kFloat));
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
  double sum = 0;
  for_each(numbers, [&](double v) { sum += v; });
  return sum;
}

double norm_ratio(const Tensor& squares, const Tensor& other_squares) {
  double sum = 0, other_sum = 0;
  for_each(squares, [&](double v) { sum += std::sqrt(v); });
  for_each(other_squares, [&](double v) { other_sum += std::sqrt(v); });
  return sum / other_sum;
}

std::pair<double, double> extremes(const Tensor& numbers) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  double least = infinity, most = -infinity;
  bool nan = false;
  for_each(numbers, [&](double v) {
    least = std::min(least, v);
    most = std::max(most, v);
    nan |= std::isnan(v);
  });
  return nan ? std::pair(std::nan(""), std::nan("")) : std::pair(least, most);
}

}  // namespace

void define_host(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("filled", &filled, py::arg("n"), py::arg("number"), py::arg("is_double"),
             "A number n times, shape (n,): float32 or float64.");
  module.def("new_key", &new_key, "Two numbers of torch's generator, as torch.randint(2**62, (2,)).");
  module.def("next_draw", &next_draw, py::arg("key"), "The key (seed, first draw) of the draw after.");
  module.def("total", &total, py::arg("numbers"), "The sum of numbers (n,), float32 or float64, one after the other.");
  module.def("norm_ratio", &norm_ratio, py::arg("squares"), py::arg("other_squares"),
             "The mean of the square roots of numbers (n,), over that of others; Inf or NaN where that is 0.");
  module.def("extremes", &extremes, py::arg("numbers"),
             "The least and the largest of numbers (n,); NaN for both where there is one.");
}

}  // namespace scoresde
