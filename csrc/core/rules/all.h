// THE list of rules. Everything that must know them all (dispatch on CPU and CUDA, names in Python) expands it.
#pragma once

#include "core/rules/adam.h"
#include "core/rules/lion.h"

#define OPTIM8_RULES(X) \
    X(adam, Adam) \
    X(adamw, AdamW) \
    X(lion, Lion)
