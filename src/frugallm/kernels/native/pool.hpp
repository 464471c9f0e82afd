// Threads that work on one step together: they spin at barriers within it and sleep between steps.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace frugal {

class Pool {
public:
    using Job = void (*)(void* context, Pool& pool, int thread);

    explicit Pool(int threads);
    ~Pool();
    int size() const { return int(workers_.size()) + 1; }
    void run(Job job, void* context);  // on all threads, the caller's among them
    void barrier();                    // all threads of the running job

private:
    void start(int threads);
    void work(int thread);

    std::vector<std::thread> workers_;
    long process_ = 0;       // threads do not survive a fork
    std::mutex one_at_a_time_;  // callers
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> epoch_{0};
    std::atomic<bool> stop_{false};
    std::atomic<int> done_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    Job job_ = nullptr;
    void* context_ = nullptr;
};

// Part `thread` of `threads` of the numbers from 0 to count, in whole steps.
struct Range {
    int64_t first, last;
};
inline Range share(int64_t count, int thread, int threads, int64_t step = 1) {
    int64_t steps = (count + step - 1) / step;
    int64_t first = steps * thread / threads * step, last = steps * (thread + 1) / threads * step;
    return {first < count ? first : count, last < count ? last : count};
}

}  // namespace frugal
