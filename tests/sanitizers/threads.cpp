// What the kernels need of an OpenMP runtime, in std::thread: libgomp is not instrumented, so ThreadSanitizer cannot see
// that its threads wait for each other, and would report every parallel loop. Linked in the place of libgomp.
#include <thread>
#include <vector>

namespace {
thread_local int id = 0, team = 1;
}

extern "C" {

int omp_get_thread_num() { return id; }
int omp_get_num_threads() { return team; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
    const auto run = [=](int number) {
        const int outer_id = id, outer_team = team;
        id = number, team = int(threads);
        body(data);
        id = outer_id, team = outer_team;
    };
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i) others.emplace_back(run, int(i));
    run(0);
    for (std::thread& other : others) other.join();
}

}  // extern "C"
