// A parallel loop. With OpenMP it runs on the very threads that the engine's CPU backend uses, so the
// two never compete for cores; without, it starts plain threads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace zo {

// Calls body(i, thread) for i in [0, n), each thread on one contiguous run of i.
template <typename Body>
void parallel_for(int64_t n, int n_threads, Body body) {
    const int  n_workers = (int) std::max<int64_t>(1, std::min<int64_t>(n_threads, n));
    const auto run       = [&](int worker) {
        const int64_t end = n * (worker + 1) / n_workers;
        for (int64_t i = n * worker / n_workers; i < end; ++i) {
            body(i, worker);
        }
    };
    if (n_workers == 1) {
        run(0);
        return;
    }
#if defined(_OPENMP)
#pragma omp parallel for schedule(static, 1) num_threads(n_workers)
    for (int worker = 0; worker < n_workers; ++worker) {
        run(worker);
    }
#else
    std::vector<std::thread> workers;
    for (int worker = 1; worker < n_workers; ++worker) {
        workers.emplace_back(run, worker);
    }
    run(0);
    for (std::thread & worker : workers) {
        worker.join();
    }
#endif
}

}  // namespace zo
