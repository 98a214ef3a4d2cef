#include "cpu/step/streaming.h"

#include "cpu/direct_io.h"
#include "cpu/pages.h"
#include "cpu/step/rows.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <set>

namespace optim8 {
namespace {

// A page that several buckets use. The last one that is stepped writes it, with what the others left.
struct SharedPage {
    uintptr_t at;
    size_t left;  // buckets that are not stepped yet
    char* kept;   // the page as those that are left it
};

struct SharedPages {
    std::vector<SharedPage> all;
    std::vector<std::vector<size_t>> of_bucket;  // indices in `all`, by address
    size_t most_of_bucket = 0;
    size_t most_open = 0;  // between two buckets that follow each other
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
    std::set<size_t> using_it;  // buckets that use what lies between this edge and the next; their spans lie apart
    std::vector<size_t> open(buckets.size() + 1, 0);
    for (size_t i = 0; i < edges.size(); ++i) {
        edges[i].begins ? (void)using_it.insert(edges[i].bucket) : (void)using_it.erase(edges[i].bucket);
        if (using_it.size() < 2) continue;
        for (uintptr_t at = edges[i].at; at < edges[i + 1].at; at += page) {
            for (const size_t b : using_it) found.of_bucket[b].push_back(found.all.size());
            for (size_t b = *using_it.begin(); b < *using_it.rbegin(); ++b) ++open[b];
            found.all.push_back({at, using_it.size(), nullptr});
        }
    }
    found.most_open = *std::max_element(open.begin(), open.end());
    for (const auto& pages : found.of_bucket) found.most_of_bucket = std::max(found.most_of_bucket, pages.size());
    return found;
}

// Threads that each take a bucket, read it, step it and write it, and then take the next one. While some wait for the
// disk, others step.
class CopyingStep {
  public:
    CopyingStep(const Buckets& buckets, const std::vector<PagedFile>& files, const DirectMemory& memory,
                const Streaming& how)
        : buckets_(buckets),
          files_(files),
          how_(how),
          shared_(shared_pages(buckets)),
          next_(!buckets.empty() && buckets[0].spans.empty() ? 1 : 0) {
        size_t slot_bytes = page, rows = 0, spans = 0;
        for (size_t b = next_; b < buckets.size(); ++b) {
            size_t bytes = 0;
            for (const Span& span : buckets[b].spans) bytes += span.second - span.first;
            slot_bytes = std::max(slot_bytes, bytes);
            rows = std::max(rows, buckets[b].rows.size());
            spans = std::max(spans, buckets[b].spans.size());
        }
        // What is kept of shared pages at a time: they are open where the next bucket begins, or used by one in a slot.
        const size_t kept = shared_.most_open * page, each = slot_bytes + shared_.most_of_bucket * page;
        slots_.resize(std::min({(memory.size() - std::min(memory.size(), kept)) / each, buckets.size(), how.slots}));
        char* at = memory.data();
        for (Slot& slot : slots_) {
            slot.memory = at;
            at += slot_bytes;
            // Threads of the disk must not allocate memory.
            slot.rows.reserve(rows);
            slot.spans.reserve(spans + shared_.most_of_bucket);
        }
        const size_t pages = kept / page + slots_.size() * shared_.most_of_bucket;
        for (size_t i = 0; i < pages; ++i) free_pages_.push_back(at + i * page);
    }

    bool run() {
        const size_t resident = next_;
        if (slots_.empty() || resident == buckets_.size()) return false;
        DiskThreads disk(slots_.size(), how_.threads, &CopyingStep::serve, this);
        if (disk.none()) return false;
        // No more threads than `threads` step at a time. While this one and its team do, one of the disk may.
        const int own = resident > 0 ? std::max(1, how_.threads - 1) : 0;
        allow(how_.threads - own);
        {
            const Allowing at_the_end{*this, own};
            if (resident > 0) step_rows(buckets_[0].rows, own);
        }
        disk.join();
        if (error_.number != 0) throw error_;
        return true;
    }

  private:
    // What a thread of the disk works in.
    struct Slot {
        char* memory;
        std::vector<Row> rows;    // of its bucket, with state in `memory`
        std::vector<Span> spans;  // what it is to write
    };

    struct Allowing {
        CopyingStep& step;
        int threads;
        ~Allowing() { step.allow(threads); }
    };

    // So many threads more may step.
    void allow(int threads) {
        const std::lock_guard<std::mutex> lock(mutex_);
        may_step_ += threads;
        changed_.notify_all();
    }

    static void* serve(void* self) {
        static_cast<CopyingStep*>(self)->serve();
        return nullptr;
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        Slot& slot = slots_[next_slot_++];
        while (error_.number == 0 && next_ < buckets_.size()) {
            const size_t b = next_++, from = std::max(b, fetched_), to = fetched_ = end_of_fetch(b, from);
            lock.unlock();
            for (size_t i = from; i < to; ++i)
                for (const Span& span : buckets_[i].spans) fetch_pages(span.first, span.second);
            int error = move(false, slot, b, buckets_[b].spans);
            lock.lock();
            if (has_failed(error, false)) return;
            changed_.wait(lock, [&] { return may_step_ > 0; });
            --may_step_;
            lock.unlock();
            step(slot, b);
            lock.lock();
            ++may_step_;
            changed_.notify_one();
            leave_shared(slot, b);
            lock.unlock();
            error = move(true, slot, b, slot.spans);
            lock.lock();
            if (has_failed(error, true)) return;
        }
    }

    // Up to which bucket there is to be fetched when bucket b is read, and all before `end` is fetched.
    size_t end_of_fetch(size_t b, size_t end) const {
        int64_t waiting = 0;
        for (size_t i = b; i < end; ++i) waiting += buckets_[i].bytes;
        for (; end < buckets_.size() && waiting < how_.ahead; ++end) waiting += buckets_[end].bytes;
        return end;
    }

    // Tells whether anything has failed until now.
    bool has_failed(int error, bool writing) {
        if (error != 0 && error_.number == 0) error_ = {error, writing};
        return error_.number != 0;
    }

    int move(bool writing, const Slot& slot, size_t b, const std::vector<Span>& spans) const {
        for (const Span& span : spans)
            for (const PagedFile& file : files_) {
                const uintptr_t first = std::max(span.first, file.span.first);
                const uintptr_t last = std::min(span.second, file.span.second);
                if (first >= last) continue;
                const int error =
                    transfer(writing, file.handle, in_slot(slot, b, first), last - first, first - file.span.first);
                if (error != 0) return error;
            }
        return 0;
    }

    void step(Slot& slot, size_t b) const {
        slot.rows = buckets_[b].rows;
        const auto moved = [&](auto* pointer) {
            char* at = in_slot(slot, b, reinterpret_cast<uintptr_t>(pointer));
            return at == nullptr ? pointer : reinterpret_cast<decltype(pointer)>(at);
        };
        for (Row& row : slot.rows) {
            row.param_low = moved(row.param_low);
            for (int s = 0; s < max_states; ++s) {
                row.state[s] = moved(row.state[s]);
                row.low[s] = moved(row.low[s]);
                row.absmax[s] = moved(row.absmax[s]);
            }
        }
        step_rows_here(slot.rows);
    }

    // Decides what is left for this bucket to write.
    void leave_shared(Slot& slot, size_t b) {
        slot.spans.clear();
        const auto& shared = shared_.of_bucket[b];
        auto next = shared.begin();
        for (const Span& span : buckets_[b].spans) {
            uintptr_t from = span.first;
            for (; next != shared.end() && shared_.all[*next].at < span.second; ++next) {
                const uintptr_t at = shared_.all[*next].at;
                if (leave(slot, b, shared_.all[*next])) continue;
                if (from < at) slot.spans.emplace_back(from, at);
                from = at + page;
            }
            if (from < span.second) slot.spans.emplace_back(from, span.second);
        }
    }

    // Tells whether this bucket is the last one to be stepped of those that use the page.
    bool leave(Slot& slot, size_t b, SharedPage& shared) {
        char* here = in_slot(slot, b, shared.at);
        if (shared.kept == nullptr) {
            shared.kept = free_pages_.back();
            free_pages_.pop_back();
            std::memcpy(shared.kept, here, page);
        } else {
            for (const Row& row : buckets_[b].rows)
                for_each_part(row, [&](const void* address, int64_t bytes) {
                    const auto begin = reinterpret_cast<uintptr_t>(address);
                    const uintptr_t first = std::max(begin, shared.at);
                    const uintptr_t last = std::min(begin + static_cast<uintptr_t>(bytes), shared.at + page);
                    if (first < last)
                        std::memcpy(shared.kept + (first - shared.at), here + (first - shared.at), last - first);
                });
        }
        if (--shared.left > 0) return false;
        std::memcpy(here, shared.kept, page);
        free_pages_.push_back(shared.kept);
        return true;
    }

    // Where a byte of a bucket's pages is while the bucket is in a slot.
    char* in_slot(const Slot& slot, size_t b, uintptr_t address) const {
        char* at = slot.memory;
        for (const Span& span : buckets_[b].spans) {
            if (address >= span.first && address < span.second) return at + (address - span.first);
            at += span.second - span.first;
        }
        return nullptr;  // it is not in a page of the bucket
    }

    const Buckets& buckets_;
    const std::vector<PagedFile>& files_;
    const Streaming how_;
    std::mutex mutex_;
    SharedPages shared_;
    std::vector<Slot> slots_;
    std::vector<char*> free_pages_;
    size_t next_;           // bucket
    size_t fetched_ = 0;    // buckets
    size_t next_slot_ = 0;  // of the thread that starts next
    int may_step_ = 0;      // threads
    std::condition_variable changed_;
    DiskError error_{};
};

}  // namespace

bool step_copied(const Buckets& buckets, const std::vector<PagedFile>& files, const DirectMemory& memory,
                 const Streaming& how) {
    return !buckets.empty() && CopyingStep(buckets, files, memory, how).run();
}

}  // namespace optim8
