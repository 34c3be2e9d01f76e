// Scratch of a call: vectors whose memory a thread keeps, because a small norm takes less time than its allocations.
#pragma once

#include <array>
#include <cstddef>
#include <new>

namespace jaxnorm {

// Blocks of up to 2**14 bytes that this thread has given back, a list for each power of two from 2**6 on.
class Kept {
  static constexpr int classes = 9;
  struct Block {
    Block* next;
  };
  std::array<Block*, classes> first_{};
  std::array<int, classes> count_{};

 public:
  static constexpr std::align_val_t at{64};

  static int class_of(size_t bytes) {
    int c = 0;
    for (size_t size = 64; size < bytes && c < classes; size *= 2) ++c;
    return c;
  }
  void* take(size_t bytes) {
    const int c = class_of(bytes);
    if (c == classes) return ::operator new(bytes, at);
    if (!first_[c]) return ::operator new(size_t(64) << c, at);
    Block* block = first_[c];
    first_[c] = block->next, --count_[c];
    return block;
  }
  void give(void* memory, size_t bytes) {
    const int c = class_of(bytes);
    if (c == classes || count_[c] == 16) return ::operator delete(memory, at);
    first_[c] = new (memory) Block{first_[c]}, ++count_[c];
  }
  ~Kept() {
    for (Block* block : first_)
      while (block) {
        Block* next = block->next;
        ::operator delete(block, at), block = next;
      }
  }
  static Kept& mine() {
    static thread_local Kept kept;
    return kept;
  }
};

// At the addresses that whole vectors are fastest at.
template <class A> struct Aligned {
  using value_type = A;
  Aligned() = default;
  template <class B> Aligned(const Aligned<B>&) {}
  A* allocate(size_t n) { return static_cast<A*>(Kept::mine().take(n * sizeof(A))); }
  void deallocate(A* a, size_t n) { Kept::mine().give(a, n * sizeof(A)); }
  template <class B> bool operator==(const Aligned<B>&) const { return true; }
  template <class B> bool operator!=(const Aligned<B>&) const { return false; }
};

}  // namespace jaxnorm
