// A component of a channel: what it is before a call, and what is done once when its sums are complete.
#pragma once

#include "arguments.h"
#include "device.cuh"

namespace cbn {

// The statistics that normalise: the batch's, or in evaluation the running ones, which are constants and need no mass.
struct Used {
  double mass, mean, var;
};

// Element i of the [M, C] tensors, which are of S.
template <class S>
struct Component {
  const Arguments& a;
  int64_t i;

  __device__ __forceinline__ double read(const void* values, double otherwise) const {
    return values ? static_cast<double>(static_cast<const S*>(values)[i]) : otherwise;
  }
  // Of [kinds, M, C].
  __device__ __forceinline__ double read_kind(const void* values, int kind) const {
    return static_cast<const S*>(values)[kind * a.components * a.channels + i];
  }
  __device__ __forceinline__ void write_kind(void* values, int kind, double value) const {
    static_cast<S*>(values)[kind * a.components * a.channels + i] = static_cast<S>(value);
  }

  __device__ __forceinline__ LogDensity density() const {
    return log_density(read(a.prior, 1), read(a.mean, 0), read(a.var, 0), a.eps);
  }
  __device__ __forceinline__ double bias() const { return read(a.bias, 0); }
  __device__ __forceinline__ double scale(const Used& used) const {
    return branch_scale(read(a.weight, 1), used.var, a.eps);
  }

  __device__ __forceinline__ Used used() const {
    if (!a.training) return {0, read(a.mean, 0), read(a.var, 0)};
    return {read_kind(a.batch, 0), read_kind(a.batch, 1), read_kind(a.batch, 2)};
  }

  // The running statistics as this call uses them; they may move before the backward pass.
  __device__ __forceinline__ void keep_running() const {
    write_kind(a.running, 0, read(a.prior, 0));
    write_kind(a.running, 1, read(a.mean, 0));
    write_kind(a.running, 2, read(a.var, 0));
  }

  // M-step (eqs 10-12) from the sums [3], rounded as they are kept; without mass the running statistics.
  __device__ __forceinline__ Used finish_moments(const double (&sums)[kMomentSums], double origin) const {
    double mean = read(a.mean, 0), var = read(a.var, 0);
    if (!(sums[0] < kMassFloor)) mean_and_variance(sums[0], sums[1], sums[2], origin, mean, var);
    return {static_cast<S>(sums[0]), static_cast<S>(mean), static_cast<S>(var)};
  }
  __device__ __forceinline__ void write_batch(const Used& used) const {
    write_kind(a.batch, 0, used.mass);
    write_kind(a.batch, 1, used.mean);
    write_kind(a.batch, 2, used.var);
  }

  // Gradients of weight and bias from the sums [2].
  __device__ __forceinline__ double finish_weight_gradient(const double (&sums)[kGradientSums], double origin,
                                                           const Used& used) const {
    return weight_gradient(sums[0], sums[1], used.mean, origin, used.var, a.eps);
  }
  __device__ __forceinline__ void write_gradients(double weight, double bias) const {
    write_kind(a.grad_weight, 0, weight);
    write_kind(a.grad_bias, 0, bias);
  }
};

}  // namespace cbn
