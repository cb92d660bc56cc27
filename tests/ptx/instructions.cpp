// What the instructions of PTX do, by their full names. A name that is not here is refused: no rounding, saturation or
// flushing of small numbers is ever left out. Sums and products of floating-point numbers are here with .rn alone:
// without it ptxas is free to fuse them.
#include <cmath>
#include <limits>
#include <unordered_map>

#include "machine.h"

namespace ptx {
namespace {

// ---- what the operators compute ----
// Integers wrap around: all that does not depend on the sign is done on unsigned numbers.

template <class T>
T add(T a, T b) {
  return static_cast<T>(a + b);
}
template <class T>
T subtract(T a, T b) {
  return static_cast<T>(a - b);
}
template <class T>
T multiply(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    return a * b;
  } else {
    return static_cast<T>(uint64_t{a} * b);
  }
}
template <class T>
T multiply_add(T a, T b, T c) {
  return static_cast<T>(uint64_t{a} * b + c);
}
template <class T>
T fused_multiply_add(T a, T b, T c) {
  return std::fma(a, b, c);
}
template <class T>
T multiply_high(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>(Wide{a} * b >> (8 * sizeof(T)));
}
template <class Wide, class T>
Wide multiply_wide(T a, T b) {
  return Wide{a} * b;
}
template <class T>
T divide(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    if (b == 0) throw Fault("divides by zero");
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(0 - static_cast<uint64_t>(a));
  }
  return a / b;
}
template <class T>
T remainder(T a, T b) {
  return static_cast<T>(a - static_cast<uint64_t>(divide(a, b)) * b);
}
template <class T>
T square_root(T a) {
  return std::sqrt(a);
}
// 1/x to some 20 bits, from the high word of x alone.
double rough_reciprocal(double x) {
  const auto high_word = [](double v) {
    uint64_t bits;
    std::memcpy(&bits, &v, sizeof v);
    bits &= 0xffffffff00000000u;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  };
  return high_word(1 / high_word(x));
}
template <class T>
T negate(T a) {
  if constexpr (std::is_floating_point_v<T>) {
    return -a;
  } else {
    return static_cast<T>(0 - static_cast<uint64_t>(a));
  }
}
template <class T>
T magnitude(T a) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::fabs(a);
  } else {
    return a < 0 ? negate(a) : a;
  }
}
// A NaN gives way to a number, and -0 is below 0.
template <class T>
T minimum(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (a != a) return b;
    if (a == b) return std::signbit(a) ? a : b;
    return b < a ? b : a;
  }
  return b < a ? b : a;
}
template <class T>
T maximum(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (a != a) return b;
    if (a == b) return std::signbit(a) ? b : a;
    return a < b ? b : a;
  }
  return a < b ? b : a;
}
template <class T>
T bits_and(T a, T b) {
  return a & b;
}
template <class T>
T bits_or(T a, T b) {
  return a | b;
}
template <class T>
T bits_xor(T a, T b) {
  return a ^ b;
}
template <class T>
T bits_not(T a) {
  if constexpr (std::is_same_v<T, bool>) {
    return !a;
  } else {
    return static_cast<T>(~uint64_t{a});
  }
}
template <class T>
T shift_left(T a, uint32_t n) {
  return n < 8 * sizeof(T) ? static_cast<T>(uint64_t{a} << n) : T{0};
}
template <class T>
T shift_right(T a, uint32_t n) {
  constexpr uint32_t bits = 8 * sizeof(T);
  if constexpr (std::is_signed_v<T>) return static_cast<T>(a >> std::min(n, bits - 1));
  return n < bits ? static_cast<T>(a >> n) : T{0};
}
// Four bytes of the eight of b:a, chosen by the digits of `choice`; a digit's highest bit asks for the sign alone.
uint32_t permute(uint32_t a, uint32_t b, uint32_t choice) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = choice >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(both >> (8 * (digit & 7))) & 255;
    if (digit & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}
template <class To, class From>
To converted(From a) {
  return static_cast<To>(a);
}

// Comparisons: false where a number is a NaN, but for not_equal (setp.neu). Their negations give the others.
template <class T>
bool equal(T a, T b) {
  return a == b;
}
template <class T>
bool not_equal(T a, T b) {
  return a != b;
}
template <class T>
bool less(T a, T b) {
  return a < b;
}
template <class T>
bool less_or_equal(T a, T b) {
  return a <= b;
}
template <class T>
bool greater(T a, T b) {
  return a > b;
}
template <class T>
bool greater_or_equal(T a, T b) {
  return a >= b;
}
template <class T>
bool ordered(T a, T b) {
  return a == a && b == b;
}
template <class T>
bool ordered_and_not_equal(T a, T b) {
  return a < b || a > b;
}
template <class T, bool (*test)(T, T)>
bool is_not(T a, T b) {
  return !test(a, b);
}

// ---- how they take their operands ----

template <class To, class From, To (*f)(From)>
void execute_unary(Thread& t, const Instruction& i) {
  t.write<To>(i.operands[0], f(t.read<From>(i.operands[1])));
}
template <class To, class From, To (*f)(From)>
constexpr Encoding unary{execute_unary<To, From, f>, 2, 1};

template <class To, class A, class B, To (*f)(A, B)>
void execute_binary(Thread& t, const Instruction& i) {
  t.write<To>(i.operands[0], f(t.read<A>(i.operands[1]), t.read<B>(i.operands[2])));
}
template <class To, class A, class B, To (*f)(A, B)>
constexpr Encoding binary{execute_binary<To, A, B, f>, 3, 1};

template <class T, T (*f)(T, T, T)>
void execute_ternary(Thread& t, const Instruction& i) {
  t.write<T>(i.operands[0], f(t.read<T>(i.operands[1]), t.read<T>(i.operands[2]), t.read<T>(i.operands[3])));
}
template <class T, T (*f)(T, T, T)>
constexpr Encoding ternary{execute_ternary<T, f>, 4, 1};

template <class T>
void execute_select(Thread& t, const Instruction& i) {
  t.write<T>(i.operands[0], t.read<T>(t.read<bool>(i.operands[3]) ? i.operands[1] : i.operands[2]));
}
template <class T>
constexpr Encoding select{execute_select<T>, 4, 1};

template <class T>
void execute_move(Thread& t, const Instruction& i) {
  t.write<T>(i.operands[0], t.read<T>(i.operands[1]));
}
template <class T>
constexpr Encoding move{execute_move<T>, 2, 1};

template <class T, class Half>
void execute_take_apart(Thread& t, const Instruction& i) {
  const T whole = t.read<T>(i.operands[2]);
  t.write<Half>(i.operands[0], static_cast<Half>(whole));
  t.write<Half>(i.operands[1], static_cast<Half>(whole >> (8 * sizeof(Half))));
}
template <class T, class Half>
constexpr Encoding take_apart{execute_take_apart<T, Half>, 3, 2};

template <class T, class Half>
void execute_put_together(Thread& t, const Instruction& i) {
  const T low = t.read<Half>(i.operands[1]), high = t.read<Half>(i.operands[2]);
  t.write<T>(i.operands[0], low | high << (8 * sizeof(Half)));
}
template <class T, class Half>
constexpr Encoding put_together{execute_put_together<T, Half>, 3, 1};

template <Space space, class T, int n>
void execute_load(Thread& t, const Instruction& i) {
  T values[n];
  const uint64_t address = t.read<uint64_t>(i.operands[n]) + i.operands[n + 1].constant;
  std::memcpy(values, t.access(space, address, sizeof values, false), sizeof values);
  for (int k = 0; k < n; ++k) t.write<T>(i.operands[k], values[k]);
}
template <Space space, class T, int n>
constexpr Encoding load{execute_load<space, T, n>, n + 2, n};

template <Space space, class T, int n>
void execute_store(Thread& t, const Instruction& i) {
  T values[n];
  for (int k = 0; k < n; ++k) values[k] = t.read<T>(i.operands[2 + k]);
  const uint64_t address = t.read<uint64_t>(i.operands[0]) + i.operands[1].constant;
  std::memcpy(t.access(space, address, sizeof values, true), values, sizeof values);
}
template <Space space, class T, int n>
constexpr Encoding store{execute_store<space, T, n>, n + 2, 0};

// Arguments and results of calls are registers; the offset in them must be 0.
template <class T>
void execute_load_argument(Thread& t, const Instruction& i) {
  if (i.operands[2].constant != 0) throw Fault("reads a part of an argument");
  t.write<T>(i.operands[0], t.read<T>(i.operands[1]));
}
template <class T>
constexpr Encoding load_argument{execute_load_argument<T>, 3, 1};

template <class T>
void execute_store_argument(Thread& t, const Instruction& i) {
  if (i.operands[1].constant != 0) throw Fault("writes a part of an argument");
  t.write<T>(i.operands[0], t.read<T>(i.operands[2]));
}
template <class T>
constexpr Encoding store_argument{execute_store_argument<T>, 3, 1};

void branch(Thread& t, const Instruction& i) { t.jump(i.target); }
void leave(Thread& t, const Instruction&) { t.leave(); }
void call(Thread& t, const Instruction& i) { t.call(i); }
void call_set_conditional(Thread& t, const Instruction& i) {
  set_conditional(t.read<uint64_t>(i.operands[1]), t.read<uint32_t>(i.operands[2]));
}
void barrier(Thread& t, const Instruction& i) {
  if (t.read<uint32_t>(i.operands[0]) != 0) throw Fault("waits at a barrier that is not the block's own");
  t.wait_at_barrier();
}
// From the lane `delta` further on: result, a, delta, bounds, mask; or result|predicate.
template <int results>
void shuffle_down(Thread& t, const Instruction& i) {
  const auto source = [&](int k) { return t.read<uint32_t>(i.operands[results + k]); };
  t.wait_at_shuffle({source(0), source(1), source(2), source(3)});
}

// ---- their names ----

using Table = std::unordered_map<std::string, Encoding>;

template <class T>
void add_comparisons(Table& table, const std::string& type) {
  table["setp.eq" + type] = binary<bool, T, T, equal<T>>;
  table["setp.lt" + type] = binary<bool, T, T, less<T>>;
  table["setp.le" + type] = binary<bool, T, T, less_or_equal<T>>;
  table["setp.gt" + type] = binary<bool, T, T, greater<T>>;
  table["setp.ge" + type] = binary<bool, T, T, greater_or_equal<T>>;
}

template <class T>
void add_data_movement(Table& table, const std::string& type) {
  table["mov" + type] = move<T>;
  table["selp" + type] = select<T>;
}

// What signed and unsigned integers have in common is computed on T = unsigned.
template <class T>
void add_integers(Table& table, const std::string& bits) {
  using Signed = std::make_signed_t<T>;
  for (const char* letter : {".s", ".u"}) {
    const std::string type = letter + bits;
    table["add" + type] = binary<T, T, T, add<T>>;
    table["sub" + type] = binary<T, T, T, subtract<T>>;
    table["mul.lo" + type] = binary<T, T, T, multiply<T>>;
    table["mad.lo" + type] = ternary<T, multiply_add<T>>;
  }
  const auto add_signed_or_not = [&](auto number, const std::string& type) {
    using N = decltype(number);
    table["div" + type] = binary<N, N, N, divide<N>>;
    table["rem" + type] = binary<N, N, N, remainder<N>>;
    table["min" + type] = binary<N, N, N, minimum<N>>;
    table["max" + type] = binary<N, N, N, maximum<N>>;
    table["mul.hi" + type] = binary<N, N, N, multiply_high<N>>;
    table["shr" + type] = binary<N, N, uint32_t, shift_right<N>>;
    add_comparisons<N>(table, type);
    table["setp.ne" + type] = binary<bool, N, N, not_equal<N>>;
    add_data_movement<N>(table, type);
  };
  add_signed_or_not(Signed{}, ".s" + bits);
  add_signed_or_not(T{}, ".u" + bits);
  table["neg.s" + bits] = unary<Signed, Signed, negate<Signed>>;
  table["abs.s" + bits] = unary<Signed, Signed, magnitude<Signed>>;

  const std::string type = ".b" + bits;
  table["setp.eq" + type] = binary<bool, T, T, equal<T>>;
  table["setp.ne" + type] = binary<bool, T, T, not_equal<T>>;
  table["shl" + type] = binary<T, T, uint32_t, shift_left<T>>;
  table["shr" + type] = binary<T, T, uint32_t, shift_right<T>>;
  add_data_movement<T>(table, type);
}

template <class T>
void add_logic(Table& table, const std::string& type) {
  table["and" + type] = binary<T, T, T, bits_and<T>>;
  table["or" + type] = binary<T, T, T, bits_or<T>>;
  table["xor" + type] = binary<T, T, T, bits_xor<T>>;
  table["not" + type] = unary<T, T, bits_not<T>>;
}

template <class T>
void add_floats(Table& table, const std::string& type) {
  table["add.rn" + type] = binary<T, T, T, add<T>>;
  table["sub.rn" + type] = binary<T, T, T, subtract<T>>;
  table["mul.rn" + type] = binary<T, T, T, multiply<T>>;
  table["fma.rn" + type] = ternary<T, fused_multiply_add<T>>;
  table["div.rn" + type] = binary<T, T, T, divide<T>>;
  table["sqrt.rn" + type] = unary<T, T, square_root<T>>;
  table["neg" + type] = unary<T, T, negate<T>>;
  table["abs" + type] = unary<T, T, magnitude<T>>;
  table["min" + type] = binary<T, T, T, minimum<T>>;
  table["max" + type] = binary<T, T, T, maximum<T>>;
  add_data_movement<T>(table, type);
  add_comparisons<T>(table, type);
  table["setp.ne" + type] = binary<bool, T, T, ordered_and_not_equal<T>>;
  table["setp.num" + type] = binary<bool, T, T, ordered<T>>;
  table["setp.nan" + type] = binary<bool, T, T, is_not<T, ordered<T>>>;
  table["setp.equ" + type] = binary<bool, T, T, is_not<T, ordered_and_not_equal<T>>>;
  table["setp.neu" + type] = binary<bool, T, T, not_equal<T>>;
  table["setp.ltu" + type] = binary<bool, T, T, is_not<T, greater_or_equal<T>>>;
  table["setp.leu" + type] = binary<bool, T, T, is_not<T, greater<T>>>;
  table["setp.gtu" + type] = binary<bool, T, T, is_not<T, less_or_equal<T>>>;
  table["setp.geu" + type] = binary<bool, T, T, is_not<T, less<T>>>;
}

// Calls f with a number of each type and the type's name.
template <class F>
void for_integers(F f) {
  f(uint8_t{}, ".u8"), f(uint16_t{}, ".u16"), f(uint32_t{}, ".u32"), f(uint64_t{}, ".u64");
  f(int8_t{}, ".s8"), f(int16_t{}, ".s16"), f(int32_t{}, ".s32"), f(int64_t{}, ".s64");
}
template <class F>
void for_types_in_memory(F f) {
  for_integers(f);
  f(uint8_t{}, ".b8"), f(uint16_t{}, ".b16"), f(uint32_t{}, ".b32"), f(uint64_t{}, ".b64");
  f(float{}, ".f32"), f(double{}, ".f64");
}

void add_conversions(Table& table) {
  for_integers([&](auto from, const std::string& from_type) {
    using From = decltype(from);
    for_integers([&](auto to, const std::string& to_type) {
      table["cvt" + to_type + from_type] = unary<decltype(to), From, converted<decltype(to), From>>;
    });
    table["cvt.rn.f32" + from_type] = unary<float, From, converted<float, From>>;
    table["cvt.rn.f64" + from_type] = unary<double, From, converted<double, From>>;
  });
  table["cvt.f64.f32"] = unary<double, float, converted<double, float>>;
  table["cvt.rn.f32.f64"] = unary<float, double, converted<float, double>>;
  table["cvt.rzi.f64.f64"] = unary<double, double, std::trunc>;
}

template <Space space, class T, int n>
void add_access(Table& table, const std::string& rest) {
  if constexpr (n * sizeof(T) <= 16) {
    const std::string words = n == 1 ? "" : ".v" + std::to_string(n);
    const std::string name = space == Space::global   ? ".global"
                             : space == Space::shared ? ".shared"
                             : space == Space::local  ? ".local"
                                                      : ".param";
    table["ld" + name + words + rest] = load<space, T, n>;
    if (space != Space::parameters) table["st" + name + words + rest] = store<space, T, n>;
    if (space == Space::global) table["st.global.wb" + words + rest] = store<space, T, n>;
  }
}
template <Space space>
void add_accesses(Table& table) {
  for_types_in_memory([&](auto number, const std::string& type) {
    using T = decltype(number);
    add_access<space, T, 1>(table, type);
    add_access<space, T, 2>(table, type);
    add_access<space, T, 4>(table, type);
  });
}

Table all_instructions() {
  Table table;
  add_integers<uint16_t>(table, "16");
  add_integers<uint32_t>(table, "32");
  add_integers<uint64_t>(table, "64");
  table["mul.wide.u16"] = binary<uint32_t, uint16_t, uint16_t, multiply_wide<uint32_t, uint16_t>>;
  table["mul.wide.s16"] = binary<int32_t, int16_t, int16_t, multiply_wide<int32_t, int16_t>>;
  table["mul.wide.u32"] = binary<uint64_t, uint32_t, uint32_t, multiply_wide<uint64_t, uint32_t>>;
  table["mul.wide.s32"] = binary<int64_t, int32_t, int32_t, multiply_wide<int64_t, int32_t>>;
  add_logic<uint16_t>(table, ".b16");
  add_logic<uint32_t>(table, ".b32");
  add_logic<uint64_t>(table, ".b64");
  add_logic<bool>(table, ".pred");
  add_floats<float>(table, ".f32");
  add_floats<double>(table, ".f64");
  add_conversions(table);
  table["rcp.approx.ftz.f64"] = unary<double, double, rough_reciprocal>;
  table["prmt.b32"] = ternary<uint32_t, permute>;
  table["mov.pred"] = move<bool>;
  table["mov.b32 apart"] = take_apart<uint32_t, uint16_t>;
  table["mov.b64 apart"] = take_apart<uint64_t, uint32_t>;
  table["mov.b32 together"] = put_together<uint32_t, uint16_t>;
  table["mov.b64 together"] = put_together<uint64_t, uint32_t>;
  // Addresses in global memory are the generic ones.
  table["cvta.to.global.u64"] = move<uint64_t>;

  add_accesses<Space::global>(table);
  add_accesses<Space::shared>(table);
  add_accesses<Space::local>(table);
  add_accesses<Space::parameters>(table);
  for_types_in_memory([&](auto number, const std::string& type) {
    table["ld.param" + type + " register"] = load_argument<decltype(number)>;
    table["st.param" + type + " register"] = store_argument<decltype(number)>;
  });

  table["bra"] = {branch, 0, 0};
  table["ret"] = {leave, 0, 0};
  table["bar.sync"] = {barrier, 1, 0};
  table["shfl.sync.down.b32"] = {shuffle_down<1>, 5, 1};
  table["shfl.sync.down.b32 and predicate"] = {shuffle_down<2>, 6, 2};
  return table;
}

}  // namespace

Encoding encoding_named(const std::string& name) {
  static const Table table = all_instructions();
  const auto found = table.find(name);
  return found == table.end() ? Encoding{} : found->second;
}

bool is_of_machine(const Function& function) { return function.name == "cudaGraphSetConditional"; }

Execute call_of(const Function& function) { return is_of_machine(function) ? call_set_conditional : call; }

}  // namespace ptx
