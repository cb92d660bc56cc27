// First and higher derivatives of the operators. In C++, because the bookkeeping of a Python function takes longer than
// the kernels of a small batch.
#include <ATen/ops/add.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <algorithm>

#include "torch/operators.h"

namespace scoresde {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::get_current_graph_task_keep_graph;
using torch::autograd::variable_list;

// Arguments that have no derivative, kept out of sight of the graph.
struct Constants {
  OptTensor p, q, n, key, ids;
  int64_t draw = 0;
};
struct LossConstants {
  OptTensor c, d;
  Tensor w;
  OptTensor z, key, ids;
  int64_t draw;
  bool with_grad, total;
};

Tensor value(const OptTensor& t) { return t.value_or(Tensor()); }

bool recorded(std::initializer_list<OptTensor> arguments) {
  return at::GradMode::is_enabled() &&
         std::any_of(arguments.begin(), arguments.end(), [](const OptTensor& t) { return t && t->requires_grad(); });
}

// Refuses tangents, which would be lost: forward mode is scoresde_ext.ops' business.
void check_no_tangents(const char* name, std::initializer_list<OptTensor> arguments) {
  for (const OptTensor& t : arguments) {
    TORCH_CHECK_NOT_IMPLEMENTED(!t || !t->_fw_grad(/*level=*/0).defined(), "torch.ops.scoresde_ext.", name,
                                " has no forward-mode derivative. Call scoresde_ext.ops.", name, ", which has one.");
  }
}

// c g, which can be differentiated again; undefined where there is no gradient g or none is asked for.
Tensor scaled(const Tensor& g, const Tensor& c, bool wanted) {
  if (!wanted || !g.defined() || !c.defined()) return {};
  if (at::GradMode::is_enabled() && c.requires_grad()) {  // the operator has no derivative with respect to coefficients
    std::vector<int64_t> shape(g.dim(), 1);
    shape[0] = c.numel();
    return at::mul(c.reshape(shape), g).to(g.scalar_type());
  }
  static const auto op = find<signatures::affine>("affine");
  return op.call(g, {}, c, {});
}

Tensor sum(const Tensor& a, const Tensor& b) { return !a.defined() ? b : !b.defined() ? a : at::add(a, b); }

// c (a + b), of gradients that may be undefined; rounded once.
Tensor scaled_sum(const Tensor& a, const Tensor& b, const Tensor& c, bool wanted) {
  if (!wanted || !a.defined() || !b.defined() || !c.defined() || c.requires_grad()) {
    return sum(scaled(a, c, wanted), scaled(b, c, wanted));
  }
  static const auto op = find<signatures::affine>("affine");
  return op.call(a, b, c, c);
}

struct Affine : Function<Affine> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptTensor& out, const Constants& c) {
    static const auto op = find<signatures::affine>("affine");
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({value(c.p), value(c.q)});
    return op.call(x, out, *c.p, c.q);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& g) {
    const variable_list saved = ctx->get_saved_variables();
    return {scaled(g[0], saved[0], ctx->needs_input_grad(0)),
            scaled(g[0], saved[1], saved[1].defined() && ctx->needs_input_grad(1)),
            {}};
  }
};

struct AffineNoise : Function<AffineNoise> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptTensor& out, const OptTensor& z,
                               const Constants& c) {
    static const auto op = find<signatures::affine_noise>("affine_noise");
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({value(c.p), value(c.q), *c.n});
    // Only arguments that are there have an edge in the graph.
    ctx->saved_data["edge of z"] = z ? (out ? 2 : 1) : -1;
    ctx->set_materialize_grads(false);
    const auto [mean, next] = op.call(x, out, *c.p, c.q, *c.n, z, c.key, c.ids, c.draw);
    return {mean, next};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& g) {
    const variable_list saved = ctx->get_saved_variables();
    const int64_t edge_of_z = ctx->saved_data["edge of z"].toInt();
    return {scaled_sum(g[0], g[1], saved[0], ctx->needs_input_grad(0)),
            scaled_sum(g[0], g[1], saved[1], saved[1].defined() && ctx->needs_input_grad(1)),
            scaled(g[1], saved[2], edge_of_z >= 0 && ctx->needs_input_grad(edge_of_z)),
            {}};
  }
};

struct Perturb : Function<Perturb> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptTensor& z, const Constants& c) {
    static const auto op = find<signatures::perturb>("perturb");
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({*c.p, *c.n});
    ctx->saved_data["with_z"] = z.has_value();
    return op.call(x, *c.p, *c.n, z, c.key, c.ids, c.draw);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& g) {
    const variable_list saved = ctx->get_saved_variables();
    return {scaled(g[0], saved[0], ctx->needs_input_grad(0)),
            scaled(g[0], saved[1], ctx->saved_data["with_z"].toBool() && ctx->needs_input_grad(1)),
            {}};
  }
};

// Whether a gradient on the CPU is one everywhere, as .sum().backward() makes it.
bool is_all_ones(const Tensor& g) {
  if (!is_plain(g)) return false;
  const auto ones = [&](auto* data) {
    const int64_t stride = g.dim() == 0 ? 0 : g.stride(0);
    const int64_t distinct = stride == 0 ? std::min<int64_t>(g.numel(), 1) : g.numel();
    for (int64_t i = 0; i < distinct; ++i) {
      if (data[i * stride] != 1) return false;
    }
    return true;
  };
  return g.scalar_type() == at::kDouble ? ones(g.const_data_ptr<double>()) : ones(g.const_data_ptr<float>());
}

struct ScoreLoss : Function<ScoreLoss> {
  static variable_list forward(AutogradContext* ctx, const Tensor& out, const LossConstants& k) {
    static const auto op = find<signatures::score_loss>("score_loss");
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [loss, grad] = op.call(out, k.c, k.d, k.w, k.z, k.key, k.ids, k.draw, k.with_grad, k.total);
    ctx->save_for_backward({grad, value(k.c), k.w});
    ctx->saved_data["with_grad"] = k.with_grad;
    ctx->set_materialize_grads(false);
    return {loss, grad};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& g) {
    TORCH_CHECK(ctx->saved_data["with_grad"].toBool(),
                "score_loss: no gradient was kept. Call it with with_grad=True where out requires a gradient.");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& kept = saved[0];
    // Products of coefficients would overflow in half precision, under a loss scale for example.
    const auto coefficient = [&](const Tensor& v) {
      return v.to(kept.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
    };
    const bool weighted = kept.scalar_type() == at::kFloat || kept.scalar_type() == at::kDouble;
    Tensor total;
    if (g[0].defined()) {
      // The usual case, all ones, needs no pass over memory: the kept gradient itself is handed on. Not where the
      // graph is kept for another backward, which what becomes of it then would disturb.
      const bool as_it_is = weighted && !get_current_graph_task_keep_graph() && is_all_ones(g[0]);
      total = as_it_is ? kept : scaled(kept, weighted ? g[0] : at::mul(g[0], coefficient(saved[2])), true);
    }
    // What is kept is itself a result, with derivative 2 c^2 w (or 2 c^2).
    if (g[1].defined()) {
      const Tensor c = coefficient(saved[1]), curvature = at::mul(at::mul(c, c), 2);
      total = sum(total, scaled(g[1], weighted ? at::mul(curvature, coefficient(saved[2])) : curvature, true));
    }
    return {total, {}};
  }
};

// ---- the operators above autograd: recorded where an argument that has a derivative requires one ----

Tensor affine(const Tensor& x, const OptTensor& out, const Tensor& p, const OptTensor& q) {
  check_no_tangents("affine", {x, out, p, q});
  if (recorded({x, out})) return Affine::apply(x, out, Constants{p, q});
  static const auto op = find<signatures::affine>("affine");
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, out, p, q);
}

std::tuple<Tensor, Tensor> affine_noise(const Tensor& x, const OptTensor& out, const Tensor& p, const OptTensor& q,
                                        const Tensor& n, const OptTensor& z, const OptTensor& key, const OptTensor& ids,
                                        int64_t draw) {
  check_no_tangents("affine_noise", {x, out, p, q, n, z});
  if (recorded({x, out, z})) {
    const variable_list results = AffineNoise::apply(x, out, z, Constants{p, q, n, key, ids, draw});
    return {results[0], results[1]};
  }
  static const auto op = find<signatures::affine_noise>("affine_noise");
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, out, p, q, n, z, key, ids, draw);
}

Tensor perturb(const Tensor& x, const Tensor& m, const Tensor& s, const OptTensor& z, const OptTensor& key,
               const OptTensor& ids, int64_t draw) {
  check_no_tangents("perturb", {x, m, s, z});
  if (recorded({x, z})) return Perturb::apply(x, z, Constants{m, {}, s, key, ids, draw});
  static const auto op = find<signatures::perturb>("perturb");
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, m, s, z, key, ids, draw);
}

std::tuple<Tensor, Tensor> score_loss(const Tensor& out, const OptTensor& c, const OptTensor& d, const Tensor& w,
                                      const OptTensor& z, const OptTensor& key, const OptTensor& ids, int64_t draw,
                                      bool with_grad, bool total) {
  check_no_tangents("score_loss", {out, c, d, w, z});
  if (recorded({out})) {
    const variable_list results = ScoreLoss::apply(out, LossConstants{c, d, w, z, key, ids, draw, with_grad, total});
    return {results[0], results[1]};
  }
  static const auto op = find<signatures::score_loss>("score_loss");
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(out, c, d, w, z, key, ids, draw, with_grad, total);
}

void put(const Tensor& into, const Tensor& values, const Tensor& chosen) {
  check_no_tangents("put", {into, values});
  TORCH_CHECK_NOT_IMPLEMENTED(!recorded({into, values}),
                              "torch.ops.scoresde_ext.put is not implemented for arrays that "
                              "require gradients. Call scoresde_ext.ops.put, which has a derivative.");
  static const auto op = find<signatures::put>("put");
  const at::AutoDispatchBelowADInplaceOrView below;
  op.call(into, values, chosen);
}

}  // namespace

TORCH_LIBRARY_IMPL(scoresde_ext, Autograd, m) {
  m.impl("affine", &affine);
  m.impl("affine_noise", &affine_noise);
  m.impl("perturb", &perturb);
  m.impl("score_loss", &score_loss);
  m.impl("put", &put);
  // Without derivatives: scoresde_ext.ops answers by plain torch where one is asked for. Called past it they refuse,
  // where torch would warn or keep silent.
  for (const char* name : {"affine_next", "perturb_keeping", "combine", "rk_stage", "rk_drift_stage", "rk_error",
                           "rk_drift_error", "rk_control", "marginal"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace scoresde
