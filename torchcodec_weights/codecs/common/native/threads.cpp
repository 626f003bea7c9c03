#include "threads.h"

#include <pthread.h>

#include <condition_variable>
#include <mutex>
#include <thread>

namespace codecs {
namespace {

class Pool {
 public:
  void run(size_t others, const std::function<void()>& work) {
    const std::lock_guard<std::mutex> turn(turn_);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      try {
        for (; threads_ < others; ++threads_) std::thread([this] { serve(); }).detach();
      } catch (...) {
        // Fewer threads then.
      }
      work_ = &work;
      wanted_ = others < threads_ ? others : threads_;
      running_ = wanted_;
    }
    wake_.notify_all();
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      --wanted_;
      const std::function<void()>& work = *work_;
      lock.unlock();
      work();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void()>* work_ = nullptr;
  size_t threads_ = 0, wanted_ = 0, running_ = 0;
};

Pool* pool = nullptr;
std::once_flag made;

Parallel openmp = nullptr;

void call(void* work) { (*static_cast<const std::function<void()>*>(work))(); }

// A forked child has none of the threads, neither OpenMP's nor ours: it starts with a pool of its
// own. The old one is left alone, as another thread may have held its locks.
void start_anew() {
  openmp = nullptr;
  pool = new Pool;
}

}  // namespace

void in_threads(size_t threads, const std::function<void()>& work) {
  if (threads <= 1) return work();
  std::call_once(made, [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, start_anew);
  });
  if (openmp) {
    openmp(call, const_cast<std::function<void()>*>(&work), static_cast<unsigned>(threads), 0);
  } else {
    pool->run(threads - 1, work);
  }
}

}  // namespace codecs

#pragma GCC visibility push(default)
extern "C" void codecs_use_openmp(codecs::Parallel parallel) { codecs::openmp = parallel; }
#pragma GCC visibility pop
