// What every C++ and CUDA source shares. No torch header, ever: callers pass raw pointers.
#pragma once
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__CUDACC__)
#define TPPO_HD __host__ __device__
#else
#define TPPO_HD
#endif

// The hot loops are compiled once per x86-64 level and chosen at load: no -march=native.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define TPPO_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define TPPO_CLONES
#endif

namespace tppo {

// Calls body(begin, end) on contiguous parts of [0, count), one a thread. `grain` is the least
// number of items that is worth a thread. Parts never share an item: results do not depend on it.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, int threads, const Body& body) {
  const int64_t parts =
      std::max<int64_t>(1, std::min<int64_t>(threads, count / std::max<int64_t>(grain, 1)));
  std::vector<std::thread> workers;
  for (int64_t p = 1; p < parts; ++p)
    workers.emplace_back([&, p] { body(count * p / parts, count * (p + 1) / parts); });
  body(0, count / parts);
  for (auto& worker : workers) worker.join();
}

}  // namespace tppo
