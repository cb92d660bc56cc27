// Reads PTX, as much of its grammar as nvcc uses for plain kernels.
#include "program.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string_view>

namespace ptx {
namespace {

struct Token {
  std::string_view text;
  int line;
};

bool is_of_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || std::strchr("_.$%-", c) != nullptr; }

// Words (names, numbers, directives), strings, and single characters for everything else.
std::vector<Token> tokens_of(std::string_view text) {
  std::vector<Token> tokens;
  int line = 1;
  for (size_t i = 0; i < text.size();) {
    const size_t start = i;
    if (text[i] == '\n') {
      ++line, ++i;
    } else if (std::isspace(static_cast<unsigned char>(text[i]))) {
      ++i;
    } else if (text.substr(i, 2) == "//") {
      i = std::min(text.find('\n', i), text.size());
    } else if (text[i] == '"') {
      i = std::min(text.find('"', i + 1), text.size() - 1) + 1;
      tokens.push_back({text.substr(start, i - start), line});
    } else if (is_of_word(text[i])) {
      while (i < text.size() && is_of_word(text[i])) ++i;
      tokens.push_back({text.substr(start, i - start), line});
    } else {
      tokens.push_back({text.substr(i++, 1), line});
    }
  }
  return tokens;
}

bool is_number(std::string_view word) {
  return std::isdigit(static_cast<unsigned char>(word[0])) || (word[0] == '-' && word.size() > 1);
}

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

// 12, -12, 0x5410U, and the bits of a number: 0f3F800000, 0d3FF0000000000000. `name` is the instruction, whose type
// says which of them make sense.
uint64_t constant_of(std::string_view word, std::string_view name) {
  const std::string text(word);
  const std::string prefix = text.substr(0, 2);
  const bool is_float = prefix == "0f" || prefix == "0F", is_double = prefix == "0d" || prefix == "0D";
  const bool of_bits = ends_with(name, ".b32") || ends_with(name, ".b64");
  if (is_float != ends_with(name, ".f32") && !(is_float && of_bits)) throw Unknown("a number of another type");
  if (is_double != ends_with(name, ".f64") && !(is_double && of_bits)) throw Unknown("a number of another type");
  size_t used = 0;
  uint64_t value = 0;
  if (is_float || is_double) {
    value = std::stoull(text.substr(2), &used, 16);
    used += 2;
  } else if (text[0] == '-') {
    value = static_cast<uint64_t>(std::stoll(text, &used, 0));
  } else {
    value = std::stoull(text, &used, 0);
    if (used + 1 == text.size() && text.back() == 'U') ++used;
  }
  if (used != text.size()) throw Unknown("a number that is none");
  return value;
}

class Parser {
 public:
  Parser(Program& program, const std::string& path, std::string_view text)
      : program_(program), path_(keep(path)), tokens_(tokens_of(text)) {}

  void parse() {
    try {
      while (at_ < tokens_.size()) parse_directive();
    } catch (const std::logic_error&) {  // of std::stoul and its like
      fail("text that cannot be read");
    } catch (const Unknown& unknown) {
      fail(unknown.what());
    }
  }

 private:
  // ---- tokens ----

  std::string_view peek() const { return at_ < tokens_.size() ? tokens_[at_].text : std::string_view(); }
  std::string_view next() {
    if (at_ == tokens_.size()) throw Unknown("the file ends too early");
    return tokens_[at_++].text;
  }
  bool accept(std::string_view text) { return peek() == text ? ++at_, true : false; }
  void expect(std::string_view text) {
    if (!accept(text)) throw Unknown("expected " + std::string(text) + " before " + std::string(peek()));
  }
  unsigned number() { return static_cast<unsigned>(std::stoul(std::string(next()))); }
  void skip_rest_of_line() {
    while (at_ < tokens_.size() && tokens_[at_].line == tokens_[at_ - 1].line) ++at_;
  }
  // One or more, with commas between them.
  template <class F>
  void parse_list(F parse_one) {
    do {
      parse_one();
    } while (accept(","));
  }
  std::string* keep(const std::string& name) {
    program_.names.push_back(std::make_unique<std::string>(name));
    return program_.names.back().get();
  }
  // The name of a source file, which comes after the code.
  std::string* file(unsigned n) {
    std::string*& name = files_[n];
    return name ? name : name = keep("?");
  }

  [[noreturn]] void fail(const std::string& what) const {
    std::ostringstream message;
    const size_t last = std::min(at_, tokens_.size() - 1);
    message << *path_ << ":" << tokens_[last].line << ": " << what;
    throw Unknown(message.str());
  }

  // ---- the file ----

  void parse_directive() {
    const std::string_view word = peek();
    if (word == ".version" || word == ".target") {
      next(), skip_rest_of_line();
    } else if (word == ".address_size") {
      next(), expect("64");
    } else if (word == ".file") {
      next();
      const unsigned n = number();
      const std::string quoted(next());
      *file(n) = quoted.substr(1, quoted.size() - 2);
      skip_rest_of_line();
    } else if (word == ".section") {
      while (next() != "}") continue;
    } else if (word == ".shared") {
      next();
      const auto [name, bytes, start] = parse_array(program_.shared_end);
      program_.shared[name] = start, program_.shared_end = start + bytes;
      expect(";");
    } else if (word == ".visible" || word == ".weak" || word == ".extern") {
      next();
    } else if (word == ".entry" || word == ".func") {
      next();
      parse_function(word == ".entry");
    } else {
      throw Unknown("the machine does not know " + std::string(word));
    }
  }

  struct Array {
    std::string name;
    unsigned bytes;
    uint64_t start;
  };
  // .align 8 .b8 name[64], at or after an address
  Array parse_array(uint64_t after) {
    expect(".align");
    const unsigned align = number();
    expect(".b8");
    const std::string name(next());
    expect("[");
    const unsigned bytes = number();
    expect("]");
    return {name, bytes, (after + align - 1) / align * align};
  }

  // ---- functions ----

  void parse_function(bool is_entry) {
    scopes_.assign(1, {});
    labels_.clear();
    branches_.clear();
    where_ = {};
    for (int i = 0; i < n_special_registers; ++i) scopes_[0][special_registers[i]] = {i};

    Function parsed;
    function_ = &parsed;
    parsed.is_entry = is_entry;
    if (accept("(")) {
      parsed.result = static_cast<int>(parse_parameter(false).at);
      expect(")");
    }
    parsed.name = std::string(next());
    if (accept("(")) {
      if (peek() != ")") parse_list([&] { parsed.parameters.push_back(parse_parameter(is_entry)); });
      expect(")");
    }
    if (accept(".maxntid")) {
      parsed.most_threads = 1;
      parse_list([&] { parsed.most_threads *= number(); });
    }
    // A call that stood before this keeps pointing at the function.
    std::unique_ptr<Function>& known = program_.functions[parsed.name];
    if (!known) known = std::make_unique<Function>();
    if (known->is_defined) throw Unknown("a second " + parsed.name);
    if (!accept(";")) {
      expect("{");
      parsed.is_defined = true;
      parse_body();
    }
    *known = std::move(parsed);
  }

  // .param .u64 name, .param .u64 .ptr .global .align 16 name, .param .align 8 .b8 name[56]
  Parameter parse_parameter(bool in_memory) {
    expect(".param");
    unsigned align = 0;
    if (accept(".align")) align = number();
    unsigned bytes = width_of(next());
    if (align == 0) align = bytes;
    if (accept(".ptr")) {  // what the pointer points at, which needs no belief: accesses are checked
      accept(".global");
      if (accept(".align")) number();
    }
    const std::string name(next());
    if (accept("[")) bytes *= number(), expect("]");
    if (!in_memory) {
      if (bytes > 8) throw Unknown("an argument of more than a register");
      return {static_cast<unsigned>(declare(name)), bytes};
    }
    const unsigned offset = (function_->parameter_bytes + align - 1) / align * align;
    function_->parameter_bytes = offset + bytes;
    scopes_.back()[name] = {-1, offset + first_address};
    return {offset, bytes};
  }

  static unsigned width_of(std::string_view type) {
    if (type == ".pred") return 1;
    const unsigned bits = static_cast<unsigned>(std::stoul(std::string(type.substr(2))));
    if (!std::strchr("bfsu", type[1]) || (bits != 8 && bits != 16 && bits != 32 && bits != 64)) {
      throw Unknown("the machine does not know the type " + std::string(type));
    }
    return bits / 8;
  }

  int declare(const std::string& name) {
    scopes_.back()[name] = {function_->registers};
    return function_->registers++;
  }

  void parse_body() {
    for (size_t depth = 1; depth > 0;) {
      const std::string_view word = peek();
      if (word.empty()) next();  // says that the file ends
      if (accept("{")) {
        ++depth, scopes_.emplace_back();
      } else if (accept("}")) {
        --depth, scopes_.pop_back();
      } else if (word == ".reg") {
        next(), width_of(next());
        parse_list([&] { parse_registers(); });
        expect(";");
      } else if (word == ".param") {
        parse_parameter(false);
        expect(";");
      } else if (word == ".local" && function_->is_entry) {
        next();
        const auto [name, bytes, start] = parse_array(function_->local_bytes + first_address);
        scopes_.back()[name] = {-1, start};
        function_->local_bytes = static_cast<unsigned>(start + bytes - first_address);
        expect(";");
      } else if (word == ".loc") {
        next();
        where_.source = file(number());
        where_.line = static_cast<int>(number());
        skip_rest_of_line();
      } else if (word == ".pragma") {
        while (next() != ";") continue;
      } else if (tokens_.at(at_ + 1).text == ":") {
        labels_[std::string(next())] = static_cast<int>(function_->code.size());
        next();
      } else if (word[0] == '.') {
        throw Unknown("the machine does not know " + std::string(word));
      } else if (!accept(";")) {
        parse_instruction();
      }
    }
    for (const auto& [i, label] : branches_) {
      const auto found = labels_.find(label);
      if (found == labels_.end()) throw Unknown("no label " + label);
      function_->code[i].target = found->second;
    }
  }

  // %name, or %name<12>: %name0 to %name11
  void parse_registers() {
    const std::string name(next());
    if (!accept("<")) {
      declare(name);
      return;
    }
    for (unsigned i = 0, n = number(); i < n; ++i) declare(name + std::to_string(i));
    expect(">");
  }

  // ---- instructions ----

  void parse_instruction() {
    Instruction made{};
    where_.ptx = path_, where_.ptx_line = tokens_[at_].line;
    made.where = where_;
    if (accept("@")) {
      made.guard_is_not = accept("!");
      made.guard = parse_operand(next(), "").index;
      if (made.guard < 0) throw Unknown("a guard that is no register");
    }
    const std::string name(next());
    if (name == "call" || name == "call.uni") {
      parse_call(made);
    } else if (name == "bra" || name == "bra.uni") {
      branches_.emplace_back(function_->code.size(), std::string(next()));
      made.execute = encoding_named("bra").execute;
    } else {
      const std::string whole_name = name + parse_operands(made, name);
      const Encoding encoding = encoding_named(whole_name);
      made.execute = encoding.execute;
      if (made.execute == nullptr) throw_at_instruction("the machine does not know the instruction " + whole_name);
      if (made.size != encoding.operands) throw_at_instruction("another number of operands than " + name + " has");
      for (int i = 0; i < encoding.results; ++i) {
        if (made.operands[i].index < 0) throw_at_instruction("a result that is no register");
      }
    }
    expect(";");
    function_->code.push_back(made);
  }

  [[noreturn]] void throw_at_instruction(const std::string& what) {
    --at_;  // the last token of it is on its line
    throw Unknown(what);
  }

  // Up to the semicolon. Returns what their form adds to the instruction's name: where they are no plain list.
  std::string parse_operands(Instruction& made, const std::string& name) {
    std::string form;
    while (peek() != ";") {
      if (accept("{")) {
        // {%r1, %r2}, %rd1 takes apart, and %rd1, {%r1, %r2} puts together. (Loads and stores of several words have
        // their number in their names.)
        if (name.substr(0, 4) == "mov.") form = made.size == 0 ? " apart" : " together";
        parse_list([&] { add(made, parse_operand(next(), name)); });
        expect("}");
      } else if (accept("[")) {
        const std::string_view base = next();
        add(made, parse_operand(base, "address"));
        if (made.operands[made.size - 1].index >= 0 && base[0] != '%') form = " register";  // an argument of a call
        add(made, {-1, accept("+") ? constant_of(next(), "address") : 0});
        expect("]");
      } else {
        add(made, parse_operand(next(), name));
        if (accept("|")) {
          form = " and predicate";
          add(made, parse_operand(next(), name));
        }
      }
      if (!accept(",") && peek() != ";") throw Unknown("operands that cannot be read");
    }
    return form;
  }

  void add(Instruction& made, Operand operand) {
    if (made.size == static_cast<int>(made.operands.size())) throw Unknown("too many operands");
    made.operands[made.size++] = operand;
  }

  Operand parse_operand(std::string_view word, const std::string& name) {
    if (is_number(word)) return {-1, constant_of(word, name)};
    const std::string text(word);
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->find(text);
      if (found != scope->end()) return found->second;
    }
    const auto found = program_.shared.find(text);
    if (found == program_.shared.end()) throw Unknown("the machine does not know the operand " + text);
    return {-1, found->second};
  }

  // (result), name, (arguments)
  void parse_call(Instruction& made) {
    Operand result;
    if (accept("(")) {
      result = parse_operand(next(), "");
      expect(")"), expect(",");
    }
    add(made, result);
    const std::string name(next());
    if (accept(",")) {
      expect("(");
      if (peek() != ")") parse_list([&] { add(made, parse_operand(next(), "")); });
      expect(")");
    }
    const auto found = program_.functions.find(name);
    if (found == program_.functions.end()) throw Unknown("a call of " + name + ", which is not declared");
    made.callee = found->second.get();
    made.execute = call_of(*made.callee);
    if (made.size - 1 != static_cast<int>(made.callee->parameters.size())) throw Unknown("a call with other arguments");
  }

  Program& program_;
  const std::string* path_;
  std::vector<Token> tokens_;
  size_t at_ = 0;
  std::map<unsigned, std::string*> files_;

  // Of the function that is being read.
  Function* function_ = nullptr;
  std::vector<std::map<std::string, Operand>> scopes_;
  std::map<std::string, int> labels_;
  std::vector<std::pair<size_t, std::string>> branches_;
  Location where_;
};

}  // namespace

std::string to_string(const Location& where) {
  std::ostringstream text;
  if (where.source) text << *where.source << ":" << where.line << " ";
  if (where.ptx) text << "(" << *where.ptx << ":" << where.ptx_line << ")";
  return text.str();
}

void load(Program& program, const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  if (!file) throw Unknown("no file " + path);
  const std::string whole = text.str();
  Parser(program, path, whole).parse();
  for (const auto& [name, function] : program.functions) {
    if (!function->is_defined && !is_of_machine(*function)) throw Unknown(path + ": " + name + " is nowhere defined");
  }
}

}  // namespace ptx
