#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace optim8 {

#define OPTIM8_DECLARE_KERNEL(name, job) void name(const job&, int64_t, int64_t);
#define OPTIM8_KERNEL_NAME(name, job) name,
#define OPTIM8_DECLARE_ISA(set) \
    namespace set { \
    OPTIM8_KERNELS(OPTIM8_DECLARE_KERNEL) \
    const Kernels table = {#set, OPTIM8_KERNELS(OPTIM8_KERNEL_NAME)}; \
    }

// X(set) for each set that setup.py compiles, from the plainest to the fastest.
OPTIM8_ISAS(OPTIM8_DECLARE_ISA)

namespace {

// Whether this machine has a set.
struct Has {
    static bool scalar() { return true; }
#if defined(__x86_64__)
    static bool avx2() {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
               __builtin_cpu_supports("bmi2");
    }
    static bool avx512bw() {
        return avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
    static bool avx512() { return avx512bw() && __builtin_cpu_supports("avx512vbmi"); }
#endif
    static bool neon() { return true; }  // part of every 64-bit Arm, where alone it is compiled
};

struct Candidate {
    const Kernels* table;
    bool available;
};

std::vector<Candidate> candidates() {
#define OPTIM8_CANDIDATE(set) {&set::table, Has::set()},
    return {OPTIM8_ISAS(OPTIM8_CANDIDATE)};
#undef OPTIM8_CANDIDATE
}

std::string join(const std::vector<std::string>& names) {
    std::string text;
    for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
    return text;
}

const Kernels& choose() {
    const std::vector<Candidate> all = candidates();
    const char* wanted = std::getenv("OPTIM8_CPU_ISA");
    if (wanted == nullptr || *wanted == '\0') {
        const Kernels* best = nullptr;
        for (const Candidate& c : all)
            if (c.available) best = c.table;
        return *best;
    }
    for (const Candidate& c : all)
        if (c.available && std::string(c.table->isa) == wanted) return *c.table;
    throw std::runtime_error(
        "OPTIM8_CPU_ISA must name an instruction set that is compiled in and that this machine has (" +
        join(available_isas()) + "), got '" + wanted + "'. Unset it to use the best one.");
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

std::vector<std::string> compiled_isas() {
    std::vector<std::string> names;
    for (const Candidate& c : candidates()) names.push_back(c.table->isa);
    return names;
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Candidate& c : candidates())
        if (c.available) names.push_back(c.table->isa);
    return names;
}

}  // namespace optim8
