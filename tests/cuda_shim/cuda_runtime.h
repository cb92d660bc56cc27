// Enough of CUDA's runtime to run the kernels of csrc/kernels on a CPU: put this folder first on the include path and
// compile cuda.cu as C++. Every CUDA thread is a CPU thread, blocks run one after the other, barriers and shuffles wait
// as they do on a GPU. Slow, and exact.
#pragma once

#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __CUDA_ARCH__ 900  // a fused multiply-add is one
#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)
#define __shared__ static  // one block at a time
#define __syncthreads() shim::sync_threads(__LINE__)

struct dim3 {
  unsigned x, y = 1, z = 1;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t code) { return code == cudaSuccess ? "no error" : "an error"; }

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __stwb(uint4* to, uint4 value) { *to = value; }

namespace shim {

// What a test may change.
inline unsigned largest_grid = 1u << 30;  // blocks in each direction: kernels must be right for every grid
inline int skipped_barrier = 0;           // the line of a __syncthreads() that does nothing
inline bool jitter = false;               // threads dawdle now and then, so that a race is lost by someone

constexpr int threads = 256, warp_size = 32;

struct Warp {
  std::barrier<> barrier{warp_size};
  uint64_t lanes[warp_size];
};

inline Warp warps[threads / warp_size];
inline std::barrier<> block_barrier{threads};

inline int thread() { return static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); }

// Long enough for all the others to get as far as they can.
inline void dawdle() {
  thread_local uint32_t state = 12345u + thread();
  state = state * 1664525u + 1013904223u;
  if (jitter && thread() % warp_size == 0 && state >> 28 == 0)
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
}

inline void sync_threads(int line) {
  if (line != skipped_barrier) block_barrier.arrive_and_wait();
  dawdle();
}

// The threads of all blocks of all launches.
class Pool {
 public:
  static Pool& get() {
    static Pool pool;
    return pool;
  }

  // Calls work(i) on each thread i and waits for all.
  template <class Work>
  void run(const Work& work) {
    call_ = [](const void* w, int i) { (*static_cast<const Work*>(w))(i); };
    work_ = &work;
    start_.arrive_and_wait();
    finish_.arrive_and_wait();
  }

  void between_blocks() { block_end_.arrive_and_wait(); }

 private:
  Pool() {
    for (int i = 0; i < threads; ++i) {
      members_.emplace_back([this, i] {
        while (true) {
          start_.arrive_and_wait();
          if (call_ == nullptr) return;
          call_(work_, i);
          finish_.arrive_and_wait();
        }
      });
    }
  }
  ~Pool() {
    call_ = nullptr;
    start_.arrive_and_wait();
    for (std::thread& member : members_) member.join();
  }

  void (*call_)(const void*, int) = nullptr;
  const void* work_ = nullptr;
  std::barrier<> start_{threads + 1}, finish_{threads + 1}, block_end_{threads};
  std::vector<std::thread> members_;
};

}  // namespace shim

template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) __builtin_trap();
  shim::Warp& warp = shim::warps[shim::thread() / shim::warp_size];
  const int lane = shim::thread() % shim::warp_size;
  std::memcpy(&warp.lanes[lane], &value, sizeof(T));
  warp.barrier.arrive_and_wait();
  if (lane % width + delta < width) std::memcpy(&value, &warp.lanes[lane + delta], sizeof(T));
  warp.barrier.arrive_and_wait();
  shim::dawdle();
  return value;
}

template <class Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || block.x * block.y != shim::threads) {
    return cudaErrorInvalidConfiguration;
  }
  grid.x = std::min(grid.x, shim::largest_grid);
  grid.y = std::min(grid.y, shim::largest_grid);
  shim::Pool& pool = shim::Pool::get();
  pool.run([&](int i) {
    threadIdx = {i % block.x, i / block.x};
    blockDim = block;
    gridDim = grid;
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y};
        kernel(*static_cast<const Args*>(arguments[0]));
        pool.between_blocks();
      }
    }
  });
  return cudaSuccess;
}

// ---- graphs ----
// A graph is a list of what its nodes do, in an order that their dependencies allow: kernels of one thread, other
// graphs, and loops.

namespace shim {

struct Graph {
  std::vector<std::function<void()>> nodes;
  std::vector<std::unique_ptr<Graph>> bodies;  // of loops

  std::function<void()>* add(std::function<void()> node) {
    nodes.push_back(std::move(node));
    return &nodes.back();
  }
  void run() const {
    for (const auto& node : nodes) node();
  }
};

}  // namespace shim

using cudaGraph_t = shim::Graph*;
using cudaGraphExec_t = shim::Graph*;
using cudaGraphNode_t = std::function<void()>*;
using cudaGraphConditionalHandle = unsigned long long;
enum cudaGraphNodeType { cudaGraphNodeTypeConditional = 13 };
enum cudaGraphConditionalNodeType { cudaGraphCondTypeWhile = 1 };
constexpr unsigned cudaGraphCondAssignDefault = 1;
struct cudaGraphNodeParams {
  cudaGraphNodeType type;
  struct {
    cudaGraphConditionalHandle handle;
    cudaGraphConditionalNodeType type;
    unsigned size;
    cudaGraph_t* phGraph_out;
  } conditional;
};
struct cudaKernelNodeParams {
  void* func;
  dim3 gridDim, blockDim;
  void** kernelParams;
};

namespace shim {
inline unsigned condition, condition_at_launch;  // of the one loop there is
inline cudaGraph_t body;
}  // namespace shim

inline void cudaGraphSetConditional(cudaGraphConditionalHandle, unsigned value) { shim::condition = value; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned) { return *graph = new shim::Graph, cudaSuccess; }
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return delete graph, cudaSuccess; }
inline cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle, cudaGraph_t, unsigned value,
                                                    unsigned flags) {
  *handle = 1, shim::condition_at_launch = value;
  return flags == cudaGraphCondAssignDefault ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaGraphAddNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t*, const void*,
                                    size_t, cudaGraphNodeParams* params) {
  auto& loop = params->conditional;
  if (params->type != cudaGraphNodeTypeConditional || loop.type != cudaGraphCondTypeWhile || loop.size != 1) {
    return cudaErrorInvalidValue;
  }
  graph->bodies.push_back(std::make_unique<shim::Graph>());
  shim::body = graph->bodies.back().get();
  loop.phGraph_out = &shim::body;
  *node = graph->add([body = shim::body] {
    for (shim::condition = shim::condition_at_launch; shim::condition;) body->run();
  });
  return cudaSuccess;
}
inline cudaError_t cudaGraphAddChildGraphNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t*, size_t,
                                              cudaGraph_t child) {
  *node = graph->add([nodes = child->nodes] {
    for (const auto& copied : nodes) copied();
  });
  return cudaSuccess;
}
// The kernel of this file that a graph has: its arguments are copied, as a node's are.
inline cudaError_t cudaGraphAddKernelNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t*, size_t,
                                          const cudaKernelNodeParams* params) {
  auto* kernel = reinterpret_cast<void (*)(cudaGraphConditionalHandle, const int32_t*)>(params->func);
  const auto handle = *static_cast<const cudaGraphConditionalHandle*>(params->kernelParams[0]);
  const auto* flag = *static_cast<const int32_t* const*>(params->kernelParams[1]);
  if (params->gridDim.x * params->blockDim.x != 1) return cudaErrorInvalidConfiguration;
  *node = graph->add([=] { kernel(handle, flag); });
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* instance, cudaGraph_t graph, unsigned long long) {
  *instance = new shim::Graph(std::move(*graph));
  return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t instance, cudaStream_t) { return instance->run(), cudaSuccess; }
