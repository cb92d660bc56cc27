// The Python module scoresde_ext._C: what is not a tensor operation. Loading it also registers the operations of
// ops.cpp. Light headers only: torch/extension.h would make this file take half a minute.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "kernels/kernels.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* compiler = "gcc " __VERSION__;
#else
constexpr const char* compiler = "unknown";
#endif

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler;
  info["torch"] = TORCH_VERSION;
  info["cuda"] = py::none();
#ifdef SCORESDE_EXT_WITH_CUDA
  py::dict cuda;
  cuda["nvcc"] = SCORESDE_EXT_NVCC;
  cuda["archs"] = SCORESDE_EXT_CUDA_ARCHS;
  info["cuda"] = cuda;
#endif
  py::list capabilities;
  capabilities.append("generic");
#if defined(__x86_64__)
  capabilities.append("avx2");
  capabilities.append("avx512");
#endif
  info["cpu_capabilities"] = capabilities;
  info["cpu_capability"] = scoresde::cpu_capability();
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("build_info", &build_info,
             "How this module was built (compiler, torch, cuda: None or nvcc and archs, cpu_capabilities) and the "
             "instruction set its CPU kernels use on this machine (cpu_capability).");
}
