// Calls from Python straight to torch's dispatcher. torch.ops makes a list of boxed values of the arguments and looks
// the operator up by them, which takes longer than the kernels of a small batch; traced programs need it all the same.
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "torch/operators.h"
#include "torch/python.h"

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

template <class T>
struct Type {};

// `Guard`: what is in force during a call.
template <class Guard, class Result, class... Arguments>
void define(pybind11::module_& module, const char* name, Type<Result(Arguments...)>) {
  module.def(
      name,
      [op = find<Result(Arguments...)>(name)](const typename Kept<Arguments>::type&... arguments) {
        [[maybe_unused]] const Guard guard;
        return op.call(arguments...);
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace

void define_calls(pybind11::module_& module) {
#define SCORESDE_DEFINE(name) define<Nothing>(module, #name, Type<signatures::name>{})
  SCORESDE_DEFINE(affine);
  SCORESDE_DEFINE(affine_noise);
  SCORESDE_DEFINE(perturb);
  SCORESDE_DEFINE(score_loss);
#undef SCORESDE_DEFINE
  // These have no derivative, and are called where none is asked for. For such operators torch has a general answer
  // that makes boxed values of the arguments again.
#define SCORESDE_DEFINE(name) define<at::AutoDispatchBelowADInplaceOrView>(module, #name, Type<signatures::name>{})
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
}

}  // namespace scoresde
