// The CPU kernels for whatever the compiler targets by default: SSE2 on x86-64, NEON on 64-bit Arm.
#define CBN_VECTOR_BYTES 16
#include "kernels.h"

cbn::Tasks cbn::tasks_baseline(const Problem& p) { return tasks(p); }
