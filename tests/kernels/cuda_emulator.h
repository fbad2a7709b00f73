// Runs a CUDA kernel on the CPU, one block after another, each thread of a block as a fibre of its own (ucontext).
//
// Included before a .cu that is compiled by g++. What goes wrong only on a device shows here: shared memory is full of
// NaN when a block starts, so a missing barrier is seen; barriers that not every thread reaches, and shuffles that name a
// lane which has left, end the launch with a message in emulator::error; threads run in ascending or descending order, and
// a result that depends on it is a race. Not seen: what only real concurrency shows, and speed.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define ZEST_LAUNCH(kernel, blocks, threads, stream, ...) \
    (void)(stream), emulator::launch(blocks, threads, [&] { kernel(__VA_ARGS__); })
#define ZEST_SHARED(Type, name, count)                          \
    static emulator::Shared<sizeof(Type) * (count)> name##_bytes; \
    Type* const name = reinterpret_cast<Type*>(name##_bytes.of_this_block())
#define __syncthreads() emulator::barrier(__LINE__)
#define __shfl_down_sync(mask, value, delta) emulator::shuffle(mask, value, emulator::lane() + (delta), __LINE__)
#define __shfl_xor_sync(mask, value, bits) emulator::shuffle(mask, value, emulator::lane() ^ (bits), __LINE__)

struct uint4 {
    uint32_t x, y, z, w;
} __attribute__((aligned(16)));
struct Index {
    unsigned x = 0;
};
inline Index threadIdx, blockIdx;

namespace emulator {

struct Fibre {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
    bool exited = false;
    int barrier_line = 0;          // where it waits, 0 = it does not
    int64_t shuffles = 0;          // posted so far
    int shuffle_line = 0;
    double posted[2];              // of the last two shuffles: a lane may be one ahead of those that still read
};

inline std::vector<Fibre> fibres;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::string error;
inline bool descending = false;      // order of the threads within a block
inline int64_t first_block = 0;      // blocks before this one are left out
inline int64_t block_serial = 0;     // counts blocks over all launches
inline int64_t progress = 0;

inline Fibre& self() { return fibres[threadIdx.x]; }
inline unsigned lane() { return threadIdx.x % 32; }

inline void wait() { swapcontext(&self().context, &scheduler); }
inline void fail(const std::string& message) {
    if (error.empty()) error = message;
    for (;;) wait();  // the scheduler gives the block up
}

template <size_t size>
struct Shared {
    alignas(16) unsigned char bytes[size];
    int64_t block = -1;
    unsigned char* of_this_block() {
        if (block != block_serial) memset(bytes, 0xff, size);
        block = block_serial;
        return bytes;
    }
};

inline void barrier(int line) {
    self().barrier_line = line;
    ++progress;
    while (self().barrier_line) wait();
}

inline double shuffle(unsigned mask, double value, unsigned source, int line) {
    const unsigned warp = threadIdx.x / 32 * 32;
    Fibre& mine = self();
    if (!(mask >> lane() & 1)) fail("line " + std::to_string(line) + ": a shuffle whose mask leaves out the caller");
    mine.posted[mine.shuffles % 2] = value;
    mine.shuffle_line = line;
    const int64_t turn = mine.shuffles++;
    ++progress;
    for (unsigned i = 0; i < 32; ++i)
        while (mask >> i & 1) {
            const Fibre* other = warp + i < fibres.size() ? &fibres[warp + i] : nullptr;
            if (other && other->shuffles > turn) break;
            if (!other || other->exited)
                fail("line " + std::to_string(line) + ": a shuffle names lane " + std::to_string(i) + ", which has left");
            wait();
        }
    if (source >= 32) return value;
    if (!(mask >> source & 1)) return NAN;
    return fibres[warp + source].posted[turn % 2];
}

inline void enter() {
    body();
    self().exited = true;
    ++progress;
    for (;;) wait();
}

// Lets every thread through a barrier that all of them have reached.
inline void open_barrier() {
    size_t waiting = 0;
    for (const Fibre& f : fibres) waiting += f.barrier_line != 0 && f.barrier_line == fibres[0].barrier_line;
    if (waiting < fibres.size()) return;
    for (Fibre& f : fibres) f.barrier_line = 0;
    ++progress;
}

inline std::string barrier_report() {
    int line = 0, reached = 0;
    for (const Fibre& f : fibres) line = f.barrier_line > line ? f.barrier_line : line;
    for (const Fibre& f : fibres) reached += f.barrier_line == line;
    return "line " + std::to_string(line) + ": a barrier that only " + std::to_string(reached) + " of " +
           std::to_string(fibres.size()) + " threads reach";
}

inline void run_block(unsigned threads) {
    fibres.resize(threads);
    for (Fibre& f : fibres) {
        f.exited = false, f.barrier_line = 0, f.shuffles = 0;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size();
        makecontext(&f.context, enter, 0);
    }
    for (size_t left = threads; left > 0 && error.empty();) {
        const int64_t before = progress;
        left = 0;
        for (unsigned i = 0; i < threads && error.empty(); ++i) {
            threadIdx.x = descending ? threads - 1 - i : i;
            if (!self().exited) swapcontext(&scheduler, &self().context);
            left += !self().exited;
        }
        open_barrier();
        if (left && progress == before && error.empty()) {
            error = barrier_report();
        }
    }
}

inline void launch(int64_t blocks, unsigned threads, std::function<void()> kernel) {
    body = std::move(kernel);
    for (int64_t block = first_block; block < blocks && error.empty(); ++block) {
        blockIdx.x = unsigned(block);
        ++block_serial;
        run_block(threads);
    }
}

}  // namespace emulator

// The parts of CUDA's device library and runtime that the kernels use.
template <class T>
T __ldg(const T* p) {
    return *p;
}
template <class To, class From>
To bit_cast_to(From from) {
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}
inline float __uint_as_float(uint32_t b) { return bit_cast_to<float>(b); }
inline double __longlong_as_double(long long b) { return bit_cast_to<double>(b); }
inline int cudaGetLastError() { return 0; }
struct cudaFuncAttributes {};
template <class Kernel>
int cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
    return 0;
}

namespace zest::cuda {
inline float half_to_float(uint16_t b) {
    const int exponent = b >> 10 & 31, fraction = b & 1023;
    const float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                                           : ldexpf(exponent ? fraction + 1024 : fraction, exponent ? exponent - 25 : -24);
    return b >> 15 ? -magnitude : magnitude;
}
}  // namespace zest::cuda
