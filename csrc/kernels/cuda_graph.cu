// Loops on the device: a graph of one WHILE node. Its body is a captured step, and a kernel that reads whether to go
// on.
#include <cuda_runtime.h>

#include "kernels/kernels.h"

namespace scoresde {
namespace {

#if CUDART_VERSION >= 12040

__global__ void __launch_bounds__(1) condition_kernel(cudaGraphConditionalHandle handle, const int32_t* flag) {
  cudaGraphSetConditional(handle, *flag != 0 ? 1 : 0);
}

// Adds the WHILE node and its body to an empty graph.
cudaError_t add_loop(cudaGraph_t whole, cudaGraph_t step, const int32_t* flag) {
  cudaGraphConditionalHandle handle;
  cudaError_t error = cudaGraphConditionalHandleCreate(&handle, whole, 1, cudaGraphCondAssignDefault);
  if (error != cudaSuccess) return error;
  cudaGraphNodeParams loop = {};
  loop.type = cudaGraphNodeTypeConditional;
  loop.conditional.handle = handle;
  loop.conditional.type = cudaGraphCondTypeWhile;
  loop.conditional.size = 1;
  cudaGraphNode_t node;
#if CUDART_VERSION >= 13000
  error = cudaGraphAddNode(&node, whole, nullptr, nullptr, 0, &loop);
#else
  error = cudaGraphAddNode(&node, whole, nullptr, 0, &loop);
#endif
  if (error != cudaSuccess) return error;
  const cudaGraph_t body = loop.conditional.phGraph_out[0];
  cudaGraphNode_t stepping;
  error = cudaGraphAddChildGraphNode(&stepping, body, nullptr, 0, step);
  if (error != cudaSuccess) return error;
  void* arguments[] = {&handle, &flag};
  cudaKernelNodeParams condition = {};
  condition.func = reinterpret_cast<void*>(condition_kernel);
  condition.gridDim = condition.blockDim = dim3(1);
  condition.kernelParams = arguments;
  return cudaGraphAddKernelNode(&node, body, &stepping, 1, &condition);
}

#endif

}  // namespace

int cuda_loop_create(void* step, const int32_t* flag, void** loop) {
#if CUDART_VERSION >= 12040
  cudaGraph_t whole;
  cudaError_t error = cudaGraphCreate(&whole, 0);
  if (error != cudaSuccess) return error;
  error = add_loop(whole, static_cast<cudaGraph_t>(step), flag);
  cudaGraphExec_t instance = nullptr;
  if (error == cudaSuccess) error = cudaGraphInstantiate(&instance, whole, 0);
  cudaGraphDestroy(whole);
  *loop = instance;
  return error;
#else
  return cudaErrorNotSupported;
#endif
}

int cuda_loop_launch(void* loop, void* stream) {
  return cudaGraphLaunch(static_cast<cudaGraphExec_t>(loop), static_cast<cudaStream_t>(stream));
}

int cuda_loop_destroy(void* loop) { return cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(loop)); }

int cuda_versions(int* library, int* driver) {
  *library = CUDART_VERSION;
  return cudaDriverGetVersion(driver);
}

}  // namespace scoresde
