// From the text of PTX to instructions: what cuobjdump -xptx writes, a statement a line.
#include "ptx.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <unordered_map>

namespace ptx {
namespace {

struct Source {
    std::string path, text;
    int architecture = 0;
    std::unordered_map<std::string, uint64_t> globals;  // addresses, also of shared memory
    std::deque<std::vector<uint8_t>> memory;
};
struct Entry {
    Source* source;
    size_t begin, end;
    std::unique_ptr<Kernel> kernel;
};
std::deque<Source> sources;
std::unordered_map<std::string, Entry> entries;

bool begins(const std::string& text, const std::string& with) { return text.rfind(with, 0) == 0; }

// nvcc's way to take one half of a register: "{ .reg .b16 tmp; mov.b32 {tmp, %rs1}, %r1; }".
const std::string unused_half = " tmp; mov.b";

// The lines of a text, without spaces around them.
class Lines {
  public:
    Lines(const std::string& text, size_t begin, size_t end) : text_(text), at_(begin), end_(end) {}
    bool next(std::string& line) {
        if (at_ >= end_) return false;
        begin = at_;
        const size_t stop = std::min(text_.find('\n', at_), end_);
        at_ = stop + 1;
        const size_t first = text_.find_first_not_of(" \t", begin), last = text_.find_last_not_of(" \t\r", stop - 1);
        line = first < stop && stop > begin ? text_.substr(first, last + 1 - first) : "";
        return true;
    }
    size_t begin = 0;  // of the line

  private:
    const std::string& text_;
    size_t at_, end_;
};

// ".global .align 4 .b8 NAME[16] = {1, 2, ...};", without the values too; ".extern .shared .align 16 .b8 NAME[];"
void add_global(Source& source, const std::string& line) {
    if (begins(line, ".extern .shared ")) {
        const size_t name = line.rfind(' ') + 1;
        source.globals[line.substr(name, line.find('[', name) - name)] = shared_begin;
        return;
    }
    const size_t type = line.find(".b8 "), open = line.find('['), values = line.find('{');
    if (type == std::string::npos || open == std::string::npos || !begins(line, ".global"))
        throw Fault("what is this? " + line.substr(0, 100));
    std::vector<uint8_t>& memory = source.memory.emplace_back(std::stoul(line.substr(open + 1)));
    const char* at = values == std::string::npos ? "" : line.c_str() + values + 1;
    for (uint8_t& byte : memory) {
        char* after = nullptr;
        byte = static_cast<uint8_t>(std::strtoul(at, &after, 10));
        if (after == at) break;
        at = after + (*after == ',');
    }
    source.globals[line.substr(type + 4, open - type - 4)] = reinterpret_cast<uint64_t>(memory.data());
    add_memory(memory.data(), memory.size(), false);
}

void read_source(Source& source) {
    Lines lines(source.text, 0, source.text.size());
    std::string line;
    Entry* entry = nullptr;
    while (lines.next(line)) {
        const size_t name = line.find(".entry ");
        if (entry != nullptr) {
            entry->end = lines.begin + line.size();
            if (line == "}") entry = nullptr;
        } else if (name != std::string::npos) {
            const std::string of = line.substr(name + 7, line.find('(') - name - 7);
            const auto [place, is_new] = entries.try_emplace(of, Entry{&source, lines.begin, 0, nullptr});
            if (!is_new) throw Fault("two kernels are called " + of);
            entry = &place->second;
        } else if (begins(line, ".target sm_")) {
            source.architecture = std::stoi(line.substr(11));
        } else if (line.empty() || begins(line, "//") || begins(line, ".version") || begins(line, ".address_size")) {
        } else {
            add_global(source, line);
        }
    }
}

struct Registers {
    int bytes;
    uint32_t begin, count;
};

class Parser {
  public:
    Parser(Kernel& kernel, Source& source) : kernel_(kernel), source_(source) {}

    void parse(size_t begin, size_t end) {
        std::string line;
        Lines lines(source_.text, begin, end);
        while (lines.next(line)) {
            try {
                parse_line(line);
            } catch (const Fault& fault) {
                throw Fault(std::string(fault.what()) + " In: " + line);
            }
        }
        kernel_.code.push_back(Instruction());
        kernel_.code.back().kind = Kind::Return;
        for (auto [at, label] : branches_) {
            if (!labels_.count(label)) throw Fault("there is no label " + label);
            kernel_.code[at].target = labels_.at(label);
        }
    }

  private:
    void parse_line(const std::string& line) {
        if (line.empty() || line == "{" || line == "}" || line == ")" || line == "(") return;
        if (line[0] == '$') {
            labels_[line.substr(0, line.find(':'))] = static_cast<uint32_t>(kernel_.code.size());
        } else if (begins(line, ".param ")) {
            add_parameter(line);
        } else if (begins(line, ".reg ")) {
            add_registers(line);
        } else if (begins(line, ".maxntid ")) {
            kernel_.most_threads = static_cast<uint32_t>(std::stoul(line.substr(9)));
        } else if (line.find(".entry ") != std::string::npos || begins(line, ".minnctapersm ") ||
                   begins(line, ".pragma ")) {
        } else if (const size_t half = line.find(unused_half); half != std::string::npos && line.back() == '}') {
            std::string statement = line.substr(half + unused_half.size(), line.rfind(';') - half - unused_half.size());
            add_statement("mov.b" + statement.replace(statement.find("tmp"), 3, "_"));
        } else if (line[0] == '.' || line.back() != ';') {
            throw Fault("this is not known.");
        } else {
            add_statement(line.substr(0, line.size() - 1));
        }
    }

    // ".param .u64 NAME,", ".param .u64 .ptr .align 1 NAME," or ".param .align 8 .b8 NAME[16]".
    void add_parameter(const std::string& line) {
        std::istringstream words(line.substr(7));
        std::string type, name, of_target;
        uint32_t alignment = 0, count = 1;
        words >> type;
        if (type == ".align") words >> alignment >> type;
        words >> name;
        if (name == ".ptr") words >> of_target >> of_target >> name;
        if (name.back() == ',') name.pop_back();
        const uint32_t size = static_cast<uint32_t>(std::stoul(type.substr(2))) / 8;
        if (const size_t open = name.find('['); open != std::string::npos) {
            count = static_cast<uint32_t>(std::stoul(name.substr(open + 1)));
            name.resize(open);
        }
        alignment = std::max(alignment, size);
        const uint32_t offset = (kernel_.parameter_bytes + alignment - 1) / alignment * alignment;
        kernel_.parameters.push_back({offset, count * size});
        kernel_.parameter_bytes = offset + count * size;
        parameter_names_.emplace_back(name, offset);
    }

    // ".reg .b32 %r<23>;"
    void add_registers(const std::string& line) {
        const size_t percent = line.find('%'), open = line.find('<');
        const std::string type = line.substr(5, line.find(' ', 5) - 5);
        if (percent == std::string::npos || open == std::string::npos) throw Fault("this is not known.");
        const int bytes = type == ".pred" ? 0 : std::stoi(type.substr(2)) / 8;
        const auto count = static_cast<uint32_t>(std::stoul(line.substr(open + 1)));
        const size_t size = bytes == 0 ? 4 * count : bytes * lanes * count;
        const uint32_t place = room(size);
        registers_[line.substr(percent, open - percent)] = {bytes, place, count};
        // What is read before it is written must not happen to be 0.
        std::memset(kernel_.frame.data() + place, 0xa5, size);
    }
    uint32_t room(size_t bytes) {
        const size_t begin = kernel_.frame.size();
        kernel_.frame.resize((begin + bytes + 63) / 64 * 64);
        return static_cast<uint32_t>(begin);
    }

    // Whether a text is a register; then where it is, and its bytes.
    bool find_register(const std::string& text, uint32_t& place, int& bytes) {
        if (text[0] != '%') return false;
        bytes = 4;
        for (const auto& [name, index] : {std::pair{"%tid.x", &kernel_.thread_index},
                                          {"%ctaid.x", &kernel_.block_index},
                                          {"%nctaid.x", &kernel_.block_count}}) {
            if (text != name) continue;
            if (*index == 0) *index = room(4 * lanes);
            place = *index;
            return true;
        }
        const size_t digit = text.find_first_of("0123456789");
        const auto found = registers_.find(text.substr(0, digit));
        if (digit == std::string::npos || found == registers_.end()) throw Fault("there is no register " + text + ".");
        const auto i = static_cast<uint32_t>(std::stoul(text.substr(digit)));
        if (i >= found->second.count) throw Fault("there is no register " + text + ".");
        bytes = found->second.bytes;
        place = found->second.begin + i * (bytes == 0 ? 4 : bytes * lanes);
        return true;
    }

    uint64_t value_of(const std::string& text) {
        if (text[0] == '0' && text.size() > 2 && std::strchr("fFdD", text[1]))
            return std::stoull(text.substr(2), nullptr, 16);
        if (text[0] == '-') return static_cast<uint64_t>(std::stoll(text, nullptr, 0));
        if (text[0] >= '0' && text[0] <= '9') return std::stoull(text, nullptr, 0);
        if (kernel_.parameter_memory.empty()) kernel_.parameter_memory.resize(kernel_.parameter_bytes + 1);
        for (const auto& [name, offset] : parameter_names_)
            if (name == text) return reinterpret_cast<uint64_t>(kernel_.parameter_memory.data()) + offset;
        const auto global = source_.globals.find(text);
        if (global == source_.globals.end()) throw Fault("there is no " + text + ".");
        return global->second;
    }
    // A value in every lane.
    uint32_t constant(const std::string& text, int bytes) {
        const uint64_t value = value_of(text);
        const auto [place, is_new] = constants_.try_emplace({value, bytes}, 0);
        if (!is_new) return place->second;
        place->second = room(bytes == 0 ? 4 : bytes * lanes);
        uint8_t* to = kernel_.frame.data() + place->second;
        if (bytes == 0) std::memset(to, value != 0 ? 255 : 0, 4);
        for (int l = 0; l < lanes && bytes > 0; ++l) std::memcpy(to + l * bytes, &value, bytes);
        return place->second;
    }

    void add_statement(const std::string& statement) {
        Instruction n;
        n.text = kernel_.lines.emplace_back(statement).c_str();
        size_t at = 0;
        if (statement[0] == '@') {
            n.guarded = true;
            n.negated = statement[1] == '!';
            at = statement.find(' ');
            int bytes = 0;
            find_register(statement.substr(n.negated ? 2 : 1, at - (n.negated ? 2 : 1)), n.guard, bytes);
            ++at;
        }
        const size_t space = std::min(statement.find(' ', at), statement.size());
        std::string name = statement.substr(at, space - at);
        const std::string rest = space < statement.size() ? statement.substr(space + 1) : "";
        if (name == "bra" || name == "bra.uni" || name == "ret") {
            n.kind = name == "ret" ? Kind::Return : Kind::Branch;
            if (name != "ret") branches_.emplace_back(kernel_.code.size(), rest);
            kernel_.code.push_back(n);
            return;
        }
        // Braces and brackets only group; what is added to an address is the instruction's.
        std::vector<std::string> operands(1);
        for (char c : rest) {
            if (c == ',' || c == '|')
                operands.emplace_back();
            else if (!std::strchr("{} []", c))
                operands.back() += c;
        }
        if (const size_t open = rest.find('['); open != std::string::npos)
            for (std::string& operand : operands)
                if (const size_t plus = operand.find('+'); plus != std::string::npos) {
                    n.offset = std::stoll(operand.substr(plus + 1));
                    operand.resize(plus);
                }
        if (begins(name, "mov.b") && rest[0] == '{') {
            for (int i = 0; i < 2; ++i)
                if (operands[i] != "_") add(n, name + (i == 0 ? ":low" : ":high"), {operands[i], operands[2]});
            return;
        }
        if (begins(name, "mov.b") && rest.find('{') != std::string::npos) name += ":pack";
        if (begins(name, "ld.") || begins(name, "st.")) {
            uint32_t place = 0;
            int bytes = 0;
            if (!find_register(operands[name[0] == 'l' ? 0 : 1], place, bytes)) throw Fault("no register is here.");
            name += ':';
            name += std::to_string(bytes);
        }
        add(n, name, operands);
    }

    void add(Instruction n, const std::string& name, const std::vector<std::string>& operands) {
        if (operands.size() > most_operands) throw Fault("these are too many operands.");
        std::vector<int> bytes(operands.size(), -1);
        for (size_t i = 0; i < operands.size(); ++i) find_register(operands[i], n.operand[i], bytes[i]);
        const Form form = form_of(name, bytes);
        for (size_t i = 0; i < operands.size(); ++i)
            if (bytes[i] < 0) n.operand[i] = constant(operands[i], form.bytes[i]);
        n.work = form.work;
        n.kind = form.kind;
        if (n.kind == Kind::Together) {
            if (n.guarded) throw Fault("lanes are left out of what they do together.");
            n.target = n.operand[operands.size() - 1];  // the mask
        }
        if (n.kind == Kind::Barrier) {
            if (n.guarded || operands[0] != "0") throw Fault("only barrier 0, of all threads, is known.");
            kernel_.has_barrier = true;
        }
        kernel_.code.push_back(n);
    }

    Kernel& kernel_;
    Source& source_;
    std::unordered_map<std::string, Registers> registers_;
    std::vector<std::pair<std::string, uint32_t>> parameter_names_;
    std::map<std::pair<uint64_t, int>, uint32_t> constants_;
    std::unordered_map<std::string, uint32_t> labels_;
    std::vector<std::pair<size_t, std::string>> branches_;
};

}  // namespace

void load(const std::string& folder) {
    std::vector<std::filesystem::path> paths;
    for (const auto& file : std::filesystem::directory_iterator(folder))
        if (file.path().extension() == ".ptx") paths.push_back(file.path());
    std::sort(paths.begin(), paths.end());
    if (paths.empty()) throw Fault("there is no PTX in " + folder);
    for (const auto& path : paths) {
        std::ostringstream text;
        text << std::ifstream(path).rdbuf();
        Source& source = sources.emplace_back();
        source.path = path.string();
        source.text = text.str();
        read_source(source);
    }
}

int architecture() {
    int highest = 0;
    for (const Source& source : sources) highest = std::max(highest, source.architecture);
    return highest;
}

Kernel& kernel(const std::string& name) {
    const auto found = entries.find(name);
    if (found == entries.end()) throw Fault("there is no PTX of the kernel " + name);
    Entry& entry = found->second;
    if (entry.kernel == nullptr) {
        auto parsed = std::make_unique<Kernel>();
        parsed->name = name;
        parsed->architecture = entry.source->architecture;
        Parser(*parsed, *entry.source).parse(entry.begin, entry.end);
        entry.kernel = std::move(parsed);
    }
    return *entry.kernel;
}

}  // namespace ptx
