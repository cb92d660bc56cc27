// Runs the CUDA kernels in the shim on what standard input says, and writes what they gave to standard output.
//
// Input is a sequence of calls, each some of the following lines and a "run":
//   number NAME VALUE          a field of the kernel's arguments
//   array NAME BYTES SHIFT     an array to read: its bytes follow; it is placed SHIFT bytes off an aligned address
//   result NAME BYTES SHIFT    an array to write
//   shim NAME VALUE            a setting of the shim
//   run KERNEL                 calls it; the answer is one line with the error code, then the bytes of all results
// Every array has memory of its own that ends where it ends, so that an address sanitizer sees each access beyond.
#include <cstdio>
#include <iostream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

#include "kernels/cuda.cu"
#include "kernels/cuda_graph.cu"

namespace {

using namespace scoresde;

class Call {
 public:
  void set_number(const std::string& name, const std::string& value) { numbers_[name] = value; }

  char* add_array(const std::string& name, size_t bytes, size_t shift) {
    Memory& memory = arrays_[name] = {std::make_unique<char[]>(bytes + shift), shift};
    return memory.start.get() + shift;
  }

  int64_t integer(const std::string& name) const { return std::stoll(numbers_.at(name)); }
  int64_t integer_or_0(const std::string& name) const { return numbers_.count(name) ? integer(name) : 0; }
  double real(const std::string& name) const { return std::stod(numbers_.at(name)); }
  DType dtype() const { return static_cast<DType>(integer("dtype")); }

  // Null where the call has none.
  template <class T = void>
  T* array(const std::string& name) const {
    const auto found = arrays_.find(name);
    return found == arrays_.end() ? nullptr : reinterpret_cast<T*>(found->second.start.get() + found->second.shift);
  }
  Coefficient coefficient(const std::string& name) const {
    return {array(name), integer_or_0(name + ".stride"), integer_or_0(name + ".double") != 0};
  }
  Noise noise() const {
    Noise noise;
    noise.array = array("z");
    noise.key = array<int64_t>("key");
    noise.ids = array<int64_t>("ids");
    noise.draw = integer_or_0("draw");
    noise.channels = integer_or_0("channels");
    noise.pixels = integer_or_0("pixels");
    return noise;
  }
  int32_t slopes(const void** k, double* weights, const char* name) const {
    const int32_t n = static_cast<int32_t>(integer("stages"));
    for (int32_t i = 0; i < n; ++i) {
      k[i] = array("k" + std::to_string(i));
      weights[i] = real(name + std::to_string(i));
    }
    return n;
  }

 private:
  struct Memory {
    std::unique_ptr<char[]> start;
    size_t shift;
  };
  std::map<std::string, std::string> numbers_;
  std::map<std::string, Memory> arrays_;
};

// A loop on the device over a step that counts, and clears the flag when it has counted `enough`, `launches` times.
int run_loop(int64_t enough, int64_t launches, int32_t* flag, int32_t* count) {
  shim::Graph step;
  step.add([=] { *flag = ++*count < enough; });
  void* loop;
  int error = cuda_loop_create(&step, flag, &loop);
  step.nodes.clear();  // the loop has a copy
  *count = 0;
  for (; error == 0 && launches > 0; --launches) error = cuda_loop_launch(loop, nullptr);
  return error ? error : cuda_loop_destroy(loop);
}

int run(const std::string& kernel, const Call& call) {
  if (kernel == "loop") {
    return run_loop(call.integer("enough"), call.integer("launches"), call.array<int32_t>("flag"),
                    call.array<int32_t>("count"));
  }
  const int64_t rows = call.integer("rows"),
                cols = kernel == "control" || kernel == "marginal" ? 1 : call.integer("cols");
  if (kernel == "affine") {
    const AffineArgs args{call.dtype(),
                          rows,
                          cols,
                          call.array("x"),
                          call.array("out"),
                          call.coefficient("p"),
                          call.coefficient("q"),
                          call.coefficient("n"),
                          call.noise(),
                          call.array("mean"),
                          call.array("next")};
    return cuda_launch(args, nullptr);
  }
  if (kernel == "residual") {
    const ResidualArgs args{call.dtype(),
                            rows,
                            cols,
                            call.array("out"),
                            call.coefficient("c"),
                            call.coefficient("d"),
                            call.coefficient("w"),
                            call.noise(),
                            call.integer("weighted_grad") != 0,
                            call.array("grad"),
                            call.array<double>("partials")};
    return cuda_launch(args, nullptr);
  }
  if (kernel == "combine") {
    CombineArgs args{};
    args.dtype = call.dtype(), args.rows = rows, args.cols = cols;
    args.n_terms = static_cast<int32_t>(call.integer("n_terms"));
    args.n_results = static_cast<int32_t>(call.integer("n_results"));
    for (int32_t k = 0; k < args.n_terms; ++k) args.arrays[k] = call.array("array" + std::to_string(k));
    for (int32_t m = 0; m < args.n_results; ++m) args.results[m] = call.array("result" + std::to_string(m));
    args.c = {call.array("c"), call.integer("c_in_f64") != 0, call.integer("c_m.stride"), call.integer("c_k.stride"),
              call.integer("c_row.stride")};
    return cuda_launch(args, nullptr);
  }
  if (kernel == "stage") {
    StageArgs args{};
    args.dtype = call.dtype(), args.rows = rows, args.cols = cols;
    args.stages = call.slopes(args.k, args.at, "at");
    args.lines = static_cast<int32_t>(call.integer("lines")),
    args.states = static_cast<int32_t>(call.integer("states"));
    args.h = call.coefficient("h"), args.y = call.array("y"), args.k_new = call.array("k_new");
    for (int32_t m = 0; m < args.lines; ++m) {
      const std::string line = "a" + std::to_string(m);
      args.results[m] = call.array("result" + std::to_string(m));
      for (int32_t j = 0; j < args.stages; ++j) args.a[m][j] = call.real(line + std::to_string(j));
      args.a_new[m] = call.real(line + "new");
    }
    args.x = call.array("x"), args.out = call.array("out");
    args.f = call.coefficient("f"), args.q = call.coefficient("q");
    return cuda_launch(args, nullptr);
  }
  if (kernel == "error") {
    ErrorArgs args{};
    args.dtype = call.dtype(), args.rows = rows, args.cols = cols;
    args.stages = call.slopes(args.k, args.e, "e");
    args.h = call.coefficient("h"), args.y0 = call.array("y0"), args.y1 = call.array("y1");
    args.rtol = call.real("rtol"), args.atol = call.real("atol"), args.partials = call.array<double>("partials");
    args.out = call.array("out"), args.f = call.coefficient("f"), args.q = call.coefficient("q");
    args.e_new = call.real("e_new"), args.k_new = call.array("k_new");
    return cuda_launch(args, nullptr);
  }
  if (kernel == "put") {
    return cuda_launch(PutArgs{call.dtype(), rows, cols, call.array("values"), call.array<bool>("chosen"),
                               call.integer("chosen.stride"), call.array("into")},
                       nullptr);
  }
  if (kernel == "noise") {
    return cuda_launch(NoiseArgs{rows, cols, call.noise(), static_cast<Law>(call.integer("law")),
                                 static_cast<uint64_t>(call.integer("high")), call.array("values")},
                       nullptr);
  }
  if (kernel == "sum") {
    return cuda_launch(
        SumArgs{call.dtype(), rows, cols, call.array<double>("partials"), call.coefficient("w"), call.array("sums")},
        nullptr);
  }
  if (kernel == "control") {
    return cuda_launch(
        ControlArgs{rows, call.array<double>("norm"), call.array<double>("h"), call.array<bool>("after_rejection"),
                    call.real("exponent"), call.array<double>("accepted"), call.array<double>("h_next")},
        nullptr);
  }
  if (kernel == "marginal") {
    return cuda_launch(MarginalArgs{call.dtype(), rows, call.array("u"), call.real("first"), call.real("span"),
                                    static_cast<Process>(call.integer("process")), call.real("p"), call.real("q"),
                                    call.array("t"), call.array("m"), call.array("s")},
                       nullptr);
  }
  throw std::invalid_argument("no kernel " + kernel);
}

void set_shim(const std::string& name, int value) {
  if (name == "largest_grid") {
    shim::largest_grid = static_cast<unsigned>(value);
  } else if (name == "skipped_barrier") {
    shim::skipped_barrier = value;
  } else if (name == "jitter") {
    shim::jitter = value != 0;
  } else {
    throw std::invalid_argument("no setting " + name);
  }
}

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  Call call;
  std::map<std::string, size_t> results;
  std::vector<std::string> order;
  for (std::string word, name; std::cin >> word >> name;) {
    if (word == "run") {
      std::cout << run(name, call) << '\n';
      for (const std::string& result : order) std::cout.write(call.array<char>(result), results[result]);
      std::cout.flush();
      call = Call();
      order.clear();
    } else if (word == "array" || word == "result") {
      size_t bytes, shift;
      std::cin >> bytes >> shift;
      std::cin.get();  // the end of the line
      char* memory = call.add_array(name, bytes, shift);
      if (word == "array") {
        std::cin.read(memory, bytes);
      } else {
        std::memset(memory, 0x5a, bytes);
        results[name] = bytes;
        order.push_back(name);
      }
    } else {
      std::string value;
      std::cin >> value;
      if (word == "number") {
        call.set_number(name, value);
      } else {
        set_shim(name, std::stoi(value));
      }
    }
  }
}
