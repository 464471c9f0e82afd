#include "pool.hpp"

#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace frugal {

namespace {

constexpr int SPINS_AT_BARRIER = 1 << 12;  // then the processor is offered to others, in case there are more threads than cores
constexpr int SPINS_BETWEEN_STEPS = 1 << 10;

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// vdpbf16ps takes denormal numbers for zero; so do all other products within a step, that paths agree.
class FlushDenormals {
#if defined(__x86_64__)
public:
    FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before_); }

private:
    unsigned before_;
#endif
};

}  // namespace

Pool::Pool(int threads) { start(threads); }

void Pool::start(int threads) {
    process_ = long(getpid());
    for (int thread = 1; thread < threads; thread++) workers_.emplace_back([this, thread] { work(thread); });
}

Pool::~Pool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void Pool::run(Job job, void* context) {
    std::lock_guard<std::mutex> turn(one_at_a_time_);
    [[maybe_unused]] FlushDenormals flush;
    if (process_ != long(getpid())) {
        int threads = size();
        new std::vector<std::thread>(std::move(workers_));  // nothing may touch threads that are not in this process
        workers_.clear();
        epoch_ = 0, arrived_ = 0, phase_ = 0;
        start(threads);
    }
    if (!workers_.empty()) {
        std::lock_guard<std::mutex> lock(mutex_);
        job_ = job, context_ = context;
        done_.store(0, std::memory_order_relaxed);
        epoch_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job(context, *this, 0);
    for (int spins = 0; done_.load(std::memory_order_acquire) < int(workers_.size()); spins++)
        spins < SPINS_AT_BARRIER ? pause() : std::this_thread::yield();
}

void Pool::work(int thread) {
    [[maybe_unused]] FlushDenormals flush;
    uint64_t seen = 0;
    for (;;) {
        for (int spins = 0; spins < SPINS_BETWEEN_STEPS && epoch_.load(std::memory_order_acquire) == seen; spins++) pause();
        {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return stop_ || epoch_.load(std::memory_order_relaxed) != seen; });
            if (stop_) return;
            seen = epoch_.load(std::memory_order_relaxed);
        }
        job_(context_, *this, thread);
        done_.fetch_add(1, std::memory_order_release);
    }
}

void Pool::barrier() {
    if (workers_.empty()) return;
    uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size() - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; spins++)
        spins < SPINS_AT_BARRIER ? pause() : std::this_thread::yield();
}

}  // namespace frugal
