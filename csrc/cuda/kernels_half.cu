#include <torch/headeronly/util/Half.h>

#include "kernels.cuh"

cbn::Kernels cbn::kernels_half(int components, bool channels_last, Mode mode) {
  return kernels_of<c10::Half>(components, channels_last, mode);
}
