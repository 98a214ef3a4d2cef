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

OPTIM8_DECLARE_ISA(scalar)
#if defined(OPTIM8_HAVE_X86)
OPTIM8_DECLARE_ISA(avx2)
OPTIM8_DECLARE_ISA(avx512)
#endif

namespace {

struct Candidate {
    const Kernels* table;
    bool available;
};

// From the plainest to the fastest.
std::vector<Candidate> candidates() {
    std::vector<Candidate> all = {{&scalar::table, true}};
#if defined(OPTIM8_HAVE_X86)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512vbmi");
    all.push_back({&avx2::table, has_avx2});
    all.push_back({&avx512::table, has_avx512});
#endif
    return all;
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
