#include "machine.h"

#include <algorithm>
#include <numeric>
#include <sstream>

namespace ptx {

// ---- memory ----

Region::Region(std::string name, uint64_t begin, char* data, size_t bytes, bool is_written, bool is_watched)
    : name_(std::move(name)), begin_(begin), data_(data), bytes_(bytes) {
  if (!is_watched) return;
  Shadow unknown;
  unknown.is_written = is_written;
  shadow_.assign(bytes, unknown);
}

char* Region::access(uint64_t address, size_t bytes, bool writes, Visit visit) {
  const uint64_t offset = address - begin_;
  try {
    if (address % bytes != 0) throw Fault("at a misaligned address");
    if (offset > bytes_ || bytes > bytes_ - offset) throw Fault("beyond the end");
    if (!shadow_.empty()) {
      for (size_t i = 0; i < bytes; ++i) check(shadow_[offset + i], writes, visit);
    }
  } catch (const Fault& fault) {
    std::ostringstream what;
    what << (writes ? "writes " : "reads ") << bytes << " bytes at byte " << offset << " of " << name_ << ", which has "
         << bytes_ << ": " << fault.what();
    throw Fault(what.str());
  }
  return data_ + offset;
}

void Region::check(Shadow& byte, bool writes, Visit visit) const {
  if (!writes && !byte.is_written) throw Fault("nothing wrote there");
  if (byte.write.epoch == visit.epoch && byte.write.thread != visit.thread) {
    throw Fault("a race, another thread writes there");
  }
  const bool is_read = byte.read.epoch == visit.epoch;
  const bool others_read = is_read && (byte.has_readers || byte.read.thread != visit.thread);
  if (writes) {
    if (others_read) throw Fault("a race, another thread reads there");
    byte.write = visit, byte.is_written = true;
  } else {
    byte.read = visit, byte.has_readers = others_read;
  }
}

void Machine::add_array(const std::string& name, char* data, size_t bytes, bool is_written, bool is_watched) {
  const auto begin = reinterpret_cast<uint64_t>(data);
  arrays_.push_back(std::make_unique<Region>(name, begin, data, bytes, is_written, is_watched));
}

void Machine::forget_arrays() {
  arrays_.clear();
  last_array_ = nullptr;
}

Region& Machine::array_at(uint64_t address, size_t bytes, bool writes) {
  if (last_array_ != nullptr && last_array_->has(address)) return *last_array_;
  for (const auto& array : arrays_) {
    if (array->has(address)) return *(last_array_ = array.get());
  }
  throw Fault((writes ? "writes " : "reads ") + std::to_string(bytes) + " bytes outside all arrays");
}

char* Thread::access(Space space, uint64_t address, size_t bytes, bool writes) {
  const uint32_t launch = machine_->launches_, phase = machine_->phases_;
  switch (space) {
    case Space::global: {
      const Size grid = machine_->grid_, at = machine_->block_at_;
      const uint32_t thread = ((at.z * grid.y + at.y) * grid.x + at.x) * 1024 + number_;
      return machine_->array_at(address, bytes, writes).access(address, bytes, writes, {launch, thread});
    }
    case Space::shared:
      return machine_->shared_.access(address, bytes, writes, {phase, number_});
    case Space::local:
      return local_.access(address, bytes, writes, {phase, number_});
    case Space::parameters:
      break;
  }
  return machine_->parameters_.access(address, bytes, writes, {launch, 0});
}

// ---- threads ----

void Thread::start(const Function& kernel, Size grid, Size block, Size block_at, unsigned number) {
  number_ = number, state_ = State::ready;
  local_memory_.assign(kernel.local_bytes, 0);
  local_ = Region("local memory", first_address, local_memory_.data(), local_memory_.size(), false);
  frames_.resize(1);  // its memory stays
  set_up(frames_[0], kernel);
  const Size at{number % block.x, number / block.x % block.y, number / block.x / block.y};
  int32_t index = 0;
  for (const Size& size : {at, block, block_at, grid}) {
    for (const unsigned n : {size.x, size.y, size.z}) write<uint32_t>({index++, 0}, n);
  }
}

void Thread::set_up(Frame& frame, const Function& function) {
  frame.function = &function, frame.next = function.code.data();
  frame.registers.resize(function.registers);
  frame.is_set.assign(function.registers, false);
  use(frame);
}

void Thread::use(Frame& frame) {
  next_ = frame.next, registers_ = frame.registers.data(), is_set_ = frame.is_set.data();
}

void Thread::call(const Instruction& call) {
  uint64_t arguments[std::tuple_size_v<decltype(call.operands)>];
  for (int i = 1; i < call.size; ++i) arguments[i] = read<uint64_t>(call.operands[i]);
  frames_.back().next = next_;
  set_up(frames_.emplace_back(), *call.callee);
  for (int i = 1; i < call.size; ++i) {
    write(Operand{static_cast<int32_t>(call.callee->parameters[i - 1].at)}, arguments[i]);
  }
}

void Thread::leave() {
  if (frames_.size() == 1) {
    state_ = State::ended;
    return;
  }
  const int result = frames_.back().function->result;
  const uint64_t value = result < 0 ? 0 : read<uint64_t>({result});
  frames_.pop_back();
  use(frames_.back());
  const Instruction& call = next_[-1];
  if (call.operands[0].index >= 0) write(call.operands[0], value);
}

void Thread::finish_shuffle(uint32_t value, bool is_inside) {
  write(now_->operands[0], value);
  if (now_->size == 6) write(now_->operands[1], is_inside);
  state_ = State::ready;
}

void Thread::run() {
  while (state_ == State::ready) {
    now_ = next_++;
    if (now_->guard >= 0 && read<bool>({now_->guard}) == now_->guard_is_not) continue;
    now_->execute(*this, *now_);
  }
}

// ---- blocks ----

void Machine::launch(const Function& kernel, Size grid, Size block, void** arguments) {
  parameter_memory_.assign(kernel.parameter_bytes / 8 + 1, 0);
  char* memory = reinterpret_cast<char*>(parameter_memory_.data());
  for (size_t i = 0; i < kernel.parameters.size(); ++i) {
    std::memcpy(memory + kernel.parameters[i].at, arguments[i], kernel.parameters[i].bytes);
  }
  // Not watched: all of them are written, and no instruction writes them.
  parameters_ = Region("the parameters", first_address, memory, kernel.parameter_bytes, true, false);
  grid.x = std::min(grid.x, largest_grid), grid.y = std::min(grid.y, largest_grid);
  launched.insert(kernel.name);
  ++launches_;
  // The next block to run, behind those in the middle that `ends` leaves out.
  const auto after = [&](unsigned i, unsigned n) {
    return ends > 0 && i + 1 == ends && n > 2 * ends ? n - ends : i + 1;
  };
  try {
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; y = after(y, grid.y)) {
        for (unsigned x = 0; x < grid.x; x = after(x, grid.x)) run_block(kernel, grid, block, {x, y, z});
      }
    }
  } catch (const Fault& fault) {
    std::ostringstream what;
    const unsigned n = running_->number_;
    what << "a thread " << fault.what() << "; at " << to_string(running_->now_->where) << ", block (" << block_at_.x
         << ", " << block_at_.y << "), thread (" << n % block.x << ", " << n / block.x << ") of " << kernel.name;
    throw Fault(what.str());
  }
}

void Machine::run_block(const Function& kernel, Size grid, Size block, Size block_at) {
  grid_ = grid, block_at_ = block_at;
  n_threads_ = block.count();
  if (threads_.size() < n_threads_) threads_.resize(n_threads_);
  shared_memory_.assign(program.shared_end - first_address, 0);
  shared_ = Region("shared memory", first_address, shared_memory_.data(), shared_memory_.size(), false);
  ++phases_;
  for (size_t i = 0; i < n_threads_; ++i) {
    threads_[i].machine_ = this;
    threads_[i].start(kernel, grid, block, block_at, static_cast<unsigned>(i));
  }

  std::vector<size_t> order(n_threads_);
  std::iota(order.begin(), order.end(), size_t{0});
  const auto some = [&](Thread::State state) {
    return std::any_of(order.begin(), order.end(), [&](size_t i) { return threads_[i].state_ == state; });
  };
  while (some(Thread::State::ready)) {
    std::shuffle(order.begin(), order.end(), random_);
    for (const size_t i : order) {
      running_ = &threads_[i];
      threads_[i].run();
    }
    bool some_met = false;
    for (size_t first = 0; first < n_threads_; first += 32) some_met |= meet_in_warp(first);
    if (!some_met && some(Thread::State::at_barrier)) meet_at_barrier();
  }
}

// Carries out a shuffle of the warp that begins with this thread: whether one of its lanes waits at one.
bool Machine::meet_in_warp(size_t first) {
  const auto begin = threads_.begin() + first, end = threads_.begin() + std::min(first + 32, n_threads_);
  const auto waiting = std::find_if(begin, end, [](const Thread& t) { return t.state_ == Thread::State::at_shuffle; });
  if (waiting == end) return false;
  running_ = &*waiting;
  const uint32_t mask = waiting->shuffle_.mask;
  std::vector<unsigned> lanes;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) lanes.push_back(lane);
  }
  if (!(mask >> (waiting - begin) & 1)) throw Fault("shuffles and is not in its own mask");
  for (const unsigned lane : lanes) {
    if (begin + lane >= end) throw Fault("shuffles with lanes that the block does not have");
    const Thread& other = begin[lane];
    const bool is_there = other.state_ == Thread::State::at_shuffle;
    if (!is_there) throw Fault("waits at a shuffle that a lane of its mask does not reach");
    const bool is_same = other.now_ == waiting->now_ && other.shuffle_.mask == mask;
    if (!is_same) throw Fault("shuffles with lanes that are at another shuffle");
  }
  uint32_t values[32];
  for (const unsigned lane : lanes) values[lane] = begin[lane].shuffle_.value;
  for (const unsigned lane : lanes) {
    // As PTX defines it: `bounds` has the last lane that may be read, and from bit 8 on a mask of lanes' segments.
    const Shuffle& shuffle = begin[lane].shuffle_;
    const uint32_t segment = shuffle.bounds >> 8 & 31, last = (lane & segment) | (shuffle.bounds & 31 & ~segment);
    const uint32_t from = lane + (shuffle.delta & 31);
    const bool is_inside = from <= last;
    if (is_inside && !(mask >> from & 1)) throw Fault("shuffles the value of a lane outside its mask");
    begin[lane].finish_shuffle(values[is_inside ? from : lane], is_inside);
  }
  return true;
}

void Machine::meet_at_barrier() {
  const Thread* first = nullptr;
  for (size_t i = 0; i < n_threads_; ++i) {
    if (threads_[i].state_ == Thread::State::at_barrier && first == nullptr) running_ = first = &threads_[i];
  }
  for (size_t i = 0; i < n_threads_; ++i) {
    Thread& thread = threads_[i];
    if (thread.state_ == Thread::State::ended) throw Fault("waits at a barrier that another thread does not reach");
    if (thread.now_ != first->now_) throw Fault("waits at a barrier while another thread waits at another one");
    thread.state_ = Thread::State::ready;
  }
  ++phases_;
}

}  // namespace ptx
