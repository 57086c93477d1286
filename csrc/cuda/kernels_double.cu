#include "kernels.cuh"

cbn::Kernels cbn::kernels_double(int components, bool channels_last, Mode mode) {
  return kernels_of<double>(components, channels_last, mode);
}
