// How a test talks to an emulated core: a file of calls in, a file of filled buffers out. __init__.py is the other end.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <memory>
#include <vector>

namespace emulation {

// One call: its arguments in order, and the buffers that its pointers point into. A buffer is an allocation of its
// exact size, so that a step over its end is caught.
class Call {
 public:
  explicit Call(std::FILE* file) : file_(file) {}

  bool next() {
    std::int64_t buffers = 0;
    if (std::fread(&op_, sizeof op_, 1, file_) != 1) return false;
    const Order order = static_cast<Order>(integer());
    set_order(order, static_cast<unsigned>(integer()));
    buffers = integer();
    memory_.clear();
    for (; buffers > 0; --buffers) {
      const std::int64_t size = integer();
      memory_.push_back({std::unique_ptr<char[]>(new char[size]), size});
      if (size && std::fread(memory_.back().data.get(), size, 1, file_) != 1) fail("the request ends inside a buffer");
    }
    return true;
  }

  std::int64_t op() const { return op_; }
  std::int64_t integer() { return read<std::int64_t>(); }
  double real() { return read<double>(); }

  template <typename T = void>
  T* pointer() {
    const std::int64_t buffer = integer(), offset = integer();
    return buffer < 0 ? nullptr : reinterpret_cast<T*>(memory_.at(buffer).data.get() + offset);
  }

  cudaStream_t stream() const { return reinterpret_cast<cudaStream_t>(kStream); }

  void answer(std::FILE* out, cudaError_t error) const {
    const std::int64_t status = error;
    std::fwrite(&status, sizeof status, 1, out);
    for (const Buffer& buffer : memory_) std::fwrite(buffer.data.get(), 1, buffer.size, out);
  }

 private:
  struct Buffer {
    std::unique_ptr<char[]> data;
    std::int64_t size;
  };

  template <typename T>
  T read() {
    T value;
    if (std::fread(&value, sizeof value, 1, file_) != 1) fail("the request ends inside a call");
    return value;
  }

  std::FILE* file_;
  std::int64_t op_ = 0;
  std::vector<Buffer> memory_;
};

// Runs every call of the file argv[1] through `perform` and writes the answers to argv[2].
template <typename F>
int serve(char** argv, F perform) {
  std::FILE* in = std::fopen(argv[1], "rb");
  std::FILE* out = std::fopen(argv[2], "wb");
  if (!in || !out) fail("cannot open %s or %s", argv[1], argv[2]);
  Call call(in);
  while (call.next()) call.answer(out, perform(call));
  std::fclose(in);
  return std::fclose(out);
}

}  // namespace emulation
