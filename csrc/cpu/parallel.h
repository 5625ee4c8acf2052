// Rows in parallel on torch's own threads: we link no OpenMP, and a second pool would compete with torch's spinning
// workers.
#pragma once
#include <cstdint>
#include <memory>
#include <type_traits>

namespace pyunlearn {

using RowRange = void (*)(void* context, int64_t begin, int64_t end);
void run_rows(int64_t rows, int threads, RowRange body, void* context);

// Calls f(begin, end) on disjoint ranges that cover [0, rows). f must not throw.
template <class F>
void parallel_rows(int64_t rows, int64_t work_per_row, int threads, F&& f) {
  constexpr int64_t kSmall = 32768;  // elements; below this waking a thread costs more than the work
  if (rows <= 0) return;
  if (threads <= 1 || rows == 1 || rows * work_per_row < kSmall) return f(int64_t{0}, rows);
  using Body = std::remove_reference_t<F>;
  run_rows(
      rows, threads, [](void* body, int64_t begin, int64_t end) { (*static_cast<Body*>(body))(begin, end); },
      std::addressof(f));
}

}  // namespace pyunlearn
