// The instructions that compute a value in every lane.
#include "numbers.h"

#include <utility>

namespace ptx {
namespace {

// All operands at the same lane.
template <class F, class D, class... S, size_t... i>
void each_lane(Warp& w, const Instruction& n, std::index_sequence<i...>) {
    D* to = w.at<D>(n.operand[0]);
    const auto run = [&](const S*... from) {
        if (w.mask == everyone) {
#pragma GCC ivdep
            for (int l = 0; l < lanes; ++l) to[l] = F()(from[l]...);
        } else {
            for (int l = 0; l < lanes; ++l)
                if (w.mask >> l & 1) to[l] = F()(from[l]...);
        }
    };
    run(w.at<S>(n.operand[i + 1])...);
}
template <class F, class D, class... S>
void each(Warp& w, const Instruction& n) {
    each_lane<F, D, S...>(w, n, std::index_sequence_for<S...>{});
}
template <class D, class... S, class F>
Form form(F) {
    return {each<F, D, S...>, Kind::Plain, {int{sizeof(D)}, int{sizeof(S)}...}};
}

template <class F, class T>
void compare(Warp& w, const Instruction& n) {
    const T *a = w.at<T>(n.operand[1]), *b = w.at<T>(n.operand[2]);
    uint32_t holds = 0;
    for (int l = 0; l < lanes; ++l) holds |= static_cast<uint32_t>(F()(a[l], b[l])) << l;
    uint32_t& to = *w.at<uint32_t>(n.operand[0]);
    to = (to & ~w.mask) | (holds & w.mask);
}
template <class T, class F>
Form comparison(F) {
    return {compare<F, T>, Kind::Plain, {0, sizeof(T), sizeof(T)}};
}

template <class T>
void select(Warp& w, const Instruction& n) {
    T* to = w.at<T>(n.operand[0]);
    const T *a = w.at<T>(n.operand[1]), *b = w.at<T>(n.operand[2]);
    const uint32_t chosen = *w.at<uint32_t>(n.operand[3]), mask = w.mask;
    for (int l = 0; l < lanes; ++l) {
        const T x = chosen >> l & 1 ? a[l] : b[l];
        to[l] = mask >> l & 1 ? x : to[l];
    }
}

template <class F, size_t... i>
void each_predicate(Warp& w, const Instruction& n, std::index_sequence<i...>) {
    const uint32_t x = F()(*w.at<uint32_t>(n.operand[i + 1])...);
    uint32_t& to = *w.at<uint32_t>(n.operand[0]);
    to = (to & ~w.mask) | (x & w.mask);
}
template <class F, size_t count>
void predicates(Warp& w, const Instruction& n) {
    each_predicate<F>(w, n, std::make_index_sequence<count>{});
}
template <size_t count, class F>
Form predicate(F) {
    return {predicates<F, count>, Kind::Plain, std::vector<int>(count + 1, 0)};
}

template <class T>
void comparisons(Table& t, const std::string& type) {
    t["setp.eq." + type] = comparison<T>([](T a, T b) { return a == b; });
    t["setp.ne." + type] = comparison<T>([](T a, T b) { return a < b || a > b; });
    t["setp.lt." + type] = comparison<T>([](T a, T b) { return a < b; });
    t["setp.le." + type] = comparison<T>([](T a, T b) { return a <= b; });
    t["setp.gt." + type] = comparison<T>([](T a, T b) { return a > b; });
    t["setp.ge." + type] = comparison<T>([](T a, T b) { return a >= b; });
}

template <class S>
void integers(Table& t, const std::string& width) {
    using U = std::make_unsigned_t<S>;
    constexpr uint32_t size = 8 * sizeof(S);
    const std::string u = "u" + width, s = "s" + width, b = "b" + width;
    for (const std::string& type : {u, s}) {
        t["add." + type] = form<U, U, U>([](U x, U y) { return static_cast<U>(x + y); });
        t["sub." + type] = form<U, U, U>([](U x, U y) { return static_cast<U>(x - y); });
        t["mul.lo." + type] = form<U, U, U>([](U x, U y) { return static_cast<U>(uint64_t{x} * y); });
        t["mad.lo." + type] = form<U, U, U, U>([](U x, U y, U z) { return static_cast<U>(uint64_t{x} * y + z); });
    }
    for (const std::string& type : {u, s, b}) {
        t["mov." + type] = form<U, U>([](U x) { return x; });
        t["selp." + type] = {select<U>, Kind::Plain, {sizeof(U), sizeof(U), sizeof(U), 0}};
    }
    t["neg." + s] = form<U, U>([](U x) { return static_cast<U>(-x); });
    t["and." + b] = form<U, U, U>([](U x, U y) { return static_cast<U>(x & y); });
    t["or." + b] = form<U, U, U>([](U x, U y) { return static_cast<U>(x | y); });
    t["xor." + b] = form<U, U, U>([](U x, U y) { return static_cast<U>(x ^ y); });
    t["not." + b] = form<U, U>([](U x) { return static_cast<U>(~x); });
    const auto right = form<U, U, uint32_t>([](U x, uint32_t by) { return static_cast<U>(by < size ? x >> by : 0); });
    t["shr." + u] = t["shr." + b] = right;
    t["shr." + s] =
        form<S, S, uint32_t>([](S x, uint32_t by) { return static_cast<S>(x >> (by < size ? by : size - 1)); });
    t["shl." + b] = form<U, U, uint32_t>([](U x, uint32_t by) { return static_cast<U>(by < size ? x << by : 0); });
    t["min." + u] = form<U, U, U>([](U x, U y) { return x < y ? x : y; });
    t["max." + u] = form<U, U, U>([](U x, U y) { return x > y ? x : y; });
    t["min." + s] = form<S, S, S>([](S x, S y) { return x < y ? x : y; });
    t["max." + s] = form<S, S, S>([](S x, S y) { return x > y ? x : y; });
    // What a division by 0 gives PTX does not say.
    t["div." + u] = form<U, U, U>([](U x, U y) { return static_cast<U>(y == 0 ? ~U{} : x / y); });
    t["div." + s] =
        form<S, S, S>([](S x, S y) { return static_cast<S>(y == 0 || y == -1 ? U{} - static_cast<U>(x) : x / y); });
    comparisons<U>(t, u);
    comparisons<U>(t, b);
    comparisons<S>(t, s);
}

template <class F>
void floats(Table& t, const std::string& f) {
    using U = std::conditional_t<sizeof(F) == 4, uint32_t, uint64_t>;
    constexpr U sign = U{1} << (8 * sizeof(F) - 1);
    t["add.rn." + f] = form<F, F, F>([](F x, F y) { return quiet(x + y); });
    t["sub.rn." + f] = form<F, F, F>([](F x, F y) { return quiet(x - y); });
    t["mul.rn." + f] = form<F, F, F>([](F x, F y) { return quiet(x * y); });
    t["div.rn." + f] = form<F, F, F>([](F x, F y) { return quiet(x / y); });
    t["fma.rn." + f] = form<F, F, F, F>([](F x, F y, F z) { return quiet(std::fma(x, y, z)); });
    t["rcp.rn." + f] = form<F, F>([](F x) { return quiet(1 / x); });
    t["sqrt.rn." + f] = form<F, F>([](F x) { return quiet(std::sqrt(x)); });
    t["neg." + f] = form<U, U>([](U x) { return x ^ sign; });
    t["abs." + f] = form<U, U>([](U x) { return x & ~sign; });
    t["copysign." + f] = form<U, U, U>([](U x, U y) { return (x & sign) | (y & ~sign); });
    t["mov." + f] = form<U, U>([](U x) { return x; });
    t["selp." + f] = {select<U>, Kind::Plain, {sizeof(U), sizeof(U), sizeof(U), 0}};
    t["max." + f] = form<F, F, F>([](F x, F y) { return larger(x, y); });
    t["min." + f] = form<F, F, F>([](F x, F y) { return quiet(-larger(-x, -y)); });
    comparisons<F>(t, f);
    t["setp.equ." + f] = comparison<F>([](F a, F b) { return !(a < b || a > b); });
    t["setp.neu." + f] = comparison<F>([](F a, F b) { return !(a == b); });
    t["setp.ltu." + f] = comparison<F>([](F a, F b) { return !(a >= b); });
    t["setp.leu." + f] = comparison<F>([](F a, F b) { return !(a > b); });
    t["setp.gtu." + f] = comparison<F>([](F a, F b) { return !(a <= b); });
    t["setp.geu." + f] = comparison<F>([](F a, F b) { return !(a < b); });
    t["setp.num." + f] = comparison<F>([](F a, F b) { return a == a && b == b; });
}

template <class To, class From>
Form conversion() {
    return form<To, From>([](From x) { return static_cast<To>(x); });
}

}  // namespace

void add_arithmetic(Table& t) {
    using u16 = uint16_t;
    using u32 = uint32_t;
    using u64 = uint64_t;
    using s16 = int16_t;
    using s32 = int32_t;
    using s64 = int64_t;
    integers<s16>(t, "16");
    integers<s32>(t, "32");
    integers<s64>(t, "64");
    floats<float>(t, "f32");
    floats<double>(t, "f64");

    t["mul.wide.u16"] = form<u32, u16, u16>([](u16 x, u16 y) { return u32{x} * y; });
    t["mul.wide.s16"] = form<s32, s16, s16>([](s16 x, s16 y) { return s32{x} * y; });
    t["mul.wide.u32"] = form<u64, u32, u32>([](u32 x, u32 y) { return u64{x} * y; });
    t["mul.wide.s32"] = form<s64, s32, s32>([](s32 x, s32 y) { return s64{x} * y; });
    t["dp4a.s32.s32"] = form<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return dot(a, b, c); });
    t["dp2a.lo.s32.s32"] = form<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return dot_halves(a, b, c); });
    t["bfe.u32"] = form<u32, u32, u32, u32>([](u32 x, u32 first, u32 count) { return extract(x, first, count); });
    t["prmt.b32"] = form<u32, u32, u32, u32>([](u32 a, u32 b, u32 s) { return permute(a, b, s); });
    t["shf.l.wrap.b32"] = form<u32, u32, u32, u32>(
        [](u32 low, u32 high, u32 by) { return static_cast<u32>(((u64{high} << 32 | low) << (by & 31)) >> 32); });
    t["mov.b32:pack"] = form<u32, u16, u16>([](u16 low, u16 high) { return u32{high} << 16 | low; });
    t["mov.b64:pack"] = form<u64, u32, u32>([](u32 low, u32 high) { return u64{high} << 32 | low; });
    t["mov.b32:low"] = form<u16, u32>([](u32 x) { return static_cast<u16>(x); });
    t["mov.b32:high"] = form<u16, u32>([](u32 x) { return static_cast<u16>(x >> 16); });
    t["mov.b64:low"] = form<u32, u64>([](u64 x) { return static_cast<u32>(x); });
    t["mov.b64:high"] = form<u32, u64>([](u64 x) { return static_cast<u32>(x >> 32); });
    for (const char* of : {"global", "to.global", "shared", "to.shared"})
        t[std::string("cvta.") + of + ".u64"] = form<u64, u64>([](u64 x) { return x; });

    t["mov.pred"] = predicate<1>([](u32 x) { return x; });
    t["not.pred"] = predicate<1>([](u32 x) { return ~x; });
    t["and.pred"] = predicate<2>([](u32 x, u32 y) { return x & y; });
    t["or.pred"] = predicate<2>([](u32 x, u32 y) { return x | y; });
    t["xor.pred"] = predicate<2>([](u32 x, u32 y) { return x ^ y; });

    t["max.NaN.f32"] =
        form<float, float, float>([](float x, float y) { return x == x && y == y ? larger(x, y) : quiet(NAN); });
    t["add.rm.f32"] = form<float, float, float>([](float x, float y) { return directed(x, y, true); });
    t["fma.rz.f32"] = form<float, float, float, float>(
        [](float x, float y, float z) { return directed(static_cast<double>(x) * y, z, false); });
    t["rcp.approx.ftz.f32"] = form<float, float>([](float x) { return rcp_approx_ftz(x); });
    t["rsqrt.approx.ftz.f32"] = form<float, float>([](float x) { return rsqrt_approx_ftz(x); });

    t["cvt.u16.u32"] = conversion<u16, u32>();
    t["cvt.u32.u16"] = conversion<u32, u16>();
    t["cvt.u32.u64"] = conversion<u32, u64>();
    t["cvt.u64.u16"] = conversion<u64, u16>();
    t["cvt.u64.u32"] = conversion<u64, u32>();
    t["cvt.s64.s32"] = conversion<s64, s32>();
    t["cvt.s32.s16"] = form<s32, u32>([](u32 x) { return s32{static_cast<s16>(x)}; });  // of a wider register
    t["cvt.rn.f32.s32"] = conversion<float, s32>();
    t["cvt.rn.f64.s32"] = conversion<double, s32>();
    t["cvt.rn.f64.s16"] = conversion<double, s16>();
    t["cvt.f64.f32"] = conversion<double, float>();
    t["cvt.rn.f32.f64"] = form<float, double>([](double x) { return quiet(static_cast<float>(x)); });
    t["cvt.rzi.s32.f32"] = form<s32, float>([](float x) { return truncate<s32>(x); });
    t["cvt.rzi.s32.f64"] = form<s32, double>([](double x) { return truncate<s32>(x); });
    t["cvt.rzi.u64.f64"] = form<u64, double>([](double x) { return truncate<u64>(x); });
    t["cvt.f32.f16"] = form<float, u16>([](u16 x) { return half_value(x); });
    t["cvt.rn.f16.f32"] = form<u16, float>([](float x) { return half_of(x); });
    t["cvt.rz.f16x2.f32"] = form<u32, float, float>(
        [](float high, float low) { return u32{half_toward_zero(high)} << 16 | half_toward_zero(low); });
    t["cvt.rn.bf16.f32"] = form<u16, float>([](float x) { return bfloat16_of(x); });
}

}  // namespace ptx
