#include "parallel.h"

#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <string>
#endif

namespace pyunlearn {
namespace {

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread)() = nullptr;
  int (*threads)() = nullptr;
};

#if defined(__linux__)
struct Wanted {
  const char* name;
  std::string path;
};

int note_path(dl_phdr_info* info, size_t, void* data) {
  auto* wanted = static_cast<Wanted*>(data);
  const char* slash = std::strrchr(info->dlpi_name, '/');
  if (!std::strstr(slash ? slash : info->dlpi_name, wanted->name)) return 0;
  wanted->path = info->dlpi_name;
  return 1;
}

// A look-up through libtorch_cpu searches its dependencies, so it finds torch's runtime even where another package
// brought a second one.
OpenMP find_openmp() {
  for (const char* name : {"libtorch_cpu", "libgomp"}) {
    Wanted wanted{name, {}};
    dl_iterate_phdr(note_path, &wanted);
    void* library = wanted.path.empty() ? nullptr : dlopen(wanted.path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
    if (!library) continue;
    OpenMP found;
    found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(library, "GOMP_parallel"));
    found.thread = reinterpret_cast<decltype(found.thread)>(dlsym(library, "omp_get_thread_num"));
    found.threads = reinterpret_cast<decltype(found.threads)>(dlsym(library, "omp_get_num_threads"));
    if (found.parallel && found.thread && found.threads) return found;
  }
  return {};
}
#else
OpenMP find_openmp() { return {}; }
#endif

const OpenMP& openmp() {
  static const OpenMP found = find_openmp();
  return found;
}

struct Job {
  int64_t rows;
  RowRange body;
  void* context;

  void share(int64_t index, int64_t count) const {
    const int64_t each = rows / count, rest = rows % count;
    const int64_t begin = index * each + (index < rest ? index : rest);
    const int64_t end = begin + each + (index < rest);
    if (begin < end) body(context, begin, end);
  }
};

}  // namespace

void run_rows(int64_t rows, int threads, RowRange body, void* context) {
  const int64_t count = rows < threads ? rows : threads;
  Job job{rows, body, context};
  if (openmp().parallel) {
    // The team may be smaller than asked for, so each member works out its share itself.
    auto member = [](void* data) { static_cast<Job*>(data)->share(openmp().thread(), openmp().threads()); };
    openmp().parallel(member, &job, static_cast<unsigned>(count), 0);
    return;
  }
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<size_t>(count));
  int64_t started = 1;
  try {
    for (; started < count; ++started) helpers.emplace_back([&job, started, count] { job.share(started, count); });
  } catch (const std::system_error&) {
    // the system has no more threads: this one takes what is left
  }
  job.share(0, count);
  for (int64_t i = started; i < count; ++i) job.share(i, count);
  for (auto& helper : helpers) helper.join();
}

}  // namespace pyunlearn
