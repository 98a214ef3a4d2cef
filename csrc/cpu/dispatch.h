// The kernels of the instruction set in use, and the choice among those compiled.
#pragma once

#include "cpu/kernels/kernels.h"

#include <string>
#include <vector>

namespace optim8 {

struct Kernels {
    const char* isa;
#define OPTIM8_KERNEL_MEMBER(name, job) void (*name)(const job&, int64_t, int64_t);
    OPTIM8_KERNELS(OPTIM8_KERNEL_MEMBER)
#undef OPTIM8_KERNEL_MEMBER
};

// The best set this machine runs, or the one OPTIM8_CPU_ISA names. Chosen at the first call; throws
// std::runtime_error where the variable names a set that is unknown, not compiled, or not of this machine.
const Kernels& kernels();

std::vector<std::string> compiled_isas();
std::vector<std::string> available_isas();

}  // namespace optim8
