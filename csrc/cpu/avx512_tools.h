// Masks, a transposition and memory for the files that are compiled with AVX-512 flags.
#pragma once
#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <memory>

namespace pyunlearn {
namespace {

inline __mmask32 first32(int64_t count) {
  return count >= 32 ? ~__mmask32{0} : count <= 0 ? __mmask32{0} : (__mmask32{1} << count) - 1;
}
inline __mmask16 first16(int64_t count) {
  return count >= 16 ? __mmask16(0xffff) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
}

inline void transpose(__m512i (&x)[16]) {  // of 32-bit numbers
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88), b = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd), d = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    y[i] = _mm512_shuffle_i32x4(a, b, 0x88), y[i + 8] = _mm512_shuffle_i32x4(a, b, 0xdd);
    y[i + 4] = _mm512_shuffle_i32x4(c, d, 0x88), y[i + 12] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

// Memory that begins at a cache line, and stays for the next call.
template <class T> class AlignedMemory {
 public:
  T* room(int64_t count) {
    if (count > size_) {
      size_ = 0;  // if there is no memory, the next call asks again
      memory_.reset();
      memory_.reset(new char[count * sizeof(T) + 63]);
      size_ = count;
    }
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) & ~uintptr_t{63});
  }

 private:
  std::unique_ptr<char[]> memory_;
  int64_t size_ = 0;
};

// Memory for each thread of a parallel region, `each` numbers that fill whole cache lines, asked for before the region:
// within it nothing may throw.
template <class T> class MemoryOfThreads {
 public:
  MemoryOfThreads(AlignedMemory<T>& memory, int64_t each, int64_t rows, int threads) : each_(each) {
    const int64_t most = rows < threads ? rows : threads;
    all_ = memory.room(each_ * (most < 1 ? 1 : most));
  }
  T* next() { return all_ + each_ * next_++; }  // once a call of the region's function

 private:
  int64_t each_;
  T* all_;
  std::atomic<int64_t> next_{0};
};

}  // namespace
}  // namespace pyunlearn
