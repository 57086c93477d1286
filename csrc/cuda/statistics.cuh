// What is done once for each component of a channel, when its sums are complete.
#pragma once

#include "arguments.h"
#include "device.cuh"

namespace cbn {

constexpr int kMomentSums = 3, kGradientSums = 2;

// Element i of [M, C] tensors of S.
template <class S>
struct Component {
  const Arguments& a;
  int64_t i;

  __device__ __forceinline__ double read(const void* values, double otherwise) const {
    return values ? static_cast<double>(static_cast<const S*>(values)[i]) : otherwise;
  }
  // Of [kinds, M, C].
  __device__ __forceinline__ void write(void* values, int kind, double value) const {
    static_cast<S*>(values)[kind * a.components * a.channels + i] = static_cast<S>(value);
  }

  // The running statistics as this call uses them; they may move before the backward pass.
  __device__ __forceinline__ void keep_running() const {
    write(a.running, 0, read(a.prior, 0));
    write(a.running, 1, read(a.mean, 0));
    write(a.running, 2, read(a.var, 0));
  }

  // M-step (eqs 10-12) from the sums [3]: mass, mean and variance; without mass the running ones.
  __device__ __forceinline__ void finish_moments(const double (&sums)[kMomentSums], double origin,
                                                 double (&result)[3]) const {
    result[0] = sums[0];
    result[1] = read(a.mean, 0);
    result[2] = read(a.var, 0);
    if (!(sums[0] < kMassFloor)) mean_and_variance(sums[0], sums[1], sums[2], origin, result[1], result[2]);
  }

  // Gradients of weight and bias from the sums [2].
  __device__ __forceinline__ void finish_gradients(const double (&sums)[kGradientSums], double origin,
                                                   double (&result)[2]) const {
    const int64_t kind = a.components * a.channels;
    const S* batch = static_cast<const S*>(a.batch);
    const double mean = read(a.training ? batch + kind : a.mean, 0);
    const double var = read(a.training ? batch + 2 * kind : a.var, 0);
    result[0] = weight_gradient(sums[0], sums[1], mean, origin, var, a.eps);
    result[1] = sums[0];
  }
};

}  // namespace cbn
