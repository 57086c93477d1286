// The CPU kernels for AVX-512. The standard headers come first: they must not be compiled for it.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#define CBN_VECTOR_BYTES 64
#include "kernels.h"

cbn::Tasks cbn::tasks_avx512(const Problem& p) { return tasks(p); }

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
