#include "kernels.cuh"

cbn::Kernels cbn::kernels_float(int components, bool channels_last, Mode mode) {
  return kernels_of<float>(components, channels_last, mode);
}
