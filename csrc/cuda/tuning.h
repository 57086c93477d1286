// The planner's constants from the environment, for measurements.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <mutex>
#include <string>

#include "launch.h"

namespace cbn {

// The number that a variable holds, one of `allowed`; `otherwise` where it is not set.
inline int number_from_environment(const char* variable, int otherwise, std::initializer_list<int> allowed) {
  const char* text = std::getenv(variable);
  if (text == nullptr) return otherwise;
  std::string expected;
  for (const int number : allowed) {
    if (std::to_string(number) == text) return number;
    expected += (expected.empty() ? "" : ", ") + std::to_string(number);
  }
  STD_TORCH_CHECK(false, "expected ", variable, " to be one of ", expected, "; got ", text);
}

inline Tuning tuning_from_environment() {
  const Tuning usual;
  return {number_from_environment("CBN_CUDA_CLUSTER", usual.cluster, {0, 1, 2, 4, 8}),
          number_from_environment("CBN_CUDA_BLOCKS", usual.blocks, {1, 2, 4, 8, 16, 32}),
          number_from_environment("CBN_CUDA_THREADS", usual.threads, {64, 128, 256, 512})};
}

// Read once: another thread may write the environment while an operator runs. `again` is for who has just written it.
inline Tuning tuning(bool again = false) {
  static std::mutex mutex;
  static std::optional<Tuning> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (again || !known) known = tuning_from_environment();
  return *known;
}

inline void read_cuda_environment() { tuning(true); }

}  // namespace cbn
