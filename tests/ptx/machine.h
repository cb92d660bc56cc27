// A machine that runs PTX on a CPU, thread by thread, and checks what a GPU would let pass.
//
// Blocks run one after the other, and of a block's threads one at a time, up to the next barrier, the next shuffle or
// its end; which one comes next is drawn at random. Every access must be aligned, lie in one array, and read what was
// written. No thread may read or write a byte that another one writes, unless a barrier is between them (shared memory)
// or a launch (global memory: stricter than a GPU). All threads of a block must reach a barrier, all lanes of its mask
// a shuffle, and at one place of the program. Registers must be written before they are read.
//
// It does not show what ptxas makes of PTX, nor time, caches, streams.
#pragma once

#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#include "program.h"

namespace ptx {

// What a kernel must not do.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Size {
  unsigned x, y, z;
  uint64_t count() const { return uint64_t{x} * y * z; }
};

// ---- memory ----

enum class Space { global, shared, local, parameters };

// Who may be in whose way: a thread, and the time between two events that put all its accesses in order.
struct Visit {
  uint32_t epoch, thread;
};

// One array.
class Region {
 public:
  Region() = default;
  // `data` belongs to the caller. Accesses to an array that is not watched need no more than to lie in it.
  Region(std::string name, uint64_t begin, char* data, size_t bytes, bool is_written, bool is_watched = true);

  bool has(uint64_t address) const { return address - begin_ < bytes_; }
  // Where the bytes of an access lie. Throws Fault.
  char* access(uint64_t address, size_t bytes, bool writes, Visit visit);

 private:
  // What is known of a byte: the last visits of a writer and of a reader.
  struct Shadow {
    Visit write{0, 0}, read{0, 0};
    bool is_written = false, has_readers = false;  // readers: several in the last epoch
  };
  void check(Shadow& byte, bool writes, Visit visit) const;

  std::string name_;
  uint64_t begin_ = 0;
  char* data_ = nullptr;
  size_t bytes_ = 0;
  std::vector<Shadow> shadow_;
};

// ---- threads ----

// What a lane brings to a shuffle.
struct Shuffle {
  uint32_t value, delta, bounds, mask;
};

class Machine;

class Thread {
 public:
  template <class T>
  T read(const Operand& operand) const {
    if (operand.index >= 0 && !is_set_[operand.index]) throw Fault("reads a register that nothing wrote");
    const uint64_t bits = operand.index < 0 ? operand.constant : registers_[operand.index];
    if constexpr (std::is_same_v<T, bool>) {
      return bits & 1;
    } else {
      T value;
      std::memcpy(&value, &bits, sizeof value);  // its low bytes
      return value;
    }
  }

  // A register that is wider gets a signed number with its sign, others with zeros.
  template <class T>
  void write(const Operand& operand, T value) {
    uint64_t bits = 0;
    if constexpr (std::is_integral_v<T> && std::is_signed_v<T>) {
      bits = static_cast<uint64_t>(int64_t{value});
    } else {
      std::memcpy(&bits, &value, sizeof value);
    }
    registers_[operand.index] = bits, is_set_[operand.index] = true;
  }

  char* access(Space space, uint64_t address, size_t bytes, bool writes);

  void jump(int target) { next_ = &frames_.back().function->code[target]; }
  void call(const Instruction& call);
  void leave();
  void wait_at_barrier() { state_ = State::at_barrier; }
  void wait_at_shuffle(const Shuffle& brought) { state_ = State::at_shuffle, shuffle_ = brought; }

 private:
  friend class Machine;
  enum class State { ready, at_barrier, at_shuffle, ended };
  struct Frame {
    const Function* function;
    const Instruction* next;
    std::vector<uint64_t> registers;
    std::vector<char> is_set;
  };

  void start(const Function& kernel, Size grid, Size block, Size block_at, unsigned number);
  void set_up(Frame& frame, const Function& function);
  void use(Frame& frame);
  void run();  // until it waits or ends
  void finish_shuffle(uint32_t value, bool is_inside);

  Machine* machine_ = nullptr;
  unsigned number_ = 0;  // in the block
  State state_ = State::ended;
  std::vector<Frame> frames_;
  // Of the top frame. `now_` is the instruction before `next_`.
  const Instruction* next_ = nullptr;
  const Instruction* now_ = nullptr;
  uint64_t* registers_ = nullptr;
  char* is_set_ = nullptr;
  std::vector<char> local_memory_;
  Region local_;
  Shuffle shuffle_{};
};

// ---- the machine ----

class Machine {
 public:
  Program program;
  unsigned largest_grid = 1u << 30;  // blocks in each direction: kernels must be right for every grid
  unsigned ends = 0;                 // not 0: of each direction's blocks only so many at either end are run
  std::set<std::string> launched;    // kernels

  void add_array(const std::string& name, char* data, size_t bytes, bool is_written, bool is_watched);
  void forget_arrays();

  // `arguments` are pointers to the kernel's arguments. Throws Fault, which says where.
  void launch(const Function& kernel, Size grid, Size block, void** arguments);

 private:
  friend class Thread;
  void run_block(const Function& kernel, Size grid, Size block, Size block_at);
  bool meet_in_warp(size_t first);
  void meet_at_barrier();
  Region& array_at(uint64_t address, size_t bytes, bool writes);

  std::vector<Thread> threads_;
  size_t n_threads_ = 0;  // of the block that runs
  Size grid_{}, block_at_{};
  const Thread* running_ = nullptr;
  std::vector<std::unique_ptr<Region>> arrays_;
  Region* last_array_ = nullptr;
  std::vector<uint64_t> parameter_memory_;
  Region parameters_;
  std::vector<char> shared_memory_;
  Region shared_;
  uint32_t launches_ = 0, phases_ = 0;
  std::mt19937 random_{12345};
};

// What cudaGraphSetConditional does on the device.
void set_conditional(uint64_t handle, uint32_t value);

}  // namespace ptx
