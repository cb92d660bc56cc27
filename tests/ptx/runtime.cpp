// As much of CUDA's runtime as nvcc's host objects of csrc/kernels call, on the machine.
#include "runtime.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <deque>
#include <map>

namespace ptx {

Machine& machine() {
  static Machine machine;
  return machine;
}

std::string& fault() {
  static std::string fault;
  return fault;
}

// ---- graphs ----

Graph::Node* Graph::add(std::function<int()> work, std::vector<const Node*> after) {
  nodes.push_back(std::make_shared<Node>(Node{std::move(work), std::move(after)}));
  return nodes.back().get();
}

int Graph::run() const {
  std::vector<std::shared_ptr<Node>> left(nodes.rbegin(), nodes.rend());
  const auto is_ready = [&](const std::shared_ptr<Node>& node) {
    return std::none_of(left.begin(), left.end(), [&](const std::shared_ptr<Node>& other) {
      return std::count(node->after.begin(), node->after.end(), other.get()) > 0;
    });
  };
  while (!left.empty()) {
    const auto next = std::find_if(left.begin(), left.end(), is_ready);
    if (next == left.end()) return cudaErrorInvalidValue;
    if (const int error = (*next)->work()) return error;
    left.erase(next);
  }
  return cudaSuccess;
}

namespace {

std::map<const void*, std::string>& kernel_names() {
  static std::map<const void*, std::string> names;
  return names;
}

// Of the conditional handles, which count from 1: the value that a launch begins with, and the one of now.
struct Condition {
  unsigned at_launch, now;
};
std::deque<Condition>& conditions() {
  static std::deque<Condition> conditions;
  return conditions;
}

Graph* graph_of(cudaGraph_t graph) { return reinterpret_cast<Graph*>(graph); }

cudaGraphNode_t add_node(cudaGraph_t graph, std::function<int()> work, const cudaGraphNode_t* after, size_t n) {
  const auto* nodes = reinterpret_cast<const Graph::Node* const*>(after);
  return reinterpret_cast<cudaGraphNode_t>(graph_of(graph)->add(std::move(work), {nodes, nodes + n}));
}

cudaError_t launch_registered(const void* kernel, dim3 grid, dim3 block, void** arguments) {
  const auto name = kernel_names().find(kernel);
  if (name == kernel_names().end()) return cudaErrorInvalidDeviceFunction;
  return static_cast<cudaError_t>(
      ptx::launch(name->second, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, arguments));
}

}  // namespace

int launch(const std::string& name, Size grid, Size block, void** arguments) {
  const auto found = machine().program.functions.find(name);
  if (found == machine().program.functions.end()) return cudaErrorInvalidDeviceFunction;
  const Function& kernel = *found->second;
  if (grid.count() == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || block.count() == 0 ||
      block.count() > kernel.most_threads) {
    return cudaErrorInvalidConfiguration;
  }
  try {
    machine().launch(kernel, grid, block, arguments);
  } catch (const Fault& found_fault) {
    fault() = found_fault.what();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

void set_conditional(uint64_t handle, uint32_t value) {
  if (handle - 1 >= conditions().size()) throw Fault("sets a condition that does not exist");
  conditions()[handle - 1].now = value;
}

}  // namespace ptx

using namespace ptx;

extern "C" {

// ---- what nvcc's host code calls by itself ----

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernel_names()[host] = name;
}
unsigned __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return 1; }  // of <<<>>>, which nobody uses
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  return launch_registered(kernel, grid, block, arguments);
}

// ---- what csrc/kernels calls ----

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  return launch_registered(kernel, grid, block, arguments);
}
const char* cudaGetErrorString(cudaError_t) { return "an error"; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned) {
  *graph = reinterpret_cast<cudaGraph_t>(new Graph);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph_of(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle, cudaGraph_t, unsigned value,
                                             unsigned flags) {
  if (flags != cudaGraphCondAssignDefault) return cudaErrorInvalidValue;
  conditions().push_back({value, value});
  *handle = conditions().size();
  return cudaSuccess;
}
#if CUDART_VERSION >= 13000
cudaError_t cudaGraphAddNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after,
                             const cudaGraphEdgeData*, size_t n, cudaGraphNodeParams* parameters) {
#else
cudaError_t cudaGraphAddNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after, size_t n,
                             cudaGraphNodeParams* parameters) {
#endif
  auto& loop = parameters->conditional;
  if (parameters->type != cudaGraphNodeTypeConditional || loop.type != cudaGraphCondTypeWhile || loop.size != 1 ||
      loop.handle - 1 >= conditions().size()) {
    return cudaErrorInvalidValue;
  }
  // The node owns the body and the array of bodies, as CUDA's does.
  const auto body = std::make_shared<Graph>();
  const auto bodies = std::make_shared<cudaGraph_t>(reinterpret_cast<cudaGraph_t>(body.get()));
  loop.phGraph_out = bodies.get();
  Condition& condition = conditions()[loop.handle - 1];
  const auto run = [body, bodies, &condition]() -> int {
    condition.now = condition.at_launch;
    while (condition.now != 0) {
      if (const int error = body->run()) return error;
    }
    return cudaSuccess;
  };
  *node = add_node(graph, run, after, n);
  return cudaSuccess;
}
cudaError_t cudaGraphAddChildGraphNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after, size_t n,
                                       cudaGraph_t child) {
  *node = add_node(graph, [copy = *graph_of(child)] { return copy.run(); }, after, n);
  return cudaSuccess;
}
cudaError_t cudaGraphAddKernelNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after, size_t n,
                                   const cudaKernelNodeParams* parameters) {
  const auto name = kernel_names().find(parameters->func);
  if (name == kernel_names().end()) return cudaErrorInvalidDeviceFunction;
  // The node has the arguments as they are now.
  std::vector<std::vector<char>> copies;
  for (const Parameter& parameter : machine().program.functions.at(name->second)->parameters) {
    const char* value = static_cast<const char*>(parameters->kernelParams[copies.size()]);
    copies.emplace_back(value, value + parameter.bytes);
  }
  const auto run = [given = *parameters, copies]() mutable -> int {
    std::vector<void*> arguments;
    for (auto& copy : copies) arguments.push_back(copy.data());
    return launch_registered(given.func, given.gridDim, given.blockDim, arguments.data());
  };
  *node = add_node(graph, run, after, n);
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* instance, cudaGraph_t graph, unsigned long long) {
  *instance = reinterpret_cast<cudaGraphExec_t>(new Graph(*graph_of(graph)));
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t instance) {
  delete reinterpret_cast<Graph*>(instance);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t instance, cudaStream_t) {
  return static_cast<cudaError_t>(reinterpret_cast<Graph*>(instance)->run());
}

}  // extern "C"
