// The Python module scoresde_ext._C: what is not a tensor operation. Loading it also registers the operations of
// ops.cpp. Light headers only: torch/extension.h would make this file take half a minute.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels/kernels.h"
#include "torch/python.h"

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

// The operator rk_control for a single decision, which would take less time than its tensors.
std::pair<bool, double> control_step(double norm, double h, bool after_rejection, double exponent) {
  double accepted, h_next;
  scoresde::control_steps({1, &norm, &h, &after_rejection, exponent, &accepted, &h_next});
  return {accepted != 0, h_next};
}

#ifdef SCORESDE_EXT_WITH_CUDA
void check(int code, const char* what) {
  if (code != 0) throw std::runtime_error(std::string("CUDA could not ") + what + ": " + scoresde::cuda_error(code));
}

// Owns a loop on the device. Handles and addresses come as the integers that torch gives them out as.
class DeviceLoop {
 public:
  DeviceLoop(uintptr_t step, uintptr_t flag) {
    check(scoresde::cuda_loop_create(reinterpret_cast<void*>(step), reinterpret_cast<const int32_t*>(flag), &loop_),
          "make a loop of the captured step");
  }
  DeviceLoop(const DeviceLoop&) = delete;
  DeviceLoop& operator=(const DeviceLoop&) = delete;
  ~DeviceLoop() { scoresde::cuda_loop_destroy(loop_); }

  void launch(uintptr_t stream) const {
    check(scoresde::cuda_loop_launch(loop_, reinterpret_cast<void*>(stream)), "launch the loop");
  }

 private:
  void* loop_ = nullptr;
};

// Why there can be no loops on the device; empty where there can.
std::string loops_missing() {
  const auto name = [](int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  };
  int library = 0, driver = 0;
  check(scoresde::cuda_versions(&library, &driver), "tell its version");
  if (library < scoresde::cuda_loop_version) return "this build is of CUDA " + name(library) + ", 12.4 is needed";
  if (driver < scoresde::cuda_loop_version) return "the driver is of CUDA " + name(driver) + ", 12.4 is needed";
  return "";
}
#endif

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("build_info", &build_info,
             "How this module was built (compiler, torch, cuda: None or nvcc and archs, cpu_capabilities) and the "
             "instruction set its CPU kernels use on this machine (cpu_capability).");
  module.def("control_step", &control_step, py::arg("norm"), py::arg("h"), py::arg("after_rejection"),
             py::arg("exponent"), "ops.rk_control for numbers: whether the step is accepted, and the next h.");
  py::module_ calls = module.def_submodule("calls", "The operators, as functions.");
  scoresde::define_calls(calls);
  py::module_ host = module.def_submodule("host", "Small operations between operators, on the CPU.");
  scoresde::define_host(host);
#ifdef SCORESDE_EXT_WITH_CUDA
  py::class_<DeviceLoop>(module, "DeviceLoop", "A captured step that the device repeats while a flag is not 0.")
      .def(py::init<uintptr_t, uintptr_t>(), py::arg("step"), py::arg("flag"))
      .def("launch", &DeviceLoop::launch, py::arg("stream"));
  module.def("loops_missing", &loops_missing, "Why there can be no DeviceLoop here; empty where there can.");
#endif
}
