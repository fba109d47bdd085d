// What the programs that run a core on its own under sanitizers share: random numbers, and arrays of exactly their size.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "pyface/types.h"

namespace {

std::mt19937 generator(1);
inline long pick(long low, long high) { return std::uniform_int_distribution<long>(low, high)(generator); }
inline double normal() { return std::normal_distribution<double>()(generator); }

// Numbers of one type, NaN at first.
struct Array {
  pyface::DType type;
  long size;
  std::unique_ptr<unsigned char[]> data;
  Array(pyface::DType type, long size) : type(type), size(size), data(new unsigned char[size * width()]) {
    std::memset(data.get(), 0xff, size * width());
  }
  long width() const { return type == pyface::DType::f32 ? 4 : type == pyface::DType::f64 ? 8 : 2; }
  double get(long i) const {
    if (type == pyface::DType::f64) return as<double>(i);
    if (type == pyface::DType::f16) return as<_Float16>(i);
    std::uint32_t bits = 0;
    std::memcpy(reinterpret_cast<char*>(&bits) + 4 - width(), data.get() + i * width(), width());
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
  }
  void set(long i, double wide) {
    if (type == pyface::DType::f64) return put(i, wide);
    if (type == pyface::DType::f16) return put(i, (_Float16)wide);
    const float v = (float)wide;
    std::uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if (type == pyface::DType::bf16 && v == v) bits = bits + 0x7fff + (bits >> 16 & 1);
    std::memcpy(data.get() + i * width(), reinterpret_cast<char*>(&bits) + 4 - width(), width());
  }
  void fill() {
    for (long i = 0; i < size; ++i) set(i, normal());
  }

 private:
  template <class T>
  T as(long i) const {
    T v;
    std::memcpy(&v, data.get() + i * sizeof v, sizeof v);
    return v;
  }
  template <class T>
  void put(long i, T v) {
    std::memcpy(data.get() + i * sizeof v, &v, sizeof v);
  }
};

}  // namespace
