#include <torch/headeronly/util/BFloat16.h>

#include "kernels.cuh"

cbn::Kernels cbn::kernels_bfloat16(int components, bool channels_last, Mode mode) {
  return kernels_of<c10::BFloat16>(components, channels_last, mode);
}
