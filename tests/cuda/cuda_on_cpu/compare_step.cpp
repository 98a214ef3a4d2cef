#include "compare.h"

#include "core/code16.h"
#include "core/norms.h"
#include "core/rule_table.h"

namespace optim8 {
namespace {

constexpr int64_t sizes[] = {0, 1, 3, 255, 256, 257, 1000, 1024, 1279};

// How a state is stored.
struct Form {
    Precision precision;
    Rounding rounding;
    bool direct = false;
    Weight weight = Weight::Plain;
};
constexpr Form dithered{Precision::Bits8, Rounding::Dithered},
    dithered_param{Precision::Bits8, Rounding::Dithered, false, Weight::Dithered},
    bits24{Precision::Bits8, Rounding::Nearest, false, Weight::Bits24},
    bits32{Precision::Bits16, Rounding::Dithered, false, Weight::Bits32},
    wide24{Precision::Bits32, Rounding::Nearest, false, Weight::Bits24},
    wide32{Precision::Bits32, Rounding::Nearest, false, Weight::Bits32}, nearest{Precision::Bits8, Rounding::Nearest},
    direct{Precision::Bits8, Rounding::Nearest, true}, dithered16{Precision::Bits16, Rounding::Dithered},
    nearest16{Precision::Bits16, Rounding::Nearest}, wide{Precision::Bits32, Rounding::Nearest};

const RuleInfo& info_of(RuleId rule) { return rule_info(rule); }

Buffer<uint8_t> low24_of(int64_t size, int64_t offset, Form form) {
    return Buffer<uint8_t>(form.weight == Weight::Bits24 ? size : 0, offset);
}
Buffer<int16_t> low32_of(int64_t size, int64_t offset, Form form) {
    return Buffer<int16_t>(form.weight == Weight::Bits32 ? size : 0, offset);
}

// One tensor of a step, twice: what the kernels on trial work on, and what the CPU's do.
template <class P, class G>
struct Tensor {
    struct Side {
        Buffer<P> param;
        std::vector<Buffer<uint8_t>> codes, low;
        std::vector<Buffer<float>> absmax, wide;
        Buffer<uint8_t> low24;
        Buffer<int16_t> low32;
        Buffer<float> step{1}, running{1};
        Row row{};
    };
    Buffer<G> grad;
    Side actual, expected;

    Tensor(int64_t size, int64_t offset, Kind kind, RuleId rule, Form form)
        : grad(size, offset),
          actual{Buffer<P>(size, offset), {}, {}, {}, {}, low24_of(size, offset, form), low32_of(size, offset, form)},
          expected{Buffer<P>(size, offset),     {}, {}, {}, {}, low24_of(size, offset, form),
                   low32_of(size, offset, form)} {
        const bool coded = form.precision != Precision::Bits32;
        fill(grad, kind);
        // Weights that are wider than their parameters have bits of their own for NaN and 0.
        fill(actual.param, form.weight == Weight::Plain ? Kind::Plain : kind);
        for (int s = 0; s < info_of(rule).states; ++s) {
            const bool is_wide = coded && info_of(rule).state[s].wide;  // no such rule keeps states directly
            const bool has_low = form.precision == Precision::Bits16 || is_wide;
            actual.codes.emplace_back(coded ? size : 0, offset);
            actual.low.emplace_back(has_low ? size : 0, offset);
            actual.absmax.emplace_back(coded ? blocks_of(size, step_block) : 0);
            actual.wide.emplace_back(coded ? 0 : size, offset);
            fill_codes(actual.codes[s]);
            fill_codes(actual.low[s]);
            // Where there is no sign, only 0 has its code.
            for (int64_t i = 0; i < actual.low[s].size() && info_of(rule).state[s].code != Code::Signed; ++i)
                if (actual.codes[s][i] == 0) actual.low[s][i] = middle_low;
            fill(actual.absmax[s], kind == Kind::Subnormal ? kind : Kind::Plain);
            fill(actual.wide[s], Kind::Plain);
            for (int64_t i = 0; i < actual.absmax[s].size(); ++i) actual.absmax[s][i] = std::fabs(actual.absmax[s][i]);
            for (int64_t i = 0; i < actual.wide[s].size() && info_of(rule).state[s].code != Code::Signed; ++i)
                actual.wide[s][i] = std::fabs(actual.wide[s][i]);
            expected.codes.push_back(actual.codes[s].copy());
            expected.low.push_back(actual.low[s].copy());
            expected.absmax.push_back(actual.absmax[s].copy());
            expected.wide.push_back(actual.wide[s].copy());
        }
        fill_codes(actual.low24);
        fill_codes(actual.low32);
        expected.param = actual.param.copy();
        expected.low24 = actual.low24.copy();
        expected.low32 = actual.low32.copy();
        for (Side* side : {&actual, &expected}) {
            Row& row = side->row;
            row.param = side->param.data();
            row.grad = grad.data();
            row.size = size;
            row.rule = rule;
            row.param_storage = storage_of<P>;
            row.grad_storage = storage_of<G>;
            row.precision = form.precision;
            row.rounding = form.rounding;
            row.direct = form.direct;
            row.weight = form.weight;
            if (form.weight == Weight::Bits24) row.param_low = side->low24.data();
            if (form.weight == Weight::Bits32) row.param_low = side->low32.data();
            row.first_block = static_cast<uint32_t>(1000 * size + offset);
            row.first_in_block = static_cast<uint32_t>(size % 3 == 0 ? 0 : size % step_block);
            for (size_t s = 0; s < side->codes.size(); ++s) {
                row.state[s] = coded ? static_cast<void*>(side->codes[s].data()) : side->wide[s].data();
                row.low[s] = side->low[s].size() > 0 ? side->low[s].data() : nullptr;
                row.absmax[s] = side->absmax[s].data();
            }
        }
    }
    void compare(const std::string& what) const {
        expect_same(what + " param", actual.param, expected.param);
        expect_same(what + " low24", actual.low24, expected.low24);
        expect_same(what + " low32", actual.low32, expected.low32);
        expect_same(what + " step", actual.step, expected.step);
        expect_same(what + " running", actual.running, expected.running);
        for (size_t s = 0; s < actual.codes.size(); ++s) {
            const std::string state = what + " state " + std::to_string(s);
            expect_same(state + " codes", actual.codes[s], expected.codes[s]);
            expect_same(state + " low", actual.low[s], expected.low[s]);
            expect_same(state + " absmax", actual.absmax[s], expected.absmax[s]);
            expect_same(state + " wide", actual.wide[s], expected.wide[s]);
        }
    }
};

// Options none of which is a default, where the rule's bounds allow it.
StepOptions options_of(RuleId rule, int i) {
    StepOptions options;
    const RuleInfo& info = info_of(rule);
    for (int h = 0; h < info.hypers; ++h) {
        const HyperInfo& hyper = info.hyper[h];
        double& value = options.value[h];
        const std::string name = hyper.name;
        if (hyper.kind == HyperKind::Flag)
            value = i % 2;
        else if (hyper.kind == HyperKind::Optional)
            value = i % 3 ? 10.0 * i : 0.0;
        else if (name == "lr")
            value = 3e-3 * (1 + i % 3);
        else if (name == "eps")
            value = i % 2 ? 0.0 : 1e-6;
        else if (hyper.below == 1)
            value = hyper.part == 1 ? 0.95 : 0.8;
        else
            value = 0.03;
    }
    options.maximize = i % 2 != 0;
    return options;
}

double& lr_of(RuleId rule, StepOptions& options) {
    int h = 0;
    while (std::string(info_of(rule).hyper[h].name) != "lr") ++h;
    return options.value[h];
}

// How the scalars of the step come to the device.
enum class Scalar { Host, Device, Skipped };

// `every`: 2, for options of which none changes the sign of gradients, or has an eps of 0.
template <class P, class G>
void compare_tensors(RuleId rule, std::vector<Tensor<P, G>>& tensors, Scalar scalar, const std::string& what,
                     int every = 1) {
    std::vector<StepOptions> all;
    for (int i = 0; i < 20; ++i) all.push_back(options_of(rule, i * every));
    std::vector<AnyScalars> scalars(tensors.size());
    Buffer<float> lr(1), scale(1), found_inf(1);
    lr[0] = 0.0123f;
    scale[0] = 1024;
    found_inf[0] = scalar == Scalar::Skipped ? 1 : 0;
    std::vector<Row> rows;
    for (size_t i = 0; i < tensors.size(); ++i) {
        auto& [grad, actual, expected] = tensors[i];
        StepOptions& options = all[i % all.size()];
        const RuleInfo& info = info_of(rule);
        const bool counts = info.states > 0 || actual.row.weight != Weight::Plain;
        actual.step[0] = expected.step[0] = counts ? static_cast<float>(i % 5) : 0.0f;
        actual.running[0] = expected.running[0] = info.running_start - 0.01f * static_cast<float>(i % 3);
        if (scalar == Scalar::Host) {
            float running = expected.running[0];
            scalars[i] = info.derive(options, 1 + i % 5, running);
            actual.row.scalars = expected.row.scalars = &scalars[i];
        } else {
            options.device_lr = i % 2 ? lr.data() : nullptr;
            actual.row.device_step = counts ? actual.step.data() : nullptr;
            actual.row.device_running = info.running == nullptr ? nullptr : actual.running.data();
            actual.row.options = &options;
            StepOptions whole = options;
            if (i % 2) lr_of(rule, whole) = lr[0];
            whole.gradient_scale = 1.0 / scale[0];
            if (scalar == Scalar::Device && counts) expected.step[0] += 1;
            float skipped = expected.running[0];
            float& running = scalar == Scalar::Device && info.running != nullptr ? expected.running[0] : skipped;
            scalars[i] = info.derive(whole, counts ? expected.step[0] : 1, running);
            expected.row.scalars = &scalars[i];
        }
        rows.push_back(actual.row);
    }
    Buffer<AnyScalars> scratch(static_cast<int64_t>(rows.size()));
    StepInputs inputs{};
    if (scalar != Scalar::Host) inputs = StepInputs{scale.data(), found_inf.data(), scratch.data()};
    int64_t blocks = 0;
    for (const Row& row : rows) blocks += blocks_of(row.size, step_block);
    const int64_t sums_of_rows = norms * static_cast<int64_t>(rows.size());
    Buffer<double> sums(sums_of_rows), expected_sums(sums_of_rows), of_blocks(norms * blocks);
    if (info_of(rule).has_norms) {
        inputs.scalars = scratch.data();
        inputs.sums = sums.data();
        inputs.of_blocks = of_blocks.data();
        cuda_measure(rows.data(), static_cast<int64_t>(rows.size()), inputs, nullptr);
        inputs.counted = true;
        for (size_t i = 0; i < tensors.size() && scalar != Scalar::Skipped; ++i) {
            Row& row = tensors[i].expected.row;
            row.of_blocks = of_blocks.data();
            row.sums = expected_sums.data() + norms * i;
            scalar::measure_blocks(row, 0, blocks_of(row.size, step_block));
            BlockSums sums;
            sums.add(row.of_blocks, blocks_of(row.size, step_block));
            sums.put(row.sums);
        }
        expect_same(what + " sums", sums, expected_sums);
    }
    cuda_step(rows.data(), static_cast<int64_t>(rows.size()), inputs, nullptr);
    for (size_t i = 0; i < tensors.size(); ++i) {
        const Row& row = tensors[i].expected.row;
        if (scalar != Scalar::Skipped) scalar::step_blocks(row, 0, blocks_of(row.size, step_block));
        tensors[i].compare(what + " rule " + std::to_string(static_cast<int>(rule)) + " tensor " + std::to_string(i) +
                           " of " + std::to_string(row.size));
    }
}

template <class P, class G>
void compare_types(RuleId rule) {
    const std::string types = std::string(name_of<P>()) + "/" + name_of<G>();
    for (Kind kind : kinds) {
        std::vector<Tensor<P, G>> tensors;
        for (const Form& form : {dithered, nearest, direct, dithered16, nearest16, wide})
            for (int64_t size : sizes)
                for (int64_t offset : {0, 1}) tensors.emplace_back(size, offset, kind, rule, form);
        for (const Form& form : {dithered_param, bits24, bits32, wide24, wide32})
            for (int64_t size : sizes)
                if (sizeof(P) == 2) tensors.emplace_back(size, size % 2, kind, rule, form);
        compare_tensors(rule, tensors, Scalar::Host, types + " kind " + std::to_string(static_cast<int>(kind)));
    }
    for (Scalar scalar : {Scalar::Device, Scalar::Skipped}) {
        std::vector<Tensor<P, G>> tensors;
        for (int64_t size : sizes) tensors.emplace_back(size, 0, Kind::Plain, rule, dithered);
        if (sizeof(P) == 2) tensors.emplace_back(300, 0, Kind::Plain, rule, bits24);
        compare_tensors(rule, tensors, scalar, types + " scalars on the device");
    }
}

// Blocks that have no state yet, and blocks that have no second moment yet and gradients over many decades.
template <class P, class G>
void begin_anew(Tensor<P, G>& tensor) {
    const int64_t blocks = tensor.actual.absmax[0].size();
    for (int64_t b = 0; b < blocks; ++b) {
        if (b % 5 != 3 && b % 7 != 2) continue;
        for (auto* side : {&tensor.actual, &tensor.expected})
            for (size_t s = b % 5 == 3 ? 0 : 1; s < side->absmax.size(); ++s) side->absmax[s][b] = 0;
        for (int64_t i = b * step_block; b % 5 == 3 && i < (b + 1) * step_block && i < tensor.grad.size(); ++i)
            tensor.grad[i] = G{};
    }
}

// Enough blocks for the kernel over columns: rows that begin and end anywhere in the shares of its warps, and among
// them some that it leaves to others.
template <class P, class G>
void compare_columns(RuleId rule, Kind kind) {
    for (const auto& [scalar, every] : {std::pair{Scalar::Host, 1}, {Scalar::Host, 2}, {Scalar::Device, 2}}) {
        std::vector<Tensor<P, G>> tensors;
        for (int64_t blocks : {1, 3, 70, 17, 0, 128, 64, 33}) {
            tensors.emplace_back(blocks * step_block + (blocks % 2 ? 0 : blocks % 11), 0, kind, rule, dithered);
            begin_anew(tensors.back());
        }
        tensors.emplace_back(5 * step_block, 1, kind, rule, dithered);
        tensors.emplace_back(5 * step_block, 0, kind, rule, wide);
        if (sizeof(P) == 2) tensors.emplace_back(2 * step_block, 0, kind, rule, bits24);
        const std::string types = std::string(name_of<P>()) + "/" + name_of<G>();
        const long before = cuda_on_cpu::launches_with_memory;
        compare_tensors(rule, tensors, scalar, "columns " + types + " kind " + std::to_string(static_cast<int>(kind)),
                        every);
        if (cuda_on_cpu::launches_with_memory > before) continue;
        std::printf("columns: the kernel over columns was not launched\n");
        ++differing;
    }
}
template <class Rule>
void compare_columns(RuleId rule) {
    if constexpr (Rule::in_columns) {
        for (Kind kind : kinds) {
            compare_columns<float, float>(rule, kind);
            compare_columns<bfloat16, bfloat16>(rule, kind);
        }
        compare_columns<bfloat16, float>(rule, Kind::Wide);
        compare_columns<float16, float16>(rule, Kind::Wide);
        compare_columns<float16, float>(rule, Kind::Wide);
    }
}

// More tensors than one launch takes, and more different scalars and hypers.
void compare_many() {
    for (Scalar scalar : {Scalar::Host, Scalar::Device}) {
        std::vector<Tensor<float, float>> tensors;
        for (int i = 0; i < 800; ++i)
            tensors.emplace_back(i % 3, 0, Kind::Plain, RuleId::adamw, i % 2 ? dithered : wide);
        compare_tensors(RuleId::adamw, tensors, scalar, "many tensors");
    }
}

// Several chunks of a sum.
void compare_chunks() {
    std::vector<Tensor<bfloat16, bfloat16>> tensors;
    tensors.emplace_back(int64_t{256} * 2100 + 3, 0, Kind::Plain, RuleId::lamb, dithered);
    compare_tensors(RuleId::lamb, tensors, Scalar::Host, "chunks");
}

// Enough blocks for warps to take several each.
void compare_long() {
    std::vector<Tensor<bfloat16, bfloat16>> tensors;
    tensors.emplace_back(int64_t{256} * 40000, 0, Kind::Plain, RuleId::lion, dithered);
    tensors.emplace_back(int64_t{256} * 30000 + 17, 0, Kind::Plain, RuleId::lion, dithered);
    compare_tensors(RuleId::lion, tensors, Scalar::Host, "long");
}

}  // namespace

void compare_step() {
#define OPTIM8_COMPARE(name, type) \
    compare_types<float, float>(RuleId::name); \
    compare_types<bfloat16, bfloat16>(RuleId::name); \
    compare_types<bfloat16, float>(RuleId::name); \
    compare_types<float16, float16>(RuleId::name); \
    compare_types<float16, float>(RuleId::name);
    OPTIM8_RULES(OPTIM8_COMPARE)
#undef OPTIM8_COMPARE
    compare_many();
    compare_chunks();
}

void compare_step_long() { compare_long(); }

void compare_step_columns() {
#define OPTIM8_COMPARE(name, type) compare_columns<type>(RuleId::name);
    OPTIM8_RULES(OPTIM8_COMPARE)
#undef OPTIM8_COMPARE
}

}  // namespace optim8
