// Which instruction set the CPU kernels use: the best that the processor has, or what CBN_CPU_CAPABILITY names.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace cbn {

enum class Capability { kBaseline, kAvx2, kAvx512 };

inline Capability best_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? Capability::kAvx512 : Capability::kAvx2;
  }
#endif
  return Capability::kBaseline;
}

inline const char* capability_name(Capability capability) {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
  return kNames[static_cast<int>(capability)];
}

// Throws std::runtime_error where CBN_CPU_CAPABILITY is unknown or more than the processor has.
inline Capability cpu_capability() {
  const Capability best = best_capability();
  const char* wanted = std::getenv("CBN_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int c = 0; c <= static_cast<int>(best); ++c)
    if (std::string(wanted) == capability_name(static_cast<Capability>(c))) return static_cast<Capability>(c);
  throw std::runtime_error("expected CBN_CPU_CAPABILITY baseline, avx2 or avx512, at most this processor's " +
                           std::string(capability_name(best)) + ", got " + wanted);
}

}  // namespace cbn
