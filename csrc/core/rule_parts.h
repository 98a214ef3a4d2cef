// A source that has code for every rule takes minutes to compile. So those whose names end in _rules are compiled
// several times, each time for some of the rules: for part OPTIM8_PART of OPTIM8_PARTS. They define
//   template <> void name<OPTIM8_PART>(...)
// and whoever calls them chooses the part of a rule by with_part.
#pragma once

#include "core/row.h"

#include <type_traits>
#include <utility>

#if !defined(OPTIM8_PARTS)
#define OPTIM8_PARTS 1
#endif

OPTIM8_BEGIN

constexpr int part_of(RuleId id) { return static_cast<int>(id) % OPTIM8_PARTS; }

template <class Rule>
struct TypeOfRule {
    using type = Rule;
};

// work(TypeOfRule<Rule>) with the rule of this number, which is of this part.
template <int part, class Work>
void with_rule(RuleId id, const Work& work) {
    switch (id) {
#define OPTIM8_RULE_CASE(name, rule) \
    case RuleId::name: \
        if constexpr (part_of(RuleId::name) == part) work(TypeOfRule<rule>{}); \
        break;
        OPTIM8_RULES(OPTIM8_RULE_CASE)
#undef OPTIM8_RULE_CASE
    }
}

template <class Work, int... part>
void with_part(RuleId id, const Work& work, std::integer_sequence<int, part...>) {
    (void)((part_of(id) == part && (work(std::integral_constant<int, part>{}), true)) || ...);
}
// work(integral_constant) with the part of a rule.
template <class Work>
void with_part(RuleId id, const Work& work) {
    with_part(id, work, std::make_integer_sequence<int, OPTIM8_PARTS>{});
}

OPTIM8_END
