// THE list of rules. Everything that must know them all (dispatch on CPU and CUDA, the table that Python reads) expands
// it.
#pragma once

#include "core/rules/adadelta.h"
#include "core/rules/adagrad.h"
#include "core/rules/adam.h"
#include "core/rules/adamax.h"
#include "core/rules/ademamix.h"
#include "core/rules/lamb.h"
#include "core/rules/lars.h"
#include "core/rules/lion.h"
#include "core/rules/muon.h"
#include "core/rules/nadam.h"
#include "core/rules/radam.h"
#include "core/rules/rmsprop.h"
#include "core/rules/sgd.h"

#define OPTIM8_RULES(X) \
    X(adam, Adam) \
    X(adam_amsgrad, AdamAmsgrad) \
    X(adamw, AdamW) \
    X(adamw_amsgrad, AdamWAmsgrad) \
    X(lion, Lion) \
    X(muon, Muon) \
    X(muon_adamw, MuonAdamW) \
    X(sgd, SGD) \
    X(sgd_plain, PlainSGD) \
    X(rmsprop, RMSprop) \
    X(rmsprop_momentum, RMSpropMomentum) \
    X(rmsprop_centered, RMSpropCentered) \
    X(rmsprop_centered_momentum, RMSpropCenteredMomentum) \
    X(adagrad, Adagrad) \
    X(adadelta, Adadelta) \
    X(adamax, Adamax) \
    X(nadam, NAdam) \
    X(radam, RAdam) \
    X(ademamix, AdEMAMix) \
    X(lamb, LAMB) \
    X(lars, LARS) \
    X(lars_plain, PlainLARS)

namespace optim8 {

enum class RuleId : uint8_t {
#define OPTIM8_RULE_ID(name, type) name,
    OPTIM8_RULES(OPTIM8_RULE_ID)
#undef OPTIM8_RULE_ID
};

}  // namespace optim8
