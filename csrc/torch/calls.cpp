// Calls from Python straight to torch's dispatcher. torch.ops makes a list of boxed values of the arguments and looks
// the operator up by them, which takes longer than the kernels of a small batch; traced programs need it all the same.
#include "torch/calls.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <mutex>
#include <numeric>

#include "torch/operators.h"

namespace scoresde {

// A tensor; or a number, which stands for a tensor of one element.
struct Argument {
  Tensor tensor;
  operator const Tensor&() const { return tensor; }
};

}  // namespace scoresde

template <>
struct pybind11::detail::type_caster<scoresde::Argument> {
  PYBIND11_TYPE_CASTER(scoresde::Argument, const_name("torch.Tensor | float"));

  bool load(handle source, bool) {
    if (THPVariable_Check(source.ptr())) {
      value.tensor = THPVariable_Unpack(source.ptr());
      return true;
    }
    if (!PyFloat_Check(source.ptr()) && !PyLong_Check(source.ptr())) return false;
    value.tensor = at::detail::empty_cpu({1}, at::kDouble);
    *value.tensor.mutable_data_ptr<double>() = source.cast<double>();
    return true;
  }
};

namespace scoresde {
namespace {

// What an argument from Python is kept in for the length of a call.
template <class T>
struct Kept {
  using type = std::decay_t<T>;
};
template <>
struct Kept<const Tensor&> {
  using type = Argument;
};
template <>
struct Kept<const OptTensor&> {
  using type = std::optional<Argument>;
};
template <class T>
struct Kept<at::ArrayRef<T>> {
  using type = std::vector<T>;
};

struct Nothing {};

// `Guard`: what is in force during a call.
template <class Guard, class Result, class... Arguments>
void define(pybind11::module_& module, const char* name, std::type_identity<Result(Arguments...)>) {
  module.def(
      name,
      [op = find<Result(Arguments...)>(name)](const typename Kept<Arguments>::type&... arguments) {
        [[maybe_unused]] const Guard guard;
        return op.call(arguments...);
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

// What the loops of solvers need between two kernels. torch's own operations take longer for it than the kernels: in a
// program that does much else, code that is not in the cache.

// (n,) times the number, on the CPU.
Tensor filled(int64_t n, double number, bool is_double) {
  Tensor result(at::detail::empty_cpu({n}, is_double ? at::kDouble : at::kFloat));
  if (is_double) {
    std::fill_n(result.mutable_data_ptr<double>(), n, number);
  } else {
    std::fill_n(result.mutable_data_ptr<float>(), n, static_cast<float>(number));
  }
  return result;
}

// torch.randint(2**62, (2,)): the same numbers of torch's generator.
Tensor new_key() {
  Tensor key(at::detail::empty_cpu({2}, at::kLong));
  auto* generator = at::get_generator_or_default<at::CPUGeneratorImpl>({}, at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(generator->mutex_);
  for (int i = 0; i < 2; ++i) {
    key.mutable_data_ptr<int64_t>()[i] = static_cast<int64_t>(generator->random64() & ((uint64_t{1} << 62) - 1));
  }
  return key;
}

// The sum of float64 numbers on the CPU, one after the other.
double total(const Tensor& numbers) {
  TORCH_CHECK_VALUE(numbers.is_cpu() && numbers.is_contiguous(), "numbers: expected a contiguous tensor on the CPU.");
  const double* first = numbers.const_data_ptr<double>();
  return std::accumulate(first, first + numbers.numel(), 0.0);
}

}  // namespace

void define_calls(pybind11::module_& module) {
#define SCORESDE_DEFINE(name) define<Nothing>(module, #name, std::type_identity<signatures::name>{})
  SCORESDE_DEFINE(affine);
  SCORESDE_DEFINE(affine_noise);
  SCORESDE_DEFINE(perturb);
  SCORESDE_DEFINE(score_loss);
#undef SCORESDE_DEFINE
  // These have no derivative, and are called where none is asked for. For such operators torch has a general answer
  // that makes boxed values of the arguments again.
#define SCORESDE_DEFINE(name) \
  define<at::AutoDispatchBelowADInplaceOrView>(module, #name, std::type_identity<signatures::name>{})
  SCORESDE_DEFINE(affine_next);
  SCORESDE_DEFINE(perturb_keeping);
  SCORESDE_DEFINE(combine);
  SCORESDE_DEFINE(rk_stage);
  SCORESDE_DEFINE(rk_drift_stage);
  SCORESDE_DEFINE(rk_error);
  SCORESDE_DEFINE(rk_drift_error);
  SCORESDE_DEFINE(rk_control);
  SCORESDE_DEFINE(marginal);
  SCORESDE_DEFINE(put);
  SCORESDE_DEFINE(noise_normal);
  SCORESDE_DEFINE(noise_with_squares);
  SCORESDE_DEFINE(noise_uniform);
  SCORESDE_DEFINE(noise_integers);
#undef SCORESDE_DEFINE
  module.def("filled", &filled, pybind11::arg("n"), pybind11::arg("number"), pybind11::arg("is_double"),
             "A number n times, shape (n,): float32 or float64, on the CPU.");
  module.def("new_key", &new_key, "Two numbers of torch's generator on the CPU, as torch.randint(2**62, (2,)).");
  module.def("total", &total, pybind11::arg("numbers"), "The sum of a contiguous float64 tensor on the CPU.");
}

}  // namespace scoresde
