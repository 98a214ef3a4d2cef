// Runs a kernel, one block and one warp after the other.
#include "ptx.h"

#include <algorithm>
#include <map>

namespace ptx {
namespace {

struct Area {
    uint64_t end;
    bool writable;
};
// Never destroyed: arrays are made before anything is initialized here, and go after it.
std::map<uint64_t, Area>& areas() {
    static auto& all = *new std::map<uint64_t, Area>();
    return all;
}
size_t named_areas = 0;  // those that can be written

// Lanes at one place of the code.
struct Group {
    uint32_t at, lanes;
    bool waits = false;  // for the others that are to do the same
};

// No warp of a kernel of optim8 needs nearly as many.
constexpr uint64_t most_instructions = 1ull << 26;

class Scheduler {
  public:
    explicit Scheduler(const Warp& warp) : warp_(warp), code_(warp.kernel->code.data()), groups_{{0, warp.mask}} {}

    // Until the warp has ended, or its threads wait at a barrier.
    void run() {
        barrier_ = nullptr;
        while (!groups_.empty() && barrier_ == nullptr) {
            join();
            size_t next = groups_.size();
            for (size_t g = 0; g < groups_.size(); ++g)
                if (!groups_[g].waits && (next == groups_.size() || groups_[g].at < groups_[next].at)) next = g;
            if (next == groups_.size())
                throw Fault(std::string("lanes wait for others that never come: ") + code_[groups_[0].at].text);
            Group group = groups_[next];
            groups_.erase(groups_.begin() + static_cast<long>(next));
            advance(group);
        }
    }
    // The barrier that all threads wait at; null where they have ended.
    const Instruction* barrier() const { return barrier_; }

  private:
    // Lanes that have come to one place go on together.
    void join() {
        for (size_t a = 0; a < groups_.size(); ++a)
            for (size_t b = groups_.size() - 1; b > a; --b)
                if (groups_[a].at == groups_[b].at) {
                    groups_[a].lanes |= groups_[b].lanes;
                    groups_[a].waits = false;
                    groups_.erase(groups_.begin() + static_cast<long>(b));
                }
    }

    // Until the group parts, ends, waits, or might meet another.
    void advance(Group group) {
        uint32_t others = ~0u;
        for (const Group& other : groups_)
            if (other.at > group.at) others = std::min(others, other.at);
        while (group.at < others) {
            const Instruction& n = code_[group.at];
            if (++done_ > most_instructions) throw Fault("a warp does not end.");
            uint32_t mask = group.lanes;
            if (n.guarded) mask &= *warp_.at<uint32_t>(n.guard) ^ (n.negated ? everyone : 0);
            switch (n.kind) {
                case Kind::Plain:
                    warp_.mask = mask;
                    if (mask != 0) n.work(warp_, n);
                    break;
                case Kind::Together:
                    if (!all_there(n, group)) {
                        group.waits = true;
                        return groups_.push_back(group);
                    }
                    warp_.mask = mask;
                    n.work(warp_, n);
                    break;
                case Kind::Barrier:
                    if (ended_ != ~there_) throw Fault(std::string("lanes ended before a barrier: ") + n.text);
                    group.waits = group.lanes != there_;
                    if (!group.waits) {
                        barrier_ = &n;
                        ++group.at;
                    }
                    return groups_.push_back(group);
                case Kind::Branch:
                    if (mask == 0) break;
                    if (mask != group.lanes) groups_.push_back({group.at + 1, group.lanes & ~mask});
                    group = {n.target, mask};
                    if (groups_.empty()) continue;
                    return groups_.push_back(group);
                case Kind::Return:
                    ended_ |= mask;
                    group.lanes &= ~mask;
                    if (group.lanes == 0) return;
                    break;
            }
            ++group.at;
        }
        groups_.push_back(group);
    }

    // Whether all lanes that the mask names are here. The mask must be the same for all, and name them.
    bool all_there(const Instruction& n, const Group& group) {
        const uint32_t* masks = warp_.at<uint32_t>(n.target);
        const uint32_t named = masks[__builtin_ctz(group.lanes)];
        for (int l = 0; l < lanes; ++l)
            if (group.lanes >> l & 1 && masks[l] != named)
                throw Fault(std::string("the mask is not the same in all lanes: ") + n.text);
        if ((group.lanes & ~named) != 0) throw Fault(std::string("a lane is not in its own mask: ") + n.text);
        if ((named & ended_) != 0) throw Fault(std::string("a mask names lanes that have ended: ") + n.text);
        return (named & ~group.lanes) == 0;
    }

    Warp warp_;
    const Instruction* code_;
    std::vector<Group> groups_;
    uint32_t there_ = warp_.mask, ended_ = ~there_;
    const Instruction* barrier_ = nullptr;
    uint64_t done_ = 0;  // instructions
};

}  // namespace

void add_memory(void* begin, size_t bytes, bool writable) {
    const auto at = reinterpret_cast<uint64_t>(begin);
    areas()[at] = {at + bytes, writable};
    named_areas += writable;
    last_read = last_written = Range();
}

void remove_memory(const void* begin) {
    const auto found = areas().find(reinterpret_cast<uint64_t>(begin));
    if (found == areas().end()) return;
    named_areas -= found->second.writable;
    areas().erase(found);
    last_read = last_written = Range();
}

Range range_of(uint64_t address, size_t bytes, bool written, const Instruction& by) {
    if (named_areas == 0) return {1, ~0ull};
    auto after = areas().upper_bound(address);
    if (after != areas().begin()) {
        const auto& [begin, area] = *--after;
        if (address + bytes <= area.end && (area.writable || !written)) return {begin, area.end};
    }
    throw Fault(std::string(written ? "writes" : "reads") + " memory that is not there: " + by.text);
}

void misaligned(uint64_t address, size_t alignment, const Instruction& by) {
    throw Fault("the address " + std::to_string(address) + " is not a multiple of " + std::to_string(alignment) + ": " +
                by.text);
}

uint8_t* shared_memory(Shared& shared, uint32_t address, size_t bytes, bool written, const Instruction& by) {
    if (address % bytes != 0) misaligned(address, bytes, by);
    const size_t at = size_t{address} - shared_begin;
    if (address < shared_begin || at + bytes > shared.bytes.size())
        throw Fault(std::string(written ? "writes" : "reads") + " beyond the shared memory: " + by.text);
    uint8_t* marks = shared.written.data() + at;
    if (written) std::memset(marks, 1, bytes);
    if (std::memchr(marks, 0, bytes) != nullptr)
        throw Fault(std::string("reads shared memory that nobody wrote: ") + by.text);
    return shared.bytes.data() + at;
}

namespace {

// The warps of a block, in their order from one barrier to the next.
void run_block(Kernel& kernel, uint32_t block, uint32_t blocks, uint32_t threads, Shared& shared,
               std::vector<std::vector<uint8_t>>& frames) {
    std::vector<Scheduler> warps;
    const uint32_t count = (threads + lanes - 1) / lanes;
    for (bool goes_on = true; goes_on;) {
        const Instruction* waits = nullptr;
        for (uint32_t w = 0; w < count; ++w) {
            const uint32_t first = w * lanes;
            try {
                if (warps.size() == w) {
                    const uint32_t there = threads - first < lanes ? (1u << (threads - first)) - 1 : everyone;
                    Warp warp{&kernel, &shared, frames[w % frames.size()].data(), there};
                    for (uint32_t l = 0; l < lanes; ++l) {
                        if (kernel.thread_index != 0) warp.at<uint32_t>(kernel.thread_index)[l] = first + l;
                        if (kernel.block_index != 0) warp.at<uint32_t>(kernel.block_index)[l] = block;
                        if (kernel.block_count != 0) warp.at<uint32_t>(kernel.block_count)[l] = blocks;
                    }
                    warps.emplace_back(warp);
                }
                warps[w].run();
                if (w > 0 && warps[w].barrier() != waits)
                    throw Fault(std::string("not all warps come to the same barrier: ") +
                                (waits == nullptr ? warps[w].barrier() : waits)->text);
                waits = warps[w].barrier();
            } catch (const Fault& fault) {
                throw Fault(kernel.name + ", block " + std::to_string(block) + ", threads from " +
                            std::to_string(first) + ": " + fault.what());
            }
        }
        goes_on = waits != nullptr;
    }
}

}  // namespace

void run(Kernel& kernel, uint32_t blocks, uint32_t threads, uint32_t shared_bytes, void** arguments) {
    for (size_t i = 0; i < kernel.parameters.size(); ++i) {
        const Parameter& parameter = kernel.parameters[i];
        if (kernel.parameter_memory.empty()) kernel.parameter_memory.resize(kernel.parameter_bytes + 1);
        std::memcpy(kernel.parameter_memory.data() + parameter.offset, arguments[i], parameter.size);
    }
    // Only warps that wait for others need registers of their own.
    const size_t frames = kernel.has_barrier ? (threads + lanes - 1) / lanes : 1;
    if (kernel.frames.size() < frames) kernel.frames.resize(frames, kernel.frame);
    for (uint32_t block = 0; block < blocks; ++block) {
        Shared shared{std::vector<uint8_t>(shared_bytes, 0xa5), std::vector<uint8_t>(shared_bytes)};
        run_block(kernel, block, blocks, threads, shared, kernel.frames);
    }
}

}  // namespace ptx
