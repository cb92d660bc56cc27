// The loops for any processor the compiler targets, and the choice among the compiled sets.
#define SCORESDE_ISA generic
#include <cstdlib>

#include "kernels/cpu_loops.h"

namespace scoresde {

#if defined(__x86_64__)
namespace avx2 {
const CpuKernels& table();
}
namespace avx512 {
const CpuKernels& table();
}
#endif

namespace {

const CpuKernels& choose() {
#if defined(__x86_64__)
  const char* asked = std::getenv("SCORESDE_EXT_CPU");
  const int limit = asked == nullptr                     ? 2
                    : std::strcmp(asked, "generic") == 0 ? 0
                    : std::strcmp(asked, "avx2") == 0    ? 1
                                                         : 2;
  if (limit >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return avx512::table();
  }
  if (limit >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::table();
#endif
  return generic::kernels("generic");
}

}  // namespace

void control_steps(const ControlArgs& args) {
  for (int64_t r = 0; r < args.rows; ++r) {
    const generic::StepDecision decision =
        generic::control_step(args.norm[r], args.h[r], args.after_rejection[r], args.exponent);
    args.accepted[r] = decision.accept ? 1.0 : 0.0;
    args.h_next[r] = decision.h;
  }
}

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = choose();
  return chosen;
}

const char* cpu_capability() { return cpu_kernels().capability; }

}  // namespace scoresde
