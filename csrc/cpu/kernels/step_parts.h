// The step of the rules of one part (core/rule_parts.h), over some blocks of a row.
#pragma once

#include "core/rule_parts.h"

OPTIM8_BEGIN

template <int part>
void step_part(const Row& row, int64_t begin, int64_t end);

OPTIM8_END
