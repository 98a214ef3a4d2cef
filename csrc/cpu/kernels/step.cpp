// One optimizer step over blocks of one tensor, for any rule.
#include "cpu/kernels/step_parts.h"
#include "cpu/kernels/vectors.h"

OPTIM8_BEGIN

void step_blocks(const Row& row, int64_t begin, int64_t end) {
    with_part(row.rule, [&](auto part) { step_part<decltype(part)::value>(row, begin, end); });
}

OPTIM8_END
