// The instructions that lanes do together, those that reach memory, and the table of all.
#include "ptx.h"

namespace ptx {
namespace {

enum class Shuffle { Down, Xor, Index };
template <Shuffle way>
void shuffle(Warp& w, const Instruction& n) {
    const uint32_t *from = w.at<uint32_t>(n.operand[2]), *by = w.at<uint32_t>(n.operand[3]),
                   *bounds = w.at<uint32_t>(n.operand[4]);
    uint32_t taken[lanes], inside = 0;
    for (uint32_t l = 0; l < lanes; ++l) {
        if (!(w.mask >> l & 1)) continue;
        const uint32_t b = by[l] & 31, segment = bounds[l] >> 8 & 31;
        const uint32_t least = l & segment, last = least | (bounds[l] & 31 & ~segment);
        const uint32_t j = way == Shuffle::Down ? l + b : way == Shuffle::Xor ? l ^ b : least | (b & ~segment);
        const uint32_t source = j <= last ? j : l;
        inside |= static_cast<uint32_t>(j <= last) << l;
        if (!(w.mask >> source & 1))
            throw Fault("lane " + std::to_string(l) + " reads lane " + std::to_string(source) +
                        ", which the mask leaves out: " + n.text);
        taken[l] = from[source];
    }
    uint32_t* to = w.at<uint32_t>(n.operand[0]);
    for (int l = 0; l < lanes; ++l)
        if (w.mask >> l & 1) to[l] = taken[l];
    uint32_t& predicate = *w.at<uint32_t>(n.operand[1]);
    predicate = (predicate & ~w.mask) | inside;
}

template <bool all>
void vote(Warp& w, const Instruction& n) {
    const uint32_t holds = *w.at<uint32_t>(n.operand[1]) & w.mask;
    uint32_t& to = *w.at<uint32_t>(n.operand[0]);
    to = (to & ~w.mask) | ((all ? holds == w.mask : holds != 0) ? w.mask : 0);
}
void largest(Warp& w, const Instruction& n) {
    const uint32_t* from = w.at<uint32_t>(n.operand[1]);
    uint32_t most = 0;
    for (int l = 0; l < lanes; ++l)
        if (w.mask >> l & 1 && from[l] > most) most = from[l];
    uint32_t* to = w.at<uint32_t>(n.operand[0]);
    for (int l = 0; l < lanes; ++l)
        if (w.mask >> l & 1) to[l] = most;
}
void atomic_largest(Warp& w, const Instruction& n) {
    const uint64_t* address = w.at<uint64_t>(n.operand[1]);
    const uint32_t* from = w.at<uint32_t>(n.operand[2]);
    uint32_t* to = w.at<uint32_t>(n.operand[0]);
    for (int l = 0; l < lanes; ++l) {
        if (!(w.mask >> l & 1)) continue;
        uint32_t before;
        uint8_t* at = memory(address[l] + n.offset, 4, true, n);
        std::memcpy(&before, at, 4);
        const uint32_t after = from[l] > before ? from[l] : before;
        std::memcpy(at, &after, 4);
        to[l] = before;
    }
}

void shared_or(Warp& w, const Instruction& n) {
    const uint32_t *address = w.at<uint32_t>(n.operand[0]), *from = w.at<uint32_t>(n.operand[1]);
    for (int l = 0; l < lanes; ++l) {
        if (!(w.mask >> l & 1)) continue;
        uint32_t x;
        uint8_t* at = shared_memory(*w.shared, address[l] + static_cast<uint32_t>(n.offset), 4, false, n);
        std::memcpy(&x, at, 4);
        x |= from[l];
        std::memcpy(at, &x, 4);
    }
}
void nothing(Warp&, const Instruction&) {}

enum class Space { Global, Parameters, Shared };
template <Space space>
using Address = std::conditional_t<space == Space::Shared, uint32_t, uint64_t>;
template <Space space>
uint8_t* memory_of(Warp& w, Address<space> address, size_t bytes, bool written, const Instruction& n) {
    const auto at = static_cast<Address<space>>(address + static_cast<uint64_t>(n.offset));
    if constexpr (space == Space::Shared) return shared_memory(*w.shared, at, bytes, written, n);
    if constexpr (space == Space::Parameters) return parameters(*w.kernel, at, bytes, n);
    return memory(at, bytes, written, n);
}

// `count` values of type M in memory, each in a register of type R. Operands: those, then the address.
template <class M, class R, int count, Space space>
void load_values(Warp& w, const Instruction& n) {
    const Address<space>* address = w.at<Address<space>>(n.operand[count]);
    M values[lanes][count];
    for (int l = 0; l < lanes; ++l)
        if (w.mask >> l & 1)
            std::memcpy(values[l], memory_of<space>(w, address[l], sizeof values[l], false, n), sizeof values[l]);
    for (int i = 0; i < count; ++i) {
        R* to = w.at<R>(n.operand[i]);
        for (int l = 0; l < lanes; ++l)
            if (w.mask >> l & 1) to[l] = static_cast<R>(values[l][i]);
    }
}
// Operands: the address, then the values.
template <class M, class R, int count, Space space>
void store_values(Warp& w, const Instruction& n) {
    const Address<space>* address = w.at<Address<space>>(n.operand[0]);
    for (int l = 0; l < lanes; ++l) {
        if (!(w.mask >> l & 1)) continue;
        M values[count];
        for (int i = 0; i < count; ++i) values[i] = static_cast<M>(w.at<R>(n.operand[i + 1])[l]);
        std::memcpy(memory_of<space>(w, address[l], sizeof values, true, n), values, sizeof values);
    }
}

// Memory accesses are named with the bytes of the register at the end, as in "ld.global.u8:2".
template <class M, class R, int count>
void accesses(Table& t, const std::string& type) {
    const std::string vector = count == 1 ? "" : ".v" + std::to_string(count);
    const std::string name = vector + "." + type + ":" + std::to_string(sizeof(R));
    std::vector<int> loaded(count, sizeof(R)), stored(count, sizeof(R));
    loaded.push_back(8);
    stored.insert(stored.begin(), 8);
    for (const char* cached : {"", ".nc", ".cs"})
        t["ld.global" + (cached + name)] = {load_values<M, R, count, Space::Global>, Kind::Plain, loaded};
    t["ld.param" + name] = {load_values<M, R, count, Space::Parameters>, Kind::Plain, loaded};
    for (const char* cached : {"", ".cs"})
        t["st.global" + (cached + name)] = {store_values<M, R, count, Space::Global>, Kind::Plain, stored};
    loaded.back() = stored.front() = 4;  // the address
    t["ld.shared" + name] = {load_values<M, R, count, Space::Shared>, Kind::Plain, loaded};
    t["st.shared" + name] = {store_values<M, R, count, Space::Shared>, Kind::Plain, stored};
}
// Of values of type M, in registers of each type R.
template <class M, class... R>
void accesses_of(Table& t, const std::string& type) {
    (accesses<M, R, 1>(t, type), ...);
    (accesses<M, R, 2>(t, type), ...);
    if constexpr (sizeof(M) <= 4) (accesses<M, R, 4>(t, type), ...);
}

Table all_instructions() {
    using u16 = uint16_t;
    using u32 = uint32_t;
    using u64 = uint64_t;
    using s16 = int16_t;
    using s32 = int32_t;
    using s64 = int64_t;
    Table t;
    add_arithmetic(t);
    t["shfl.sync.idx.b32"] = {shuffle<Shuffle::Index>, Kind::Together, {4, 0, 4, 4, 4, 4}};
    t["shfl.sync.bfly.b32"] = {shuffle<Shuffle::Xor>, Kind::Together, {4, 0, 4, 4, 4, 4}};
    t["shfl.sync.down.b32"] = {shuffle<Shuffle::Down>, Kind::Together, {4, 0, 4, 4, 4, 4}};
    t["vote.sync.any.pred"] = {vote<false>, Kind::Together, {0, 0, 4}};
    t["vote.sync.all.pred"] = {vote<true>, Kind::Together, {0, 0, 4}};
    t["redux.sync.max.u32"] = {largest, Kind::Together, {4, 4, 4}};
    t["atom.global.max.u32"] = {atomic_largest, Kind::Plain, {4, 8, 4}};
    t["red.shared.or.b32"] = {shared_or, Kind::Plain, {4, 4}};
    t["bar.warp.sync"] = {nothing, Kind::Together, {4}};
    t["bar.sync"] = {nothing, Kind::Barrier, {4}};

    for (const char* type : {"u8", "b8"}) accesses_of<uint8_t, u16, u32, u64>(t, type);
    for (const char* type : {"u16", "b16"}) accesses_of<u16, u16, u32, u64>(t, type);
    for (const char* type : {"u32", "b32"}) accesses_of<u32, u32, u64>(t, type);
    accesses_of<u32, u32>(t, "f32");
    for (const char* type : {"u64", "s64", "b64", "f64"}) accesses_of<u64, u64>(t, type);
    accesses_of<int8_t, s16, s32, s64>(t, "s8");
    accesses_of<s16, s16, s32, s64>(t, "s16");
    accesses_of<s32, s32, s64>(t, "s32");
    return t;
}

}  // namespace

Form form_of(const std::string& name, const std::vector<int>& bytes) {
    static const Table table = all_instructions();
    const auto found = table.find(name);
    if (found == table.end())
        throw Fault("no instruction " + name + " is known. arithmetic.cpp or lanes.cpp is where to add it.");
    const Form& form = found->second;
    bool fits = form.bytes.size() == bytes.size();
    for (size_t i = 0; fits && i < bytes.size(); ++i) fits = bytes[i] < 0 || bytes[i] == form.bytes[i];
    if (!fits) throw Fault("the registers of this " + name + " are not those that it has there.");
    return form;
}

}  // namespace ptx
