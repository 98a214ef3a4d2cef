// Cases of the optimizer step, for each rule that is compiled in.
#include "core/norms.h"
#include "core/rule_table.h"
#include "program.h"

namespace optim8 {
namespace {

constexpr int64_t most = 310 * step_block, most_blocks = most / step_block;  // values, blocks
constexpr int64_t room = most + 1;
alignas(16) unsigned char params[4 * room], grads[4 * room];
float wide_states[max_states][most], scales[max_states][most_blocks];
uint8_t codes[max_states][most], low[max_states][most];
int16_t low_of_param[most];
double of_blocks[norms * most_blocks], sums[norms];

struct Form {
    Precision precision;
    Rounding rounding;
    Weight weight;
    bool direct;
};

// Some steps of a rule from a state of any codes. P, G: of parameters and gradients, which begin at odd addresses.
template <class P, class G>
void steps(const Kernels& kernels, RuleId id, const Form& form, int64_t size, Kind kind, int count, Random& random) {
    const RuleInfo& info = rule_info(id);
    P* param = reinterpret_cast<P*>(params) + 1;
    G* grad = reinterpret_cast<G*>(grads) + 1;
    const int64_t blocks = blocks_of(size, step_block);
    StepOptions options;
    options.rule = id;
    for (int i = 0; i < info.hypers; ++i) options.value[i] = info.hyper[i].initial;
    options.gradient_scale = 0.75;
    options.rounding = form.rounding;
    options.weight = form.weight;
    options.direct = form.direct;
    fill(param, size, finite(kind) ? kind : Kind::Plain, random);
    fill_bits(low_of_param, size, random);
    for (int s = 0; s < info.states; ++s) {
        fill_bits(codes[s], size, random);
        fill_bits(low[s], size, random);
        fill(scales[s], blocks, Kind::Plain, random);
        fill(wide_states[s], size, Kind::Plain, random);
        for (int64_t b = 0; b < blocks; ++b) scales[s][b] = absolute(scales[s][b]);
        if (!is_signed(info.state[s].code))
            for (int64_t i = 0; i < size; ++i) wide_states[s][i] = absolute(wide_states[s][i]);
    }
    float running = info.running_start;
    const bool wide = form.precision == Precision::Bits32;
    for (int step = 1; step <= count; ++step) {
        fill(grad, size, kind, random);
        const AnyScalars scalars = info.derive(options, step, running);
        Row row{};
        row.param = param;
        row.grad = grad;
        for (int s = 0; s < info.states; ++s) {
            const bool has_low = form.precision == Precision::Bits16 ||
                                 (form.precision == Precision::Bits8 && !form.direct && info.state[s].wide);
            row.state[s] = wide ? static_cast<void*>(wide_states[s]) : codes[s];
            row.low[s] = has_low ? low[s] : nullptr;
            row.absmax[s] = wide ? nullptr : scales[s];
        }
        row.param_low = bytes_of(form.weight) > 0 ? low_of_param : nullptr;
        row.size = size;
        row.first_block = 12345;
        row.first_in_block = 100;  // of the dither of parameters
        row.scalars = &scalars;
        row.options = &options;
        row.sums = sums;
        row.of_blocks = of_blocks;
        row.rule = id;
        row.param_storage = storage_of<P>;
        row.grad_storage = storage_of<G>;
        row.precision = form.precision;
        row.weight = form.weight;
        row.rounding = form.rounding;
        row.direct = form.direct;
        if (info.has_norms) {
            kernels.measure_blocks(row, 0, blocks);
            BlockSums together;
            together.add(of_blocks, blocks);
            together.put(sums);
            put(of_blocks, norms * blocks);
        }
        kernels.step_blocks(row, 0, blocks);
    }
    put(param, size);
    if (bytes_of(form.weight) > 0) put_bytes(low_of_param, size * bytes_of(form.weight));
    for (int s = 0; s < info.states; ++s) {
        if (wide) {
            put(wide_states[s], size);
        } else {
            put(codes[s], size);
            put(low[s], size);
            put(scales[s], blocks);
        }
    }
}

template <class Work>
void each_rule(const Work& work) {
#define OPTIM8_EACH(name, type) work(RuleId::name);
    OPTIM8_RULES(OPTIM8_EACH)
#undef OPTIM8_EACH
}

constexpr Form forms_in_codes[] = {
    {Precision::Bits8, Rounding::Nearest, Weight::Plain, false},
    {Precision::Bits8, Rounding::Nearest, Weight::Plain, true},
    {Precision::Bits8, Rounding::Dithered, Weight::Plain, false},
    {Precision::Bits16, Rounding::Nearest, Weight::Plain, false},
    {Precision::Bits16, Rounding::Dithered, Weight::Plain, false},
};
constexpr int64_t sizes[] = {1, 255, 3 * step_block + 100};

}  // namespace

// Every form of state, for values of every kind.
void step_codes_case(const Kernels& kernels) {
    Random random{8};
    each_rule([&](RuleId id) {
        for (const Form& form : forms_in_codes) {
            if (form.direct && rule_info(id).functional_name == nullptr) continue;
            for (const Kind kind : kinds)
                for (const int64_t size : sizes) steps<float, float>(kernels, id, form, size, kind, 2, random);
        }
    });
}

// 32-bit state, and every form of a weight of 16 bits.
void step_wide_case(const Kernels& kernels) {
    Random random{9};
    each_rule([&](RuleId id) {
        for (const Precision precision : {Precision::Bits8, Precision::Bits32})
            for (const Kind kind : {Kind::Plain, Kind::Wide, Kind::Subnormal, Kind::NotFinite})
                for (const int64_t size : sizes) {
                    const auto form = [&](Weight weight) { return Form{precision, Rounding::Dithered, weight, false}; };
                    steps<float, float>(kernels, id, form(Weight::Plain), size, kind, 1, random);
                    for (const Weight weight : {Weight::Plain, Weight::Dithered, Weight::Bits24, Weight::Bits32}) {
                        steps<bfloat16, bfloat16>(kernels, id, form(weight), size, kind, 1, random);
                        steps<float16, float16>(kernels, id, form(weight), size, kind, 1, random);
                    }
                    steps<bfloat16, float>(kernels, id, form(Weight::Plain), size, kind, 1, random);
                }
    });
}

// A few hundred blocks and a tail.
void step_many_case(const Kernels& kernels) {
    Random random{10};
    each_rule(
        [&](RuleId id) { steps<float, float>(kernels, id, forms_in_codes[2], most - 56, Kind::Wide, 2, random); });
}

}  // namespace optim8
