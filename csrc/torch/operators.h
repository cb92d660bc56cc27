// The C++ signatures of the operators. ops.cpp has their schemas and checks, scoresde_ext/ops.py documents each one.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace scoresde {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

namespace signatures {

using affine = Tensor(const Tensor& x, const OptTensor& out, const Tensor& p, const OptTensor& q);
using affine_noise = std::tuple<Tensor, Tensor>(const Tensor& x, const OptTensor& out, const Tensor& p,
                                                const OptTensor& q, const Tensor& n, const OptTensor& z,
                                                const OptTensor& key, const OptTensor& ids, int64_t draw);
using affine_next = Tensor(const Tensor& x, const OptTensor& out, const Tensor& p, const OptTensor& q, const Tensor& n,
                           const OptTensor& z, const OptTensor& key, const OptTensor& ids, int64_t draw);
using perturb = Tensor(const Tensor& x, const Tensor& m, const Tensor& s, const OptTensor& z, const OptTensor& key,
                       const OptTensor& ids, int64_t draw);
using perturb_keeping = std::tuple<Tensor, Tensor>(const Tensor& x, const Tensor& m, const Tensor& s, const Tensor& key,
                                                   const OptTensor& ids, int64_t draw, int64_t kept);
using score_loss = std::tuple<Tensor, Tensor>(const Tensor& out, const OptTensor& c, const OptTensor& d,
                                              const Tensor& w, const OptTensor& z, const OptTensor& key,
                                              const OptTensor& ids, int64_t draw, bool with_grad, bool total);
using combine = std::vector<Tensor>(at::TensorList arrays, const Tensor& coefficients);
using rk_stage = Tensor(const Tensor& y, at::TensorList ks, at::ArrayRef<double> a, const Tensor& h);
using rk_drift_stage = std::vector<Tensor>(const Tensor& y, at::TensorList ks, at::ArrayRef<double> a, const Tensor& h,
                                           const OptTensor& x, at::ArrayRef<double> at, const Tensor& out,
                                           const OptTensor& f, const Tensor& q, int64_t states, bool keep);
using rk_error = Tensor(const Tensor& y0, const Tensor& y1, at::TensorList ks, at::ArrayRef<double> e, const Tensor& h,
                        double rtol, double atol);
using rk_drift_error = std::tuple<Tensor, Tensor>(const Tensor& y0, const Tensor& y1, at::TensorList ks,
                                                  at::ArrayRef<double> e, const Tensor& h, const Tensor& out,
                                                  const OptTensor& f, const Tensor& q, double rtol, double atol);
using rk_control = Tensor(const Tensor& norm, const Tensor& h, const Tensor& after_rejection, double exponent);
using marginal = std::tuple<Tensor, Tensor, Tensor>(const Tensor& u, double first, double last, int64_t process,
                                                    double a, double b);
using put = void(const Tensor& into, const Tensor& values, const Tensor& chosen);
using noise_normal = Tensor(const Tensor& key, const OptTensor& ids, int64_t draw, at::IntArrayRef size);
using noise_with_squares = std::tuple<Tensor, Tensor>(const Tensor& key, const OptTensor& ids, int64_t draw,
                                                      at::IntArrayRef size);
using noise_uniform = Tensor(const Tensor& key, const OptTensor& ids, int64_t draw, at::IntArrayRef size);
using noise_integers = Tensor(const Tensor& key, const OptTensor& ids, int64_t draw, at::IntArrayRef size,
                              int64_t high);

}  // namespace signatures

// Whether a tensor's numbers are what its memory on the CPU holds: no for tensors that are negated when they are read,
// stand for others (tracing, transforms), or are not strided. Where torch's dispatcher calls an operator it has seen to
// that; code above the dispatcher has to ask.
inline bool is_plain(const Tensor& t) {
  constexpr c10::DispatchKeySet usual({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                       c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU});
  return usual.has_all(t.key_set());
}

// An operator by its name, to be called through torch's dispatcher.
template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("scoresde_ext::") + name).c_str(), "")
      .template typed<Signature>();
}

}  // namespace scoresde
