// Threads: an OpenMP team of the size the caller asks for (torch.get_num_threads() at call time), no global state touched.
// `body(begin, end)` gets a contiguous share of 0..tasks, so results never depend on the team as long as tasks are independent.
#pragma once

#include <cstdint>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace pyface::cpu::PYFACE_ISA {

template <class Body>
static void parallel_for([[maybe_unused]] int threads, std::int64_t tasks, Body body) {
#if defined(_OPENMP)
  if (threads > tasks) threads = (int)tasks;
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const std::int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
      const std::int64_t begin = tasks * me / team, end = tasks * (me + 1) / team;
      if (begin < end) body(begin, end);
    }
    return;
  }
#endif
  if (tasks > 0) body((std::int64_t)0, tasks);
}

}  // namespace pyface::cpu::PYFACE_ISA
