// What it takes to read and write files past the page cache (O_DIRECT).
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <vector>

#include <pthread.h>
#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#include <sys/mman.h>
#endif

namespace optim8 {

// Memory for such I/O, in huge pages where there are any: a request is cut where its memory is not in one piece.
class DirectMemory {
  public:
    // `bytes`: a multiple of the page size.
    explicit DirectMemory(size_t bytes) {
#if defined(__linux__)
        const size_t reserved = bytes + huge;
        void* mapped = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) return;
        const auto begin = reinterpret_cast<uintptr_t>(mapped), aligned = (begin + huge - 1) / huge * huge;
        if (aligned > begin) munmap(mapped, aligned - begin);
        data_ = reinterpret_cast<char*>(aligned), bytes_ = bytes;
        munmap(data_ + bytes, begin + reserved - aligned - bytes);
        madvise(data_, bytes_, MADV_HUGEPAGE);
        madvise(data_, bytes_, MADV_DONTFORK);  // a fork in the middle of a read would get the pages that it fills
#else
        (void)bytes;
#endif
    }
    DirectMemory(const DirectMemory&) = delete;
    DirectMemory& operator=(const DirectMemory&) = delete;
    ~DirectMemory() {
#if defined(__linux__)
        if (data_ != nullptr) munmap(data_, bytes_);
#endif
    }
    // Null where there was no room.
    char* data() const { return data_; }
    size_t size() const { return bytes_; }

  private:
    static constexpr size_t huge = size_t{2} << 20;
    char* data_ = nullptr;
    size_t bytes_ = 0;
};

// Reads or writes all of `size` bytes; errno of what went wrong, EIO where the file has ended, 0 where nothing did.
inline int transfer(bool writing, int handle, char* memory, size_t size, size_t offset) {
    while (size > 0) {
        const auto at = static_cast<off_t>(offset);
        const ssize_t done = writing ? pwrite(handle, memory, size, at) : pread(handle, memory, size, at);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) return done < 0 ? errno : EIO;
        memory += done, offset += static_cast<size_t>(done), size -= static_cast<size_t>(done);
    }
    return 0;
}

#if defined(__linux__)
// The processors of this thread and `threads` - 1 more of OpenMP. A thread that OpenMP binds to a place of its own
// (OMP_PROC_BIND) would hand that on to each thread that it starts, and all would share one processor.
inline cpu_set_t processors_of(int threads) {
    cpu_set_t all;
    CPU_ZERO(&all);
    if (sched_getaffinity(0, sizeof all, &all) != 0 || CPU_COUNT(&all) >= threads) return all;
#pragma omp parallel num_threads(threads)
    {
        cpu_set_t own;
        CPU_ZERO(&own);
        if (sched_getaffinity(0, sizeof own, &own) == 0) {
#pragma omp critical
            CPU_OR(&all, &all, &own);
        }
    }
    return all;
}
#endif

// Threads that read and write files, and step what they have read. Their stacks are small, for those count as data of
// the process, which may be limited (RLIMIT_DATA). They must not allocate memory: each would get a heap of its own.
class DiskThreads {
  public:
    // As many as there are to be had, up to `most`, call work(argument), where `threads` threads of OpenMP may run.
    DiskThreads(size_t most, int threads, void* (*work)(void*), void* argument) {
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        // What libraries keep for each thread lies in its stack too; the system tells how much that is.
        const long least = sysconf(_SC_THREAD_STACK_MIN);
        pthread_attr_setstacksize(&attributes, static_cast<size_t>(least > 0 ? least : 0) + (size_t{128} << 10));
#if defined(__linux__)
        const cpu_set_t processors = processors_of(threads);
        if (CPU_COUNT(&processors) > 0) pthread_attr_setaffinity_np(&attributes, sizeof processors, &processors);
#else
        (void)threads;
#endif
        threads_.reserve(most);
        pthread_t thread;
        while (threads_.size() < most && pthread_create(&thread, &attributes, work, argument) == 0)
            threads_.push_back(thread);
        pthread_attr_destroy(&attributes);
    }
    DiskThreads(const DiskThreads&) = delete;
    DiskThreads& operator=(const DiskThreads&) = delete;
    ~DiskThreads() { join(); }
    void join() {
        for (const pthread_t thread : threads_) pthread_join(thread, nullptr);
        threads_.clear();
    }
    bool none() const { return threads_.empty(); }

  private:
    std::vector<pthread_t> threads_;
};

}  // namespace optim8
