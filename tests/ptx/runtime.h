// What the driver needs of the runtime: its machine, and graphs.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "machine.h"

namespace ptx {

Machine& machine();

// Runs a kernel and returns an error code. What a faulty kernel did is then in fault().
int launch(const std::string& name, Size grid, Size block, void** arguments);
std::string& fault();

// A cudaGraph_t or a cudaGraphExec_t: what its nodes do. A node returns an error code.
struct Graph {
  struct Node {
    std::function<int()> work;
    std::vector<const Node*> after;
  };
  std::vector<std::shared_ptr<Node>> nodes;

  Node* add(std::function<int()> work, std::vector<const Node*> after = {});
  // In an order that the dependencies allow, the last nodes first: an order that nobody asked for is not kept.
  int run() const;
};

}  // namespace ptx
