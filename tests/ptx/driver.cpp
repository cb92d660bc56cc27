// Runs kernels on the machine as standard input says, and writes what they gave to standard output. The arguments are
// the PTX files; the host code that launches the kernels is nvcc's own, linked to this.
//
// Input is a sequence of calls, each some of the following lines and a "run":
//   number NAME VALUE          a field of the kernel's arguments
//   array NAME BYTES SHIFT     an array to read: its bytes follow; it is placed SHIFT bytes off an aligned address
//   result NAME BYTES SHIFT    an array to write, all of which is in the answer
//   huge NAME BYTES            an array of zeros that takes address space and no memory
//   poke NAME OFFSET BYTES     bytes of it, which follow
//   peek NAME OFFSET BYTES     bytes of it that are in the answer
//   set NAME VALUE             a setting of the machine
//   run KERNEL                 calls it: one of csrc/kernels, or any entry of the PTX, whose parameters are the arrays.
//                              The answer is a line: "0" and then the bytes asked for, "error CODE", "fault MESSAGE"
//   list entries|launched      the answer is one line of names: all kernels of the PTX, or those that have run
#include <sys/mman.h>

#include <cstring>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "runtime.h"

namespace {

using namespace scoresde;

class Call {
 public:
  void set_number(const std::string& name, const std::string& value) { numbers_[name] = value; }

  char* add_array(const std::string& name, size_t bytes, size_t shift, bool is_written) {
    char* start = new char[bytes + shift];
    memory_.emplace_back(start, [](char* p) { delete[] p; });
    return arrays_[name] = add_to_machine(name, start + shift, bytes, is_written, true);
  }
  char* add_huge_array(const std::string& name, size_t bytes) {
    const size_t mapped = bytes + 4096;  // which keeps it apart from the next one
    void* start = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) throw std::bad_alloc();
    memory_.emplace_back(static_cast<char*>(start), [mapped](char* p) { munmap(p, mapped); });
    return arrays_[name] = add_to_machine(name, static_cast<char*>(start), bytes, true, false);
  }

  int64_t integer(const std::string& name) const { return std::stoll(numbers_.at(name)); }
  int64_t integer_or_0(const std::string& name) const { return numbers_.count(name) ? integer(name) : 0; }
  double real(const std::string& name) const { return std::stod(numbers_.at(name)); }
  DType dtype() const { return static_cast<DType>(integer("dtype")); }

  // Null where the call has none.
  template <class T = void>
  T* array(const std::string& name) const {
    const auto found = arrays_.find(name);
    return found == arrays_.end() ? nullptr : reinterpret_cast<T*>(found->second);
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
  static char* add_to_machine(const std::string& name, char* data, size_t bytes, bool is_written, bool is_watched) {
    ptx::machine().add_array(name, data, bytes, is_written, is_watched);
    return data;
  }

  std::map<std::string, std::string> numbers_;
  std::map<std::string, char*> arrays_;
  std::vector<std::unique_ptr<char, std::function<void(char*)>>> memory_;
};

// A loop on the device over a step that counts, and clears the flag when it has counted `enough`, `launches` times.
int run_loop(int64_t enough, int64_t launches, int32_t* flag, int32_t* count) {
  *count = 0;
  ptx::machine().forget_arrays();  // as a result the flag would be one that nothing wrote
  ptx::machine().add_array("flag", reinterpret_cast<char*>(flag), sizeof *flag, true, true);
  ptx::Graph step;
  step.add([=] {
    *flag = ++*count < enough;
    return 0;
  });
  void* loop;
  int error = cuda_loop_create(&step, flag, &loop);
  step.nodes.clear();  // the loop has a copy
  for (; error == 0 && launches > 0; --launches) error = cuda_loop_launch(loop, nullptr);
  return error ? error : cuda_loop_destroy(loop);
}

// Any entry of the PTX, whose parameters are pointers to arrays "0", "1" and so on.
int run_entry(const std::string& name, const Call& call) {
  const ptx::Function& entry = *ptx::machine().program.functions.at(name);
  std::vector<void*> pointers;
  for (size_t i = 0; i < entry.parameters.size(); ++i) pointers.push_back(call.array(std::to_string(i)));
  std::vector<void*> arguments;
  for (void*& pointer : pointers) arguments.push_back(&pointer);
  const auto size = [&](const char* key) { return static_cast<unsigned>(call.integer(key)); };
  return ptx::launch(name, {size("grid"), 1, 1}, {size("block"), 1, 1}, arguments.data());
}

int run(const std::string& kernel, const Call& call) {
  if (kernel == "loop") {
    return run_loop(call.integer("enough"), call.integer("launches"), call.array<int32_t>("flag"),
                    call.array<int32_t>("count"));
  }
  if (ptx::machine().program.functions.count(kernel) > 0) return run_entry(kernel, call);
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

void set(const std::string& name, unsigned value) {
  if (name == "largest_grid") {
    ptx::machine().largest_grid = value;
  } else if (name == "ends") {
    ptx::machine().ends = value;
  } else {
    throw std::invalid_argument("no setting " + name);
  }
}

void list(const std::string& what) {
  if (what == "launched") {
    for (const std::string& name : ptx::machine().launched) std::cout << name << ' ';
  } else {
    for (const auto& [name, function] : ptx::machine().program.functions) {
      if (function->is_entry) std::cout << name << ' ';
    }
  }
  std::cout << std::endl;
}

struct Part {
  std::string name;
  size_t offset, bytes;
};

void answer(const std::string& kernel, const Call& call, const std::vector<Part>& wanted) {
  ptx::fault().clear();
  const int error = run(kernel, call);
  if (!ptx::fault().empty()) {
    std::cout << "fault " << ptx::fault() << std::endl;
  } else if (error != 0) {
    std::cout << "error " << error << std::endl;
  } else {
    std::cout << "0\n";
    for (const Part& part : wanted) std::cout.write(call.array<char>(part.name) + part.offset, part.bytes);
    std::cout.flush();
  }
}

void serve() {
  auto call = std::make_unique<Call>();
  std::vector<Part> wanted;
  for (std::string word, name; std::cin >> word >> name;) {
    size_t first = 0, second = 0;
    if (word == "array" || word == "result" || word == "poke" || word == "peek") std::cin >> first >> second;
    if (word == "huge") std::cin >> first;
    std::cin.ignore(word == "array" || word == "poke" ? 1 : 0);  // the end of the line, before bytes
    if (word == "array") {
      std::cin.read(call->add_array(name, first, second, true), first);
    } else if (word == "result") {
      std::memset(call->add_array(name, first, second, false), 0x5a, first);
      wanted.push_back({name, 0, first});
    } else if (word == "huge") {
      call->add_huge_array(name, first);
    } else if (word == "poke") {
      std::cin.read(call->array<char>(name) + first, second);
    } else if (word == "peek") {
      wanted.push_back({name, first, second});
    } else if (word == "run") {
      answer(name, *call, wanted);
      ptx::machine().forget_arrays();
      call = std::make_unique<Call>();
      wanted.clear();
    } else if (word == "list") {
      list(name);
    } else {
      std::string value;
      std::cin >> value;
      if (word == "number") {
        call->set_number(name, value);
      } else if (word == "set") {
        set(name, static_cast<unsigned>(std::stoul(value)));
      } else {
        throw std::invalid_argument("no command " + word);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::ios::sync_with_stdio(false);
  try {
    for (int i = 1; i < argc; ++i) ptx::load(ptx::machine().program, argv[i]);
    serve();
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
    return 1;
  }
}
