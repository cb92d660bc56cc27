// PTX as the machine runs it: functions of instructions whose operands and labels are resolved.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

class Thread;
struct Function;
struct Instruction;
using Execute = void (*)(Thread&, const Instruction&);

// A register of a thread, or a constant.
struct Operand {
  int32_t index = -1;  // of the register; -1: it is a constant
  uint64_t constant = 0;
};

// Where an instruction comes from: its line of the CUDA source, and its line of the PTX.
struct Location {
  const std::string* source = nullptr;
  int line = 0;
  const std::string* ptx = nullptr;
  int ptx_line = 0;
};
std::string to_string(const Location& where);

// The operands stand in the order of the instruction. An address [base + offset] is two of them.
struct Instruction {
  Execute execute;
  std::array<Operand, 6> operands;
  int size = 0;               // of the operands
  int guard = -1;             // @%p: the predicate's register; -1: always
  bool guard_is_not = false;  // @!%p
  int target = -1;            // of a branch: the instruction to go on with
  const Function* callee = nullptr;
  Location where;
};

// Registers that every function has, before its own.
constexpr const char* special_registers[] = {"%tid.x",   "%tid.y",   "%tid.z",   "%ntid.x",   "%ntid.y",   "%ntid.z",
                                             "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z"};
constexpr int n_special_registers = 12;

// Of an entry: the offset in the memory of parameters. Of another function: the register that has the argument.
struct Parameter {
  unsigned at, bytes;
};

struct Function {
  std::string name;
  bool is_entry = false;
  std::vector<Parameter> parameters;
  unsigned parameter_bytes = 0;  // of an entry
  int result = -1;               // the register that is returned; -1: none
  int registers = n_special_registers;
  unsigned local_bytes = 0;  // memory that every thread has for itself
  unsigned most_threads = 1024;
  bool is_defined = false;
  std::vector<Instruction> code;
};

// Addresses in shared and local memory begin here: 0 is none.
constexpr uint64_t first_address = 16;

struct Program {
  std::map<std::string, std::unique_ptr<Function>> functions;
  std::map<std::string, uint64_t> shared;  // addresses of variables in shared memory
  uint64_t shared_end = first_address;
  std::vector<std::unique_ptr<std::string>> names;  // of files
};

// PTX that the machine does not know. It never guesses what an instruction might mean.
struct Unknown : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Adds a file to the program. Throws Unknown.
void load(Program& program, const std::string& path);

// An instruction that the machine knows: how it is executed, how many operands it has, and how many of them, the first
// ones, are registers that it sets.
struct Encoding {
  Execute execute = nullptr;
  int operands = 0, results = 0;
};

// The instruction of a full name ("add.rn.f32"), and the form of its operands behind it. `execute` is null if there is
// none.
Encoding encoding_named(const std::string& name);

// How a call is executed: of a function of the program, or of one that the machine itself has.
Execute call_of(const Function& function);
bool is_of_machine(const Function& function);

}  // namespace ptx
