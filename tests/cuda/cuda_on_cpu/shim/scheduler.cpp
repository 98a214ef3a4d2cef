// The scheduler of the shim. Compiled without sanitizers; where the program has them, it tells them of its fibers.
#include "cuda_runtime.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

extern "C" {
// Present in a sanitized program only.
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* at);
__attribute__((weak)) void __tsan_release(void* at);
}

namespace cuda_on_cpu {

dim3 grid;
long launches_with_memory = 0;

namespace {

constexpr size_t stack_bytes = 256 << 10;
constexpr unsigned no_order_between_fibers = 1;  // of __tsan_switch_to_fiber: a switch alone orders nothing

#if defined(__x86_64__)
// A context is its stack pointer; the registers that a call must keep lie on the stack.
using Context = void*;
extern "C" void cuda_on_cpu_switch(void** save, void* to);
asm(R"(
.text
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch,@function
cuda_on_cpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cuda_on_cpu_switch,.-cuda_on_cpu_switch
)");
void switch_context(Context& from, Context& to) { cuda_on_cpu_switch(&from, to); }
void make_context(Context& context, char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + stack_bytes) - 1;  // as after a call: 8 below a multiple of 16
    *top-- = nullptr;
    *top = reinterpret_cast<void*>(entry);
    context = top - 6;
}
#else
using Context = ucontext_t;
void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
void make_context(Context& context, char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = stack_bytes;
    makecontext(&context, entry, 0);
}
#endif

enum class State { Ready, AtWarp, AtBlock, Done };

struct Fiber {
    Context context;
    std::unique_ptr<char[]> stack;
    void *fake_stack = nullptr, *tsan = nullptr;
    State state = State::Ready;
    dim3 index;
    // What a waiting lane wants, and what it got.
    Operation operation;
    unsigned mask;
    int source;
    uint64_t value, result;
};

Order order = Order::Forward;
std::mt19937 generator(1);
std::vector<Fiber> fibers;
Fiber* current = nullptr;
Context scheduler;
void *scheduler_fake_stack = nullptr, *scheduler_tsan = nullptr;
const void* scheduler_bottom = nullptr;
size_t scheduler_size = 0;
dim3 block, block_at;
std::unique_ptr<unsigned char[]> shared_memory;
void (*thread_body)(void*) = nullptr;
void* thread_context = nullptr;
// What stands for order in TSan's eyes: barriers, warp operations, and that a block begins when the one before has
// ended, since both have the same shared memory.
int barrier_line = 0, warp_lines[64], block_lines[2];

template <class... Arguments>
[[noreturn]] void fail(const char* format, Arguments... arguments) {
    std::fprintf(stderr, "cuda_on_cpu: thread %u of block %u: ", current == nullptr ? 0 : current->index.x, block_at.x);
    std::fprintf(stderr, format, arguments...);
    std::fprintf(stderr, "\n");
    std::_Exit(3);  // on a fiber's stack, which exit would free
}

void to_scheduler(bool for_good) {
    Fiber* self = current;
    if (__sanitizer_start_switch_fiber)
        __sanitizer_start_switch_fiber(for_good ? nullptr : &self->fake_stack, scheduler_bottom, scheduler_size);
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(scheduler_tsan, no_order_between_fibers);
    switch_context(self->context, scheduler);
    if (__sanitizer_finish_switch_fiber)
        __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_bottom, &scheduler_size);
}

void fiber_main() {
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
    if (__tsan_acquire) __tsan_acquire(&block_lines[(block_at.x + 1) % 2]);
    thread_body(thread_context);
    if (__tsan_release) __tsan_release(&block_lines[block_at.x % 2]);
    current->state = State::Done;
    to_scheduler(true);
}

void resume(Fiber& fiber) {
    current = &fiber;
    if (__sanitizer_start_switch_fiber)
        __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack.get(), stack_bytes);
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fiber.tsan, no_order_between_fibers);
    switch_context(scheduler, fiber.context);
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
    current = nullptr;
}

Order order_of_next_block() {
    static unsigned blocks = 0;
    return order == Order::InTurn ? static_cast<Order>(blocks++ % 3) : order;
}

void run_block() {
    const size_t threads = fibers.size();
    const Order of_block = order_of_next_block();
    std::vector<size_t> turn(threads);
    for (size_t i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.state = State::Ready;
        fiber.index = dim3(static_cast<unsigned>(i), 0, 0);
        make_context(fiber.context, fiber.stack.get(), fiber_main);
        if (__tsan_create_fiber) {
            if (fiber.tsan != nullptr) __tsan_destroy_fiber(fiber.tsan);
            fiber.tsan = __tsan_create_fiber(0);
        }
        turn[i] = of_block == Order::Reverse ? threads - 1 - i : i;
    }
    for (size_t done = 0; done < threads;) {
        if (of_block == Order::Random) std::shuffle(turn.begin(), turn.end(), generator);
        bool moved = false;
        for (size_t i : turn) {
            if (fibers[i].state != State::Ready) continue;
            moved = true;
            resume(fibers[i]);
            done += fibers[i].state == State::Done;
        }
        if (!moved) {
            for (Fiber& fiber : fibers) {
                current = &fiber;
                if (fiber.state == State::AtWarp) fail("waits for lanes of mask %08x that never come", fiber.mask);
                if (fiber.state == State::AtBlock) fail("waits at a barrier that not every thread reaches");
            }
        }
    }
}

}  // namespace

void set_order(Order new_order, unsigned seed) {
    order = new_order;
    generator.seed(seed);
}

const dim3& thread_index() { return current->index; }
const dim3& block_index() { return block_at; }
unsigned char* dynamic_memory() { return shared_memory.get(); }

void run_grid(dim3 new_grid, dim3 new_block, size_t shared, void (*body)(void*), void* context) {
    if (current != nullptr) fail("launches a kernel");
    grid = new_grid;
    block = new_block;
    if (block.y != 1 || block.z != 1 || grid.y != 1 || grid.z != 1) fail("blocks and grids have one dimension here");
    thread_body = body;
    thread_context = context;
    launches_with_memory += shared > 0;
    shared_memory.reset(shared > 0 ? new unsigned char[shared] : nullptr);
    if (__tsan_get_current_fiber) scheduler_tsan = __tsan_get_current_fiber();
    if (fibers.size() != block.x) {
        fibers = std::vector<Fiber>(block.x);
        for (Fiber& fiber : fibers) fiber.stack.reset(new char[stack_bytes]);
    }
    for (unsigned b = 0; b < grid.x; ++b) {
        block_at = dim3(b, 0, 0);
        run_block();
    }
    if (__tsan_acquire)
        for (int& line : block_lines) __tsan_acquire(&line);  // the launch has ended
}

uint64_t meet(Operation operation, unsigned mask, uint64_t value, int source) {
    Fiber& self = *current;
    const size_t first = self.index.x / 32 * 32;
    const int own = static_cast<int>(self.index.x % 32);
    if ((mask >> own & 1) == 0) fail("takes part in a warp operation whose mask %08x leaves it out", mask);
    if (source >= 0 && (mask >> source & 1) == 0) fail("reads lane %d, which mask %08x leaves out", source, mask);
    self.operation = operation;
    self.mask = mask;
    self.source = source;
    self.value = value;
    self.state = State::AtWarp;
    void* line = &warp_lines[first / 32];
    if (__tsan_release) __tsan_release(line);

    bool complete = true;
    for (int l = 0; l < 32; ++l) {
        if ((mask >> l & 1) == 0) continue;
        if (first + static_cast<size_t>(l) >= fibers.size()) fail("names lane %d, which the block does not have", l);
        const Fiber& other = fibers[first + static_cast<size_t>(l)];
        if (other.state == State::Done) fail("waits for lane %d of mask %08x, which has ended", l, mask);
        if (other.state != State::AtWarp) {
            complete = false;
        } else if (other.mask != mask || other.operation != operation) {
            fail("meets lane %d at another operation or with another mask (%08x, there %08x)", l, mask, other.mask);
        }
    }
    if (complete) {
        uint64_t votes = 0, largest = 0;
        for (int l = 0; l < 32; ++l) {
            if ((mask >> l & 1) == 0) continue;
            const uint64_t given = fibers[first + static_cast<size_t>(l)].value;
            votes |= (given & 1) << l;
            largest = std::max(largest, given);
        }
        const uint64_t together = operation == Operation::Largest ? largest : votes;
        for (int l = 0; l < 32; ++l) {
            if ((mask >> l & 1) == 0) continue;
            Fiber& other = fibers[first + static_cast<size_t>(l)];
            other.result = other.source >= 0 ? fibers[first + static_cast<size_t>(other.source)].value : together;
            other.state = State::Ready;
        }
    } else {
        to_scheduler(false);
    }
    if (__tsan_acquire) __tsan_acquire(line);
    return current->result;
}

void meet_block() {
    current->state = State::AtBlock;
    if (__tsan_release) __tsan_release(&barrier_line);
    bool complete = true;
    for (const Fiber& fiber : fibers) {
        if (fiber.state == State::Done) fail("waits at a barrier that thread %u did not reach", fiber.index.x);
        complete = complete && fiber.state == State::AtBlock;
    }
    if (complete)
        for (Fiber& fiber : fibers) fiber.state = State::Ready;
    else
        to_scheduler(false);
    if (__tsan_acquire) __tsan_acquire(&barrier_line);
}

}  // namespace cuda_on_cpu
