// First and higher derivatives of the operators. In C++, because the bookkeeping of a Python function takes longer than
// the kernels of a small batch.
#include <ATen/ops/add.h>
#include <ATen/ops/mul.h>
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
    const Tensor total = sum(g[0], g[1]);
    const int64_t edge_of_z = ctx->saved_data["edge of z"].toInt();
    return {scaled(total, saved[0], ctx->needs_input_grad(0)),
            scaled(total, saved[1], saved[1].defined() && ctx->needs_input_grad(1)),
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

// Whether a gradient on the CPU is one everywhere, as .sum().backward() makes it. No for tensors that only stand for
// others, as in tracing.
bool is_all_ones(const Tensor& g) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet stand_ins({DispatchKey::Python, DispatchKey::Functionalize, DispatchKey::ZeroTensor,
                                           DispatchKey::FuncTorchBatched, DispatchKey::FuncTorchGradWrapper});
  if (!g.is_cpu() || g.key_set().has_any(stand_ins)) return false;
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
    const Tensor &kept = saved[0], &c = saved[1], &w = saved[2];
    const bool weighted = kept.scalar_type() == at::kFloat || kept.scalar_type() == at::kDouble;
    Tensor total;
    if (g[0].defined()) {
      // The usual case, all ones, needs no pass over memory: the kept gradient itself is handed on. Not where the
      // graph is kept for another backward, which what becomes of it then would disturb.
      const bool as_it_is = weighted && !get_current_graph_task_keep_graph() && is_all_ones(g[0]);
      total = as_it_is ? kept : scaled(kept, weighted ? g[0] : at::mul(g[0], w), true);
    }
    // What is kept is itself a result, with derivative 2 c^2 w (or 2 c^2).
    if (g[1].defined()) {
      const Tensor curvature = at::mul(at::mul(c, c), 2);
      total = sum(total, scaled(g[1], weighted ? at::mul(curvature, w) : curvature, true));
    }
    return {total, {}};
  }
};

// ---- the operators above autograd: recorded where an argument that has a derivative requires one ----

Tensor affine(const Tensor& x, const OptTensor& out, const Tensor& p, const OptTensor& q) {
  if (recorded({x, out})) return Affine::apply(x, out, Constants{p, q});
  static const auto op = find<signatures::affine>("affine");
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, out, p, q);
}

std::tuple<Tensor, Tensor> affine_noise(const Tensor& x, const OptTensor& out, const Tensor& p, const OptTensor& q,
                                        const Tensor& n, const OptTensor& z, const OptTensor& key, const OptTensor& ids,
                                        int64_t draw) {
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
  if (recorded({x, z})) return Perturb::apply(x, z, Constants{m, {}, s, key, ids, draw});
  static const auto op = find<signatures::perturb>("perturb");
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, m, s, z, key, ids, draw);
}

std::tuple<Tensor, Tensor> score_loss(const Tensor& out, const OptTensor& c, const OptTensor& d, const Tensor& w,
                                      const OptTensor& z, const OptTensor& key, const OptTensor& ids, int64_t draw,
                                      bool with_grad, bool total) {
  if (recorded({out})) {
    const variable_list results = ScoreLoss::apply(out, LossConstants{c, d, w, z, key, ids, draw, with_grad, total});
    return {results[0], results[1]};
  }
  static const auto op = find<signatures::score_loss>("score_loss");
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(out, c, d, w, z, key, ids, draw, with_grad, total);
}

}  // namespace

TORCH_LIBRARY_IMPL(scoresde_ext, Autograd, m) {
  m.impl("affine", &affine);
  m.impl("affine_noise", &affine_noise);
  m.impl("perturb", &perturb);
  m.impl("score_loss", &score_loss);
}

}  // namespace scoresde
