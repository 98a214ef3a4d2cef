// Runs the kernels of csrc/cuda over the shim beside those of csrc/cpu and compares every bit.
// Arguments: which kernels (step, step-columns, step-long, quick, blockwise, fourbit, int8), and the order in which
// threads take turns.
#include "compare.h"

#include <cstdlib>
#include <functional>
#include <map>

namespace optim8 {
void compare_step_columns();
void compare_step_long();
}  // namespace optim8

int main(int count, char** arguments) {
    const std::map<std::string, std::function<void()>> parts = {{"step", optim8::compare_step},
                                                                {"step-long", optim8::compare_step_long},
                                                                {"step-columns", optim8::compare_step_columns},
                                                                {"quick", optim8::compare_quick},
                                                                {"blockwise", optim8::compare_blockwise},
                                                                {"fourbit", optim8::compare_fourbit},
                                                                {"int8", optim8::compare_int8}};
    const std::map<std::string, cuda_on_cpu::Order> orders = {{"forward", cuda_on_cpu::Order::Forward},
                                                              {"reverse", cuda_on_cpu::Order::Reverse},
                                                              {"random", cuda_on_cpu::Order::Random},
                                                              {"in-turn", cuda_on_cpu::Order::InTurn}};
    if (count != 3 || !parts.count(arguments[1]) || !orders.count(arguments[2])) {
        std::fprintf(
            stderr,
            "usage: compare step|step-columns|step-long|quick|blockwise|fourbit|int8 forward|reverse|random|in-turn\n");
        return 2;
    }
    cuda_on_cpu::set_order(orders.at(arguments[2]), 7);
    parts.at(arguments[1])();
    std::printf("%ld values compared, %ld differ\n", optim8::compared, optim8::differing);
    return optim8::differing == 0 && optim8::compared > 0 ? 0 : 1;
}
