// What the program is called by: cases, of which the output is compared, and single kernels, whose instructions are
// counted.
#include "program.h"
#include "core/rule_table.h"

using namespace optim8;

#define OPTIM8_EXPORT extern "C" __attribute__((visibility("default"), used))

extern "C" {
__attribute__((visibility("default"))) unsigned char output[output_room];
}

namespace {

constexpr const char* case_names[] = {
#define OPTIM8_CASE_NAME(name) #name,
    OPTIM8_CASES(OPTIM8_CASE_NAME)
#undef OPTIM8_CASE_NAME
};
void (*const cases[])(const Kernels&) = {
#define OPTIM8_CASE(name) name##_case,
    OPTIM8_CASES(OPTIM8_CASE)
#undef OPTIM8_CASE
};

// One tensor of float32, for counting.
constexpr int64_t counted = 64 * step_block;
float values[counted], grads[counted], scales[2][counted / step_block];
uint8_t codes[2][counted];
AnyScalars scalars;

}  // namespace

OPTIM8_EXPORT int64_t set_count() { return sizeof sets / sizeof *sets; }
OPTIM8_EXPORT const char* set_name(int64_t set) { return sets[set]->isa; }
OPTIM8_EXPORT int64_t case_count() { return sizeof cases / sizeof *cases; }
OPTIM8_EXPORT const char* case_name(int64_t i) { return case_names[i]; }
// The bytes that stand in `output` then.
OPTIM8_EXPORT int64_t run_case(int64_t set, int64_t i) {
    output_size = 0;
    cases[i](*sets[set]);
    return output_size;
}

OPTIM8_EXPORT int64_t counted_values() { return counted; }
OPTIM8_EXPORT void fill_counted() {
    Random random{11};
    fill(values, counted, Kind::Plain, random);
    fill(grads, counted, Kind::Plain, random);
    for (auto& of_state : codes) fill_bits(of_state, counted, random);
    for (auto& of_state : scales)
        for (float& scale : of_state) scale = absolute(value_of(Kind::Plain, random));
}
// A step of dithered 8-bit state.
OPTIM8_EXPORT void step_counted(int64_t set, int64_t rule) {
    const RuleInfo& info = rule_table[rule];
    StepOptions options;
    options.rule = info.id;
    for (int i = 0; i < info.hypers; ++i) options.value[i] = info.hyper[i].initial;
    float running = info.running_start;
    scalars = info.derive(options, 1, running);
    Row row{};
    row.param = values;
    row.grad = grads;
    for (int s = 0; s < info.states; ++s) {
        row.state[s] = codes[s];
        row.absmax[s] = scales[s];
    }
    row.size = counted;
    row.scalars = &scalars;
    row.rule = info.id;
    row.precision = Precision::Bits8;
    row.rounding = Rounding::Dithered;
    sets[set]->step_blocks(row, 0, counted / step_block);
}
OPTIM8_EXPORT const char* rule_name(int64_t rule) { return rule_table[rule].name; }
OPTIM8_EXPORT void quantize_counted(int64_t set) {
    sets[set]->quantize_blocks(
        {values, codes[0], scales[0], nullptr, nullptr, counted, step_block, Storage::Float32, CodeKind::Signed}, 0,
        counted / step_block);
}
OPTIM8_EXPORT void dequantize_counted(int64_t set) {
    sets[set]->dequantize_blocks(
        {codes[0], scales[0], nullptr, values, counted, step_block, Storage::Float32, CodeKind::Signed}, 0,
        counted / step_block);
}
