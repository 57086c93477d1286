// The CPU kernels for AVX2. The standard headers come first: they must not be compiled for it.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define CBN_VECTOR_BYTES 32
#include "kernels.h"

cbn::Tasks cbn::tasks_avx2(const Problem& p) { return tasks(p); }

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
