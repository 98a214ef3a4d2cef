// Runs the PTX that nvcc made of csrc/cuda on the CPU, so that the code which only nvcc compiles is run too: its inline
// PTX, its intrinsics, what its optimizer did. A warp at a time, until it ends or waits at a barrier, its 32 lanes in
// step. Lanes that part at a branch go on at the lowest line first, and together again where they meet. What PTX leaves
// undefined is a Fault, and so is an instruction that no kernel had yet: arithmetic.cpp and lanes.cpp list those that
// are known.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

constexpr int lanes = 32;
constexpr uint32_t everyone = 0xffffffffu;

// Which of the values that the documentation allows an approximation (rcp.approx, rsqrt.approx) gives. No result of
// optim8 may depend on it.
enum class Approximation { Nearest, Low, High, Mixed };
inline Approximation approximation = Approximation::Nearest;

struct Warp;
struct Instruction;
using Work = void (*)(Warp&, const Instruction&);

// Together: done by all lanes that a mask names, its last operand. Barrier: where all threads of a block wait for each
// other.
enum class Kind { Plain, Branch, Return, Together, Barrier };

constexpr int most_operands = 6;
struct Instruction {
    Work work = nullptr;
    Kind kind = Kind::Plain;
    bool guarded = false, negated = false;
    // Where registers and constants begin in the frame, in bytes: 32 values, or the 32 bits of a predicate.
    uint32_t guard = 0, operand[most_operands] = {};
    uint32_t target = 0;  // of a branch; of Together, where the mask is
    int64_t offset = 0;   // of an address
    const char* text = nullptr;
};

struct Parameter {
    uint32_t offset, size;
};
struct Kernel {
    std::string name;
    std::vector<Parameter> parameters;
    uint32_t parameter_bytes = 0, most_threads = 1024;
    std::vector<Instruction> code;
    std::vector<uint8_t> frame = std::vector<uint8_t>(64);  // registers and constants; nothing is at 0
    std::vector<std::vector<uint8_t>> frames;               // of warps
    std::vector<uint8_t> parameter_memory;
    uint32_t thread_index = 0, block_index = 0, block_count = 0;  // where the frame has them; 0: nowhere
    std::deque<std::string> lines;                                // what Instruction::text points into
    int architecture = 0;
    bool has_barrier = false;
    uint32_t most_shared_bytes = 48 * 1024;  // that a launch may ask for; cudaFuncSetAttribute allows more
};

// The dynamic shared memory of a block. Nobody may read a byte before it was written; where a barrier is missing, what
// a warp reads is not there yet. A device keeps the first addresses to itself.
constexpr uint32_t shared_begin = 1024;
struct Shared {
    std::vector<uint8_t> bytes, written;
};

struct Warp {
    Kernel* kernel;
    Shared* shared;
    uint8_t* frame;
    uint32_t mask;  // the lanes that run the instruction

    template <class T>
    T* at(uint32_t place) {
        return reinterpret_cast<T*>(frame + place);
    }
};

// Memory that kernels may touch. While none is named, they may touch everything.
void add_memory(void* begin, size_t bytes, bool writable = true);
void remove_memory(const void* begin);

// Where the latest access was.
struct Range {
    uint64_t begin = 0, end = 0;
};
inline Range last_read, last_written;
// The named memory around an access; Fault where there is none.
Range range_of(uint64_t address, size_t bytes, bool written, const Instruction& by);
[[noreturn]] void misaligned(uint64_t address, size_t alignment, const Instruction& by);

// The address of `bytes` bytes, which must be a multiple of that, in the memory named.
inline uint8_t* memory(uint64_t address, size_t bytes, bool written, const Instruction& by) {
    if (address % bytes != 0) misaligned(address, bytes, by);
    Range& last = written ? last_written : last_read;
    if (address < last.begin || address + bytes > last.end) last = range_of(address, bytes, written, by);
    return reinterpret_cast<uint8_t*>(address);
}
// Likewise of parameters.
inline uint8_t* parameters(const Kernel& kernel, uint64_t address, size_t bytes, const Instruction& by) {
    if (address % bytes != 0) misaligned(address, bytes, by);
    const auto begin = reinterpret_cast<uint64_t>(kernel.parameter_memory.data());
    if (address < begin || address + bytes > begin + kernel.parameter_bytes)
        throw Fault(std::string("reads beyond the parameters: ") + by.text);
    return reinterpret_cast<uint8_t*>(address);
}

// Likewise of shared memory.
uint8_t* shared_memory(Shared& shared, uint32_t address, size_t bytes, bool written, const Instruction& by);

// What an instruction's name and the bytes of its registers mean.
struct Form {
    Work work = nullptr;
    Kind kind = Kind::Plain;
    std::vector<int> bytes;  // of a value of each operand; 0: a predicate
};
// By name.
using Table = std::unordered_map<std::string, Form>;
void add_arithmetic(Table& table);
// `bytes` of the operands that are registers, else -1. Throws Fault where no such instruction is known.
Form form_of(const std::string& name, const std::vector<int>& bytes);

// All kernels of the .ptx files of a folder.
void load(const std::string& folder);
// The kernel of a mangled name; it is parsed the first time.
Kernel& kernel(const std::string& name);
// The compute capability of a device for all of them: 10 times the major number, plus the minor.
int architecture();
void run(Kernel& kernel, uint32_t blocks, uint32_t threads, uint32_t shared_bytes, void** arguments);

}  // namespace ptx
