#include "bind/streaming.h"
#include "cpu/direct_io.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <set>
#include <type_traits>
#include <utility>

namespace optim8 {
namespace {

constexpr size_t most_slots = 16;   // buckets that are read, stepped or written at a time
constexpr size_t most_threads = 8;  // that read and write

// Pages that several buckets use. Each leaves them to the next one in memory, and the last one writes them.
struct Shared {
    Span span;
    size_t first, last;       // buckets
    std::vector<char> bytes;  // between the two
};

struct SharedPages {
    std::vector<Shared> all;
    std::vector<std::vector<size_t>> of_bucket;  // indices in `all`
    size_t most_bytes = 0;                       // that are held at a time
};

SharedPages shared_pages(const Buckets& buckets) {
    struct Edge {
        uintptr_t at;
        bool begins;
        size_t bucket;
    };
    std::vector<Edge> edges;
    for (size_t b = 0; b < buckets.size(); ++b)
        for (const Span& span : buckets[b].spans) {
            edges.push_back({span.first, true, b});
            edges.push_back({span.second, false, b});
        }
    std::sort(edges.begin(), edges.end(), [](const Edge& x, const Edge& y) { return x.at < y.at; });
    SharedPages found;
    found.of_bucket.resize(buckets.size());
    std::set<size_t> open;  // buckets that use what lies between this edge and the next; a bucket's spans lie apart
    std::vector<size_t> held(buckets.size() + 1, 0);
    for (size_t i = 0; i < edges.size(); ++i) {
        edges[i].begins ? (void)open.insert(edges[i].bucket) : (void)open.erase(edges[i].bucket);
        if (open.size() < 2 || edges[i + 1].at == edges[i].at) continue;
        const Span span{edges[i].at, edges[i + 1].at};
        for (const size_t b : open) found.of_bucket[b].push_back(found.all.size());
        for (size_t b = *open.begin(); b < *open.rbegin(); ++b) held[b] += span.second - span.first;
        found.all.push_back({span, *open.begin(), *open.rbegin(), {}});
    }
    found.most_bytes = *std::max_element(held.begin(), held.end());
    return found;
}

class PastCache {
  public:
    PastCache(const Buckets& buckets, const std::vector<PagedFile>& files, const DirectMemory& memory)
        : buckets_(buckets),
          files_(files),
          memory_(memory),
          shared_(shared_pages(buckets)),
          slot_bytes_(largest(buckets)),
          slots_(std::min({(memory.size() - std::min(memory.size(), shared_.most_bytes)) / slot_bytes_, buckets.size(),
                           most_slots})),
          state_(slots_, Slot::Free),
          own_(slots_),
          at_a_time_((std::min(slots_, most_threads) + 1) / 2) {}

    bool run(int threads) {
        // Half of them: the disk needs processors too, and threads that step spin while they wait for the next bucket.
        threads = std::max(1, threads / 2);
        if (slots_ < std::min<size_t>(2, buckets_.size())) return false;
        DiskThreads disk(std::min(slots_, most_threads), &PastCache::serve, this);
        if (disk.none()) return false;
        const Stop stop{*this};
        for (size_t b = 0; b < buckets_.size(); ++b) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                changed_.wait(lock, [&] { return stopped_ || state_[b % slots_] == Slot::Read; });
                if (stopped_) break;
            }
            take_shared(b);
            step_rows(rows_in_slot(b), threads);
            own_[b % slots_] = leave_shared(b);
            const std::lock_guard<std::mutex> lock(mutex_);
            state_[b % slots_] = Slot::Stepped;
            changed_.notify_all();
        }
        disk.join();
        if (error_.number != 0) throw error_;
        return true;
    }

  private:
    // What the memory of bucket b, b + slots_, b + 2 slots_, ... is at.
    enum class Slot : char { Free, Reading, Read, Stepped, Writing };

    // Ends the threads when the step has to end before its time.
    struct Stop {
        PastCache& step;
        ~Stop() {
            const std::lock_guard<std::mutex> lock(step.mutex_);
            step.stopped_ = true;
            step.changed_.notify_all();
        }
    };

    static void* serve(void* self) {
        static_cast<PastCache*>(self)->serve();
        return nullptr;
    }

    // One thread of the disk: reads and writes buckets, both in order. Half of the threads may read at a time, and half
    // write: disks do both at once, and a step that first reads all that it has room for writes late.
    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        const auto next = [&](size_t b, Slot state) { return b < buckets_.size() && state_[b % slots_] == state; };
        while (!stopped_ && to_write_ < buckets_.size()) {
            const bool can_read = reading_ < at_a_time_ && next(to_read_, Slot::Free);
            const bool can_write = writing_ < at_a_time_ && next(to_write_, Slot::Stepped);
            if (!can_read && !can_write) {
                changed_.wait(lock);
                continue;
            }
            const bool reading = can_read && (!can_write || reading_ < writing_);
            size_t& busy = reading ? reading_ : writing_;
            ++busy;
            const size_t b = reading ? to_read_++ : to_write_++;
            state_[b % slots_] = reading ? Slot::Reading : Slot::Writing;
            lock.unlock();
            const int error = reading ? move(false, b, buckets_[b].spans) : move(true, b, own_[b % slots_]);
            lock.lock();
            --busy;
            if (error != 0 && !stopped_) {
                error_ = {error, !reading};
                stopped_ = true;
            }
            state_[b % slots_] = reading ? Slot::Read : Slot::Free;
            changed_.notify_all();
        }
        changed_.notify_all();
    }

    int move(bool writing, size_t b, const std::vector<Span>& spans) const {
        for (const Span& span : spans)
            for (const PagedFile& file : files_) {
                const uintptr_t first = std::max(span.first, file.span.first);
                const uintptr_t last = std::min(span.second, file.span.second);
                if (first >= last) continue;
                const int error =
                    transfer(writing, file.handle, in_slot(b, first), last - first, first - file.span.first);
                if (error != 0) return error;
            }
        return 0;
    }

    void take_shared(size_t b) {
        for (const size_t i : shared_.of_bucket[b]) {
            const Shared& pages = shared_.all[i];
            if (b > pages.first) std::memcpy(in_slot(b, pages.span.first), pages.bytes.data(), pages.bytes.size());
        }
    }

    // Gives what is left for this bucket to write.
    std::vector<Span> leave_shared(size_t b) {
        std::vector<Span> own = buckets_[b].spans;
        for (const size_t i : shared_.of_bucket[b]) {
            Shared& pages = shared_.all[i];
            if (b == pages.last) {
                pages.bytes = {};
                continue;
            }
            const char* at = in_slot(b, pages.span.first);
            pages.bytes.assign(at, at + (pages.span.second - pages.span.first));
            cut_out(own, pages.span);
        }
        return own;
    }

    static void cut_out(std::vector<Span>& spans, const Span& hole) {
        std::vector<Span> left;
        for (const Span& span : spans) {
            const Span before{span.first, std::min(span.second, hole.first)};
            const Span behind{std::max(span.first, hole.second), span.second};
            if (before.first < before.second) left.push_back(before);
            if (behind.first < behind.second) left.push_back(behind);
        }
        spans = std::move(left);
    }

    static size_t largest(const Buckets& buckets) {
        size_t most = 1;
        for (const Bucket& bucket : buckets) {
            size_t bytes = 0;
            for (const Span& span : bucket.spans) bytes += span.second - span.first;
            most = std::max(most, bytes);
        }
        return most;
    }

    // Where a byte of a bucket's pages is while the bucket is in memory.
    char* in_slot(size_t b, uintptr_t address) const {
        char* at = memory_.data() + b % slots_ * slot_bytes_;
        for (const Span& span : buckets_[b].spans) {
            if (address >= span.first && address < span.second) return at + (address - span.first);
            at += span.second - span.first;
        }
        return nullptr;  // it is not in a page of the bucket
    }

    std::vector<Row> rows_in_slot(size_t b) const {
        std::vector<Row> rows = buckets_[b].rows;
        const auto moved = [&](auto* pointer) {
            char* at = in_slot(b, reinterpret_cast<uintptr_t>(pointer));
            return at == nullptr ? pointer : reinterpret_cast<decltype(pointer)>(at);
        };
        for (Row& row : rows)
            for (int s = 0; s < max_states; ++s) {
                row.state[s] = moved(row.state[s]);
                row.absmax[s] = moved(row.absmax[s]);
            }
        return rows;
    }

    const Buckets& buckets_;
    const std::vector<PagedFile>& files_;
    const DirectMemory& memory_;
    SharedPages shared_;
    const size_t slot_bytes_, slots_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::vector<Slot> state_;
    std::vector<std::vector<Span>> own_;  // by slot: what to write of it
    size_t to_read_ = 0, to_write_ = 0;   // buckets
    size_t reading_ = 0, writing_ = 0;    // threads
    const size_t at_a_time_;              // threads that read, and that write
    bool stopped_ = false;
    DiskError error_{};
};

}  // namespace

bool step_past_cache(const Buckets& buckets, const std::vector<PagedFile>& files, const DirectMemory& memory,
                     int threads) {
    return !buckets.empty() && PastCache(buckets, files, memory).run(threads);
}

}  // namespace optim8
