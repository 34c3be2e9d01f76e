// The CPU kernels against their definition in long double, on random shapes, types and threads; for sanitizers.
//
//     fuzz SEED CASES [FIRST]        see `sanitize` beside this file, which builds and runs it
//
// A case is known by its seed and its number: `fuzz SEED 1 NUMBER` runs the one that failed. Each case runs on every
// instruction set that this processor has, twice: alone, and on threads and with buffers placed otherwise, for equal
// bits. Buffers have their exact size, which AddressSanitizer sees; those that end or begin at a page without access
// are for what it does not see, masked vectors, and need no sanitizer.
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <mutex>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "norm.h"

#if defined(SANITIZED)
extern "C" void __sanitizer_set_death_callback(void (*)());
#endif

namespace jaxnorm {

#define JN_TABLES(isa)                      \
  namespace isa {                           \
  extern const Table<float> float_table;    \
  extern const Table<double> double_table;  \
  }
JN_TABLES(baseline)
#if defined(__x86_64__) && !defined(BASELINE_ALONE)
#ifndef WITHOUT_AVX2
JN_TABLES(avx2)
#endif
JN_TABLES(avx512)
#ifndef SANITIZED  // it differs from avx512 in one instruction, and takes as long to build
JN_TABLES(avx512bf16)
#endif
#endif

namespace {

using Real = long double;  // what the truth is computed in
constexpr double infinity = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();

struct InstructionSet {
  const char* name;
  Table<float> of_float;
  Table<double> of_double;
};

std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> sets{{"baseline", baseline::float_table, baseline::double_table}};
#if defined(__x86_64__) && !defined(BASELINE_ALONE)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#ifndef WITHOUT_AVX2
  if (has_avx2) sets.push_back({"avx2", avx2::float_table, avx2::double_table});
#endif
  if (has_avx512) sets.push_back({"avx512", avx512::float_table, avx512::double_table});
#ifndef SANITIZED
  if (has_avx512 && __builtin_cpu_supports("avx512bf16"))
    sets.push_back({"avx512bf16", avx512bf16::float_table, avx512bf16::double_table});
#endif
#endif
  return sets;
}

// --- numbers ---------------------------------------------------------------------------------------------------------

class Random {
 public:
  Random(uint64_t seed, uint64_t number) {
    std::seed_seq mixed{uint32_t(seed), uint32_t(seed >> 32), uint32_t(number), uint32_t(number >> 32)};
    engine_.seed(mixed);
  }
  int64_t below(int64_t n) { return int64_t(engine_() % uint64_t(n)); }
  bool one_in(int64_t n) { return below(n) == 0; }
  bool coin() { return one_in(2); }
  double normal() { return normal_(engine_); }
  template <class E> E of(std::initializer_list<E> values) { return values.begin()[below(int64_t(values.size()))]; }
  template <class E> E of(const std::vector<E>& values) { return values[below(int64_t(values.size()))]; }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> normal_;
};

struct Format {
  const char* name;
  int size, digits, low, high;  // bytes, significant bits, exponents of the normal numbers
};

const Format& format(Type type) {
  static const Format formats[] = {
      {"f32", 4, 24, -126, 127}, {"bf16", 2, 8, -126, 127}, {"f16", 2, 11, -14, 15}, {"f64", 8, 53, -1022, 1023}};
  return formats[int(type)];
}

// Half a prescale in the last place of 1; the smallest normal number; the largest finite one.
double roundoff(Type t) { return std::ldexp(1.0, -format(t).digits); }
double smallest(Type t) { return std::ldexp(1.0, format(t).low); }
double largest(Type t) { return std::ldexp(2 - 2 * roundoff(t), format(t).high); }

Real rounded(Type type, Real v) {
  if (!std::isfinite(v) || v == 0) return v;
  const Format& f = format(type);
  const Real step = std::ldexp(Real(1), std::max(std::ilogb(v), f.low) - f.digits + 1);
  const Real out = std::rint(v / step) * step;
  return std::fabs(out) > largest(type) ? std::copysign(Real(infinity), v) : out;
}

void encode(Type type, double v, void* to) {
  const double out = double(rounded(type, v));
  const float narrow = float(out);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  uint16_t half = uint16_t(bits >> 16);  // of bfloat16: the rest is 0 but for NaN, which stays one
  if (type == Type::f16) {
    const double size = std::fabs(out);
    int exponent = 0;
    if (std::isnan(out)) half = 0x7e00;
    else if (std::isinf(out)) half = 0x7c00;
    else if (size < smallest(type)) half = uint16_t(std::ldexp(size, 24));
    else exponent = std::ilogb(size), half = uint16_t((exponent + 14) * 1024 + int(std::ldexp(size, 10 - exponent)));
    if (std::signbit(out)) half |= 0x8000;
  }
  if (type == Type::f64) std::memcpy(to, &out, 8);
  else if (type == Type::f32) std::memcpy(to, &narrow, 4);
  else std::memcpy(to, &half, 2);
}

double of_half(Type type, uint16_t half) {
  if (type == Type::bf16) {
    const uint32_t bits = uint32_t(half) << 16;
    float out;
    return std::memcpy(&out, &bits, 4), out;
  }
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const double size = exponent == 31 ? (fraction ? nan : infinity)
                      : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                     : std::ldexp(fraction, -24);
  return half & 0x8000 ? -size : size;
}

double decode(Type type, const void* from) {
  double wide;
  float narrow;
  uint16_t half;
  if (type == Type::f64) return std::memcpy(&wide, from, 8), wide;
  if (type == Type::f32) return std::memcpy(&narrow, from, 4), narrow;
  return std::memcpy(&half, from, 2), of_half(type, half);
}

// --- memory ----------------------------------------------------------------------------------------------------------

// An array of its exact size that starts out as NaN: as malloc gives it, one element further, or against a page that
// cannot be touched, which lies before it (and it is aligned as well as can be) or behind it.
class Buffer {
 public:
  enum Place { exact, shifted, after_guard, before_guard };
  static Place any(Random& random) { return random.of({exact, exact, shifted, shifted, after_guard, before_guard}); }

  Buffer() = default;
  Buffer(Type type, int64_t count, Place place) : type_(type), count_(count) {
    const size_t size = bytes(), one = format(type).size;
    if (place == after_guard || place == before_guard) {
      const size_t page = size_t(sysconf(_SC_PAGESIZE)), inner = (size + page - 1) / page * page;
      mapped_ = inner + 2 * page;
      void* all = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (all == MAP_FAILED) throw std::bad_alloc();
      base_ = static_cast<char*>(all), data_ = base_ + page;
      if (inner && mprotect(data_, inner, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
      if (place == before_guard) data_ += inner - size;
    } else {
      base_ = static_cast<char*>(std::malloc(size + (place == shifted ? one : 0)));
      data_ = base_ + (place == shifted ? one : 0);
    }
    if (size) std::memset(data_, 0xff, size);
  }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(type_, other.type_), std::swap(count_, other.count_), std::swap(base_, other.base_);
    std::swap(data_, other.data_), std::swap(mapped_, other.mapped_);
    return *this;
  }
  ~Buffer() {
    if (mapped_) munmap(base_, mapped_);
    else std::free(base_);
  }

  double operator[](int64_t i) const { return decode(type_, data_ + i * format(type_).size); }
  void set(int64_t i, double v) { encode(type_, v, data_ + i * format(type_).size); }
  int64_t count() const { return count_; }
  size_t bytes() const { return size_t(count_) * format(type_).size; }
  Type type() const { return type_; }
  template <class A = void> A* data() const { return reinterpret_cast<A*>(data_); }

 private:
  Type type_ = Type::f32;
  int64_t count_ = 0;
  char *base_ = nullptr, *data_ = nullptr;
  size_t mapped_ = 0;
};

// --- threads ---------------------------------------------------------------------------------------------------------

// Denormals are 0 while it lives, in this thread: so XLA runs kernels.
class Flush {
 public:
#if defined(__x86_64__)
  explicit Flush(bool on) : before_(_mm_getcsr()) { _mm_setcsr(on ? before_ | 0x8040 : before_); }
  ~Flush() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
#else
  explicit Flush(bool) {}
#endif
};

class Pool {
 public:
  explicit Pool(int count) {
    for (int i = 0; i < count; ++i) threads_.emplace_back([this] { work(); });
  }
  ~Pool() {
    for (size_t i = 0; i < threads_.size(); ++i) put(nullptr);
    for (std::thread& thread : threads_) thread.join();
  }
  void put(std::function<void()> task) {
    const std::lock_guard<std::mutex> lock(mutex_);
    tasks_.push_back(std::move(task));
    some_.notify_one();
  }
  Threads threads(int64_t count, bool flush = false) {
    return Threads(count, [this, flush](std::function<void()> task) {
      put([flush, task = std::move(task)] {
        const Flush flushed(flush);
        task();
      });
    });
  }

 private:
  void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      some_.wait(lock, [this] { return !tasks_.empty(); });
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      if (!task) return;
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable some_;
  std::deque<std::function<void()>> tasks_;
  std::vector<std::thread> threads_;
};

// A pool that has no thread to spare until the call is over.
class Late {
 public:
  void put(std::function<void()> task) { tasks_.push_back(std::move(task)); }
  Threads threads(int64_t count) {
    return Threads(count, [this](std::function<void()> task) { put(std::move(task)); });
  }
  void run() {
    for (const auto& task : tasks_) task();
    tasks_.clear();
  }

 private:
  std::vector<std::function<void()>> tasks_;
};

// --- cases -----------------------------------------------------------------------------------------------------------

struct Failure { std::string what; };

struct Case {
  View view{};
  Type x_type{}, y_type{}, a_type{};
  bool centered{}, cast_before_scale{}, nontemporal{}, flush{}, outliers{};
  double epsilon{}, prescale{}, devices{};  // devices: as many times what this one has is counted, in what is split
  std::string values;                   // what x is made of
  Buffer x, g, scale, bias;             // a parameter that is absent has no elements
  std::vector<bool> spoilt;             // statistics with NaN or infinity among their elements
  Weighting weighting = Weighting::none;
  std::vector<uint8_t> mask;  // of rows, and of elements
  Buffer weights;             // of lines, and of elements

  double weight(int64_t i) const {
    switch (weighting) {
      case Weighting::none: return 1;
      case Weighting::rows: return mask[statistic(i)];
      case Weighting::bytes: return mask[i];
      case Weighting::lines: return weights[i / view.line()];
      default: return weights[i];
    }
  }
  // Whether an element is normalized: one that is absent, and no number to speak of, gives the bias.
  bool usable(int64_t i) const {
    return weight(i) != 0 || std::fabs(x[i]) <= (a_type == Type::f64 ? 1e30 : double(1e30f));
  }

  int64_t statistic(int64_t i) const {
    return i / view.slab() * view.G + i / view.row() % view.G;
  }
  int64_t parameter(int64_t i) const {
    return i / (view.N * view.slab()) * view.columns() + i / view.P % view.columns();
  }
};

View random_view(Random& random) {
  const std::vector<int64_t> tiny{0, 1, 2, 3, 5}, few{1, 1, 2, 3, 5}, planes{2, 49, 64, 200},
      lengths{2, 3, 4, 5, 7, 8, 9, 31, 64, 65, 129, 500},
      widths{1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 257};
  const auto any = [&](const auto& sizes) { return random.of(sizes); };
  const int64_t limit = random.one_in(4) ? 150000 : 6000;  // threads work together from 16384 elements on
  View v{};
  const auto one_of = [&](std::initializer_list<int64_t> sizes) { return random.of(sizes); };
  switch (random.below(13)) {
    case 0: case 1: v = {any(few), any(lengths), 1, any(few), any(widths), 1}; break;  // rows
    case 2: v = {any(few), any(lengths), 1, any(few), any(few), any(planes)}; break;  // of planes
    case 3: case 4: v = {any(few), any(few), any(lengths), any(widths), 1, 1}; break;  // columns
    case 5: v = {any(few), any(few), any(lengths), any(few), any(widths), 1}; break;  // in groups
    case 6: v = {any(few), any(few), any(lengths), any(widths), any(few), any(planes)}; break;  // of planes
    case 7: v = {any(tiny), any(tiny), any(tiny), any(tiny), any(tiny), any(tiny)}; break;
    case 8: v = {any(few), 16 + random.below(50), any(lengths), any(few), any(few), one_of({1, 49})}; break;  // slabs
    case 9: v = {1, one_of({limit / 7, limit}), 1, 1, 1 + random.below(5), 1}; break;  // short rows
    case 10: v = {1, any(few), 2, one_of({511, 512, 513, 2049, 5000}), any(few), one_of({1, 1, 2})}; break;  // wide
    case 11: v = {1, 1, limit / 3, one_of({1, 2, 3, 17, 64, 67}), any(few), one_of({1, 1, 5})}; break;  // long
    default:  // one long row, or one long plane
      v = {1, any(few), one_of({1, 1, 2}), any(few), 1, 1};
      (random.coin() ? v.D : v.P) = limit == 6000 ? 5003 : one_of({65536, 99991, 299993});
      if (v.D * v.P > 65536) v.N = v.G = 1;
  }
  for (int64_t* size : {&v.B, &v.N, &v.G, &v.S, &v.D}) {  // within the limit, one after the other
    const int64_t least = size == &v.S ? 2 : 1;
    if (v.size() > 2 * limit && *size > least) *size = std::max(least, *size * limit / v.size());
  }
  return v;
}

// Weights for about two elements of three: of 1, or up to 2 where they need not be a mask's.
void add_weights(Case& c, Random& random) {
  const View& v = c.view;
  if (random.coin() || v.size() == 0) return;
  c.weighting = random.of({Weighting::bytes, Weighting::values, v.S == 1 ? Weighting::rows : Weighting::lines});
  const bool numbers = c.weighting == Weighting::values || c.weighting == Weighting::lines, ones = random.coin();
  const int64_t one = c.weighting == Weighting::rows ? v.row() : c.weighting == Weighting::lines ? v.line() : 1;
  const int64_t number = v.size() / one, run = random.of<int64_t>({1, 1, 3, 9, number});
  bool present = true;
  if (numbers) c.weights = Buffer(c.a_type, number, Buffer::any(random));
  else c.mask.resize(number);
  for (int64_t i = 0; i < number; ++i) {
    if (i % run == 0) present = !random.one_in(3);
    if (numbers) c.weights.set(i, !present ? 0 : ones ? 1 : (1 + random.below(8)) / 4.0);
    else c.mask[i] = present;
  }
}

Case random_case(Random& random) {
  static const std::pair<Type, Type> pairs[] = {
      {Type::f32, Type::f32}, {Type::bf16, Type::bf16}, {Type::f16, Type::f16}, {Type::f32, Type::bf16},
      {Type::bf16, Type::f32}, {Type::f32, Type::f16}, {Type::f16, Type::f32}, {Type::f64, Type::f64}};
  Case c;
  c.view = random_view(random);
  std::tie(c.x_type, c.y_type) = pairs[random.below(8)];
  c.a_type = c.x_type == Type::f64 ? Type::f64 : Type::f32;
  c.centered = !random.one_in(3), c.cast_before_scale = random.one_in(3), c.nontemporal = random.coin(), c.flush = random.coin();
  c.epsilon = random.of({1e-6, 1e-6, 1e-12, 1e-30, 0.0, 0.0});
  const bool whole = random.one_in(4);  // the prescale is 1, and squares of large values overflow
  const bool root = c.epsilon < 1e-6 || random.one_in(4);  // m2 is a root, and no squares of floats do
  c.prescale = whole ? 1 : root ? 0 : 0x1p-40, c.devices = random.of({1.0, 3.0});
  c.outliers = random.one_in(6);

  struct Values { double mean, deviation; };
  std::vector<Values> menu{{0, 1}, {0, 1}, {3, 0.5}, {-100, 1}, {0, 1e-3}, {0.1, 0}, {0, 0}};
  if (c.x_type == Type::f16) menu.insert(menu.end(), {{1e3, 1}, {0, 1e-6}, {0, 1e4}, {-3e4, 0}});
  else menu.insert(menu.end(), {{1e4, 1}, {1e4, 1e-3}, {0, 1e-30}, {-1e4, 0}});
  if (c.x_type != Type::f16 && !whole) menu.insert(menu.end(), {{0, 1e20}, {1e20, 1e18}, {-1e20, 0}});
  if (c.x_type != Type::f16 && c.prescale == 0)
    menu.insert(menu.end(), {{0, 1e-30}, {1e-30, 1e-32}, {0, 1e-20}, {1e30, 1e28}, {0, 1e30}, {-1e30, 0}, {1e-30, 0}});
  const View& v = c.view;
  const bool alike = random.coin();  // else each statistic has values of its own magnitude
  std::vector<Values> of(v.statistics(), random.of(menu));
  if (!alike)
    for (Values& values : of) values = random.of(menu);
  std::ostringstream text;
  if (!alike) text << "mixed";
  else if (!of.empty()) text << "N(" << of[0].mean << ", " << of[0].deviation << ")";

  c.x = Buffer(c.x_type, v.size(), Buffer::any(random)), c.g = Buffer(c.y_type, v.size(), Buffer::any(random));
  c.scale = Buffer(c.a_type, random.coin() ? v.parameters() : 0, Buffer::any(random));
  c.bias = Buffer(c.a_type, random.coin() ? v.parameters() : 0, Buffer::any(random));
  add_weights(c, random);
  std::vector<int> seen(v.statistics());
  c.spoilt.resize(v.statistics());
  for (int64_t i = 0; i < v.size(); ++i) {
    const int64_t s = c.statistic(i);
    const bool outlier = c.outliers && of[s].deviation < 1e10 && seen[s]++ < 5;  // where shifts are taken from
    const double far = outlier ? 1000 * of[s].deviation : 0;
    c.x.set(i, of[s].mean + of[s].deviation * random.normal() + far), c.g.set(i, random.normal());
    if (!std::isfinite(c.x[i]) && c.weight(i) != 0) c.spoilt[s] = true;  // an outlier that float16 does not hold
  }
  for (int64_t i = 0; i < c.scale.count(); ++i) c.scale.set(i, random.one_in(20) ? 0 : 1 + random.normal() / 2);
  for (int64_t i = 0; i < c.bias.count(); ++i) c.bias.set(i, random.normal());

  if (c.weighting != Weighting::none && random.coin()) {
    const double poison = random.of({nan, infinity, -infinity, c.x_type == Type::f16 ? nan : 3e38});
    for (int64_t i = 0; i < v.size(); ++i)
      if (c.weight(i) == 0) c.x.set(i, poison);
    text << " with " << poison << " where absent";
  }
  if (v.size() && random.one_in(6)) {
    text << " with";
    for (int64_t left = 1 + random.below(3); left > 0; --left) {
      const int64_t i = random.below(v.size());
      const double what = random.of({nan, infinity, -infinity, smallest(c.x_type) / 4});
      Buffer& at = std::isfinite(what) || random.coin() ? c.x : c.g;
      at.set(i, what);
      if (!std::isfinite(what) && (&at == &c.g || c.weight(i) != 0)) c.spoilt[c.statistic(i)] = true;
      text << (&at == &c.x ? " x[" : " g[") << i << "] = " << what;
    }
  }
  c.values = text.str();
  return c;
}

std::string described(const Case& c) {
  const View& v = c.view;
  std::ostringstream out;
  out << "(B, N, S, G, D, P) = (";
  for (int64_t size : {v.B, v.N, v.S, v.G, v.D}) out << size << ", ";
  out << v.P << "), " << format(c.x_type).name << " to " << format(c.y_type).name;
  const std::pair<bool, const char*> options[] = {
      {c.centered, "centered"},    {c.cast_before_scale, "cast_before_scale"}, {c.scale.count() > 0, "scale"},
      {c.bias.count() > 0, "bias"}, {c.nontemporal, "nontemporal"},           {c.flush, "denormals flushed"},
      {c.outliers, "outliers first"}};
  for (const auto& [on, name] : options)
    if (on) out << ", " << name;
  const char* const kinds[] = {"", ", rows masked", ", lines weighted", ", elements masked", ", elements weighted"};
  out << kinds[int(c.weighting)] << ", epsilon " << c.epsilon << ", prescale " << c.prescale << ", devices " << c.devices << ", x: " << c.values << "\n";
  return out.str();
}

// --- what the kernels give -------------------------------------------------------------------------------------------

enum Output { y, mean_hi, mean_lo, m2, shift_alone, offset_alone, m2_alone, y_given, dx, dscale, dbias, h, hx, dscale_part,
              dbias_part, dx_given, counts, counts_alone, outputs };
const char* const output_names[] = {
    "y of forward", "mean_hi of forward", "mean_lo of forward", "m2 of forward", "mean_hi of moments", "mean_lo of moments",
    "m2 of moments", "y of normalize", "dx of backward", "dscale of backward", "dbias of backward",
    "h of gradient_sums", "hx of gradient_sums", "dscale of gradient_sums", "dbias of gradient_sums", "dx of gradient",
    "counts of forward", "counts of moments"};

// Rows that are masked out as a whole must not be read: while it lives, AddressSanitizer ends the program that does.
class Unreadable {
 public:
  explicit Unreadable(const Case& c) : c_(c) { each([](const char* row, size_t size) { set(row, size, true); }); }
  ~Unreadable() { each([](const char* row, size_t size) { set(row, size, false); }); }

 private:
  template <class Run> void each(Run run) const {
    const size_t size = size_t(c_.view.row()) * format(c_.x_type).size;
    for (size_t row = 0; c_.weighting == Weighting::rows && row < c_.mask.size(); ++row)
      if (!c_.mask[row]) run(c_.x.data<char>() + row * size, size);
  }
#if defined(__SANITIZE_ADDRESS__)
  static void set(const char* row, size_t size, bool unreadable) {
    const char* whole = reinterpret_cast<const char*>((reinterpret_cast<uintptr_t>(row) + 7) / 8 * 8);  // of 8 bytes
    const size_t skipped = size_t(whole - row);
    if (size < skipped + 8) return;
    if (unreadable) __asan_poison_memory_region(whole, (size - skipped) / 8 * 8);
    else __asan_unpoison_memory_region(whole, (size - skipped) / 8 * 8);
  }
#else
  static void set(const char*, size_t, bool) {}
#endif

  const Case& c_;
};

template <class A>
std::vector<Buffer> results(const Case& c, const Kernels<A>& kernels, const Threads& threads, Random& random) {
  const View& v = c.view;
  std::vector<Buffer> out(outputs);
  for (int i = 0; i < outputs; ++i) {
    Type type = c.a_type;
    int64_t size = v.statistics();
    if (i == y || i == y_given) type = c.y_type, size = v.size();
    if (i == dx || i == dx_given) type = c.x_type, size = v.size();
    if (i == dscale || i == dbias || i == dscale_part || i == dbias_part) size = v.parameters();
    out[i] = Buffer(type, size, Buffer::any(random));
  }
  Job job;
  job.view = v, job.count = double(v.count()), job.epsilon = c.epsilon, job.prescale = c.prescale;
  job.centered = c.centered, job.cast_before_scale = c.cast_before_scale, job.nontemporal = c.nontemporal;
  job.x = c.x.data(), job.g = c.g.data();
  job.scale = c.scale.count() ? c.scale.data() : nullptr, job.bias = c.bias.count() ? c.bias.data() : nullptr;
  std::vector<uint8_t> spread;  // of rows, to elements, for the parts of a pass
  for (int64_t i = 0; c.weighting == Weighting::rows && i < v.size(); ++i) spread.push_back(uint8_t(c.weight(i)));
  const auto weigh = [&](Job& one, const Buffer& of_counts, bool whole) {
    if (c.weighting == Weighting::none) return;
    const bool bytes = c.weighting == Weighting::rows || c.weighting == Weighting::bytes;
    one.weighting = c.weighting, one.counts = of_counts.data();
    one.weights = bytes ? static_cast<const void*>(c.mask.data()) : c.weights.data();
    if (!whole && c.weighting == Weighting::rows) one.weighting = Weighting::bytes, one.weights = spread.data();
  };
  const auto with = [&](Output into, const Buffer& s, const Buffer& o, const Buffer& m) {
    Job one = job;
    one.out = out[into].data(), one.mean_hi = s.data(), one.mean_lo = o.data(), one.m2 = m.data();
    return one;
  };
  const auto many = [&](const Buffer& a, bool root = false) {  // the sum over as many devices that have the same
    Buffer sum(a.type(), a.count(), Buffer::any(random));
    for (int64_t i = 0; i < a.count(); ++i) sum.set(i, a[i] * (root ? std::sqrt(c.devices) : c.devices));
    return sum;
  };
  const Flush flushed(c.flush);
  Job ahead = with(y, out[mean_hi], out[mean_lo], out[m2]);
  weigh(ahead, out[counts], true);
  {
    const Unreadable absent(c);
    Norm<A>(ahead, kernels, threads).forward();
  }
  Job alone = with(y, out[shift_alone], out[offset_alone], out[m2_alone]);
  alone.out = nullptr, weigh(alone, out[counts_alone], false);
  Norm<A>(alone, kernels, threads).moments();
  const Buffer all_m2 = many(out[m2_alone], c.prescale == 0);
  Job given = with(y_given, out[shift_alone], out[offset_alone], all_m2);
  const Buffer all_counts = many(out[counts_alone]);
  given.count *= c.devices, weigh(given, all_counts, false);
  Norm<A>(given, kernels, threads).normalize();

  Job back = with(dx, out[mean_hi], out[mean_lo], out[m2]);
  back.bias = nullptr, weigh(back, out[counts], true);
  {
    const Unreadable absent(c);
    Norm<A>(back, kernels, threads).backward(out[dscale].data<A>(), out[dbias].data<A>());
  }
  given.out = nullptr, given.bias = nullptr;
  Norm<A>(given, kernels, threads)
      .gradient_sums(out[h].data<A>(), out[hx].data<A>(), out[dscale_part].data<A>(), out[dbias_part].data<A>());
  given.out = out[dx_given].data();
  const Buffer all_h = many(out[h]), all_hx = many(out[hx]);
  Norm<A>(given, kernels, threads).gradient(all_h.data<A>(), all_hx.data<A>());
  return out;
}

// --- the truth -------------------------------------------------------------------------------------------------------

// The interval that each value must lie in. NaN as `low`: any value will do.
struct Bounds {
  std::vector<double> low, high;
  explicit Bounds(int64_t n) : low(n), high(n) {}
  void set(int64_t i, Real value, Real error) { low[i] = double(value - error), high[i] = double(value + error); }
  void free(int64_t i) { low[i] = nan; }
  void some(int64_t i) { low[i] = -infinity, high[i] = infinity; }  // anything but NaN
};

struct Truth {
  Bounds y, dx, rest, m2, h, hx, dscale, dbias, counts;
  std::vector<Real> mean;  // to which `rest` is what its own rounding took
};

// The rounding of a sum of n terms, as a part of them, and of some more operations. The errors of terms are as good as
// independent, but where the terms are alike: then they add up, along a chain of every eighth float or of every double.
Real rounding(Type a, Real n, bool alike = false) {
  return roundoff(a) * (8 + (!alike ? std::sqrt(n) : a == Type::f64 ? n : n / 8));
}

// Plainly by the definition. The errors allowed are in prescales of xhat, whatever the magnitude and the mean of x.
Truth truth(const Case& c) {
  const View& v = c.view;
  const int64_t groups = v.statistics(), columns = v.parameters(), n = v.count();
  const double tiny = smallest(c.a_type);
  std::vector<Real> mean(groups), rest(groups), var(groups), r(groups), error(groups), fourth(groups);
  std::vector<Real> count(groups), of_weight(v.size());
  for (int64_t i = 0; i < v.size(); ++i) count[c.statistic(i)] += of_weight[i] = c.weight(i);
  for (int pass = 0; c.centered && pass < 3; ++pass) {
    for (int64_t s = 0; s < groups; ++s) mean[s] += rest[s], rest[s] = 0;
    for (int64_t i = 0; i < v.size(); ++i) {
      const int64_t s = c.statistic(i);
      if (of_weight[i] != 0) rest[s] += of_weight[i] * (c.x[i] - mean[s]) / count[s];
    }
  }
  const auto difference = [&](int64_t i) { return (c.x[i] - mean[c.statistic(i)]) - rest[c.statistic(i)]; };
  for (int64_t i = 0; i < v.size(); ++i) {
    const int64_t s = c.statistic(i);
    if (of_weight[i] == 0) continue;
    const Real square = difference(i) * difference(i), part = of_weight[i] / count[s];
    var[s] += square * part, fourth[s] += square * square * part;
  }
  Truth t{Bounds(v.size()), Bounds(v.size()), Bounds(groups), Bounds(groups), Bounds(groups), Bounds(groups),
          Bounds(columns), Bounds(columns), Bounds(groups), mean};
  for (int64_t s = 0; s < groups; ++s) t.counts.set(s, count[s], rounding(c.a_type, Real(n)) * count[s]);
  // Where the squares, in their prescale, are no longer normal numbers beside epsilon, only NaN is wrong.
  std::vector<bool> lost(groups), spoilt = c.spoilt;
  for (int64_t s = 0; s < groups; ++s) {
    const Real prescale = c.prescale == 0 ? 1 : c.prescale * c.prescale, total = var[s] + c.epsilon;
    r[s] = count[s] != 0 && total > 0 ? 1 / std::sqrt(total) : 0;
    if (r[s] > largest(c.a_type) / 2) spoilt[s] = true;  // infinite, as it may be for denormals alone
    // Squares of few different values, or all about a mean_hi that the outliers took far away.
    const bool alike = format(c.x_type).size == 2 || c.outliers || fourth[s] < 1.0001L * var[s] * var[s] ||
                       std::sqrt(var[s]) < 256 * roundoff(c.x_type) * std::fabs(mean[s]);
    // What is flushed to 0: squares in the prescale; or, where any prescale will do, differences.
    const Real flushed = c.prescale == 0 ? 4 * tiny / std::sqrt(total) : tiny / (total * prescale);
    error[s] = rounding(c.a_type, Real(n), alike) + (total > 0 ? flushed : 0);
    lost[s] = error[s] > 1e-2 || spoilt[s];
    if (spoilt[s]) t.rest.free(s), t.m2.free(s);
    else if (lost[s]) t.rest.some(s), t.m2.some(s);
    else {
      t.rest.set(s, rest[s], r[s] > 0 ? error[s] / r[s] + tiny : 4 * roundoff(c.a_type) * std::fabs(mean[s]) + tiny);
      // A difference of terms that may be five times as large.
      const Real wrong = 4 * count[s] * prescale * error[s] * total + (c.prescale == 0 ? 0 : n * tiny);
      const Real value = count[s] * var[s] * prescale;
      if (c.prescale != 0) t.m2.set(s, value, wrong);
      else t.m2.low[s] = double(std::sqrt(std::max(value - wrong, Real(0)))), t.m2.high[s] = double(std::sqrt(value + wrong));
    }
  }

  const auto xhat_of = [&](int64_t i) {  // in range also where an absent element is far from the others
    return !c.usable(i) ? 0 : std::max(std::min(difference(i) * r[c.statistic(i)], Real(1e30)), Real(-1e30));
  };
  // Sums of g scale, g scale xhat, g, g xhat; and of their sizes, which is what errors are a part of.
  struct Sum {
    Real value = 0, size = 0;
    void add(Real v, Real s) { value += v, size += std::fabs(s); }
  };
  std::vector<Sum> h(groups), hx(groups), ds(columns), db(columns);
  std::vector<Real> column_error(columns), bad(columns), unsure(columns);
  const auto scale = [&](int64_t k) { return c.scale.count() ? c.scale[k] : 1.0; };
  for (int64_t i = 0; i < v.size(); ++i) {
    const int64_t s = c.statistic(i), k = c.parameter(i);
    const Real xhat = xhat_of(i), g = c.g[i], gs = g * scale(k);
    h[s].add(gs, gs), hx[s].add(gs * xhat, gs * (1 + std::fabs(xhat)));
    ds[k].add(g * xhat, g * (1 + std::fabs(xhat))), db[k].add(g, g);
    column_error[k] = std::max(column_error[k], error[s]);
    if (spoilt[s]) bad[k] = 1;
    if (lost[s]) unsure[k] = 1;
  }
  const Real part = v.N * v.S * v.P;
  for (int64_t s = 0; s < groups; ++s) {
    t.h.set(s, h[s].value, error[s] * h[s].size + n * tiny);
    t.hx.set(s, hx[s].value, error[s] * hx[s].size + n * tiny * (1 + r[s]));
    if (spoilt[s]) t.h.free(s), t.hx.free(s);
    else if (lost[s]) t.hx.some(s);
  }
  for (int64_t k = 0; k < columns; ++k) {
    const Real sum_error = rounding(c.a_type, part);
    t.dscale.set(k, ds[k].value, (sum_error + column_error[k]) * ds[k].size + part * tiny);
    t.dbias.set(k, db[k].value, sum_error * db[k].size + part * tiny);
    if (bad[k]) t.dscale.free(k), t.dbias.free(k);
    else if (unsure[k]) t.dscale.some(k);
  }

  const bool halves = c.cast_before_scale && format(c.y_type).size == 2;
  const auto last = [&](Type type, Real value, Real inexact) {  // the rounding of the result, also of a denormal one
    const double denormal = type == Type::f16 ? 0x1p-25 : smallest(type);
    return inexact + roundoff(type) * (std::fabs(value) + inexact) * (type == c.a_type ? 4 : 1.001) + denormal;
  };
  for (int64_t i = 0; i < v.size(); ++i) {
    const int64_t s = c.statistic(i), k = c.parameter(i);
    if (spoilt[s]) t.y.free(i), t.dx.free(i);
    else if (lost[s]) t.y.some(i), t.dx.some(i);
    if (lost[s]) continue;
    const Real xhat = xhat_of(i), size = 1 + std::fabs(xhat), of_scale = scale(k);
    const Real bias = c.bias.count() ? c.bias[k] : 0.0, e = error[s] * size + 4 * tiny * (1 + r[s]);
    Real low = xhat - e, high = xhat + e;
    if (halves) low = rounded(c.y_type, low), high = rounded(c.y_type, high);
    low *= of_scale, high *= of_scale;
    const Real middle = (low + high) / 2 + bias, half = std::fabs(high - low) / 2;
    const Real affine = 2 * roundoff(c.a_type) * (std::fabs(middle) + std::fabs(bias) + half);
    t.y.set(i, middle, last(c.y_type, middle, half + affine));

    const Real part = count[s] == 0 ? 0 : of_weight[i] / count[s], gs = c.usable(i) ? c.g[i] * of_scale : 0;
    const Real of_h = c.centered ? h[s].value * part : 0, all_h = c.centered ? h[s].size * part : 0;
    const Real all = std::fabs(gs) + all_h + size * hx[s].size * part;
    const Real value = r[s] * (gs - of_h - xhat * hx[s].value * part);
    t.dx.set(i, value, last(c.x_type, value, error[s] * r[s] * all + 8 * tiny * (1 + r[s]) * (1 + r[s]) * size));
  }
  return t;
}

// --- the comparison --------------------------------------------------------------------------------------------------

double closest = 0;  // the largest error that was seen, of what is allowed

void compare(const Bounds& bounds, const std::function<double(int64_t)>& value, Type type, const char* what) {
  for (int64_t i = 0; i < int64_t(bounds.low.size()); ++i) {
    const double low = bounds.low[i], high = bounds.high[i], v = value(i), edge = largest(type);
    if (std::isnan(low)) continue;
    const bool overflow = std::isinf(v) && (v > 0 ? high >= edge : low <= -edge);
    if (!overflow && !(low <= v && v <= high)) {
      std::ostringstream out;
      out.precision(17);
      out << what << "[" << i << "] is " << v << ", not in [" << low << ", " << high << "]";
      throw Failure{out.str()};
    }
    if (format(type).size > 2 && high - low > 0 && std::isfinite(high - low) && std::isfinite(v))
      closest = std::max(closest, std::fabs((v - low) - (high - v)) / (high - low));
  }
}

void compare(const Case& c, const Truth& t, const std::vector<Buffer>& out) {
  const auto check = [&](const Bounds& bounds, Output o) {
    compare(bounds, [&](int64_t i) { return out[o][i]; }, out[o].type(), output_names[o]);
  };
  const auto mean = [&](Output s, Output o, const char* what) {
    compare(t.rest, [&](int64_t i) { return double(out[s][i] - t.mean[i] + out[o][i]); }, Type::f64, what);
  };
  mean(mean_hi, mean_lo, "mean of forward"), check(t.m2, m2);
  mean(shift_alone, offset_alone, "mean of moments"), check(t.m2, m2_alone);
  check(t.y, y), check(t.y, y_given), check(t.dx, dx), check(t.dx, dx_given), check(t.h, h), check(t.hx, hx);
  check(t.dscale, dscale), check(t.dscale, dscale_part), check(t.dbias, dbias), check(t.dbias, dbias_part);
  if (c.weighting != Weighting::none) check(t.counts, counts), check(t.counts, counts_alone);
  if (c.view.count() == 0)  // and the mean of nothing is exactly 0
    for (Output o : {mean_hi, mean_lo, m2, shift_alone, offset_alone, m2_alone})
      for (int64_t i = 0; i < out[o].count(); ++i)
        if (out[o][i] != 0) throw Failure{std::string(output_names[o]) + " of nothing is not 0"};
}

void same_bits(const std::vector<Buffer>& a, const std::vector<Buffer>& b, const std::string& what) {
  for (int i = 0; i < outputs; ++i)
    for (int64_t k = 0; k < a[i].count(); ++k) {
      const int size = format(a[i].type()).size;
      if (std::isnan(a[i][k]) && std::isnan(b[i][k])) continue;  // which NaN it is depends on registers alone
      if (std::memcmp(a[i].data<char>() + k * size, b[i].data<char>() + k * size, size) == 0) continue;
      std::ostringstream out;
      out.precision(17);
      out << output_names[i] << "[" << k << "] is " << a[i][k] << " alone and " << b[i][k] << " " << what;
      throw Failure{out.str()};
    }
}

template <class A> void run(const Case& c, const Truth& t, const Kernels<A>* kernels, Pool& pool, Random& random) {
  if (!kernels) throw Failure{"there is no kernel for this pair of types"};
  const std::vector<Buffer> alone = results<A>(c, *kernels, Threads::none(), random);
  compare(c, t, alone);
  const int64_t count = random.of<int64_t>({1, 2, 3, 8, 0});
  if (count) {
    const Threads threads = pool.threads(count, c.flush);
    same_bits(alone, results<A>(c, *kernels, threads, random), "on " + std::to_string(count) + " threads");
  } else {
    Late late;
    same_bits(alone, results<A>(c, *kernels, late.threads(8), random), "in a pool without a thread to spare");
    late.run();
  }
}

// --- Threads ---------------------------------------------------------------------------------------------------------

void require(bool holds, const std::string& what) {
  if (!holds) throw Failure{"Threads::each: " + what};
}

struct Thrown { int64_t task; };

// `n` tasks of which each third throws, where `throwing`: each runs once, and the caller sees one of the exceptions.
void each_once(const Threads& threads, int64_t n, bool throwing, const std::string& where) {
  std::vector<std::atomic<int>> ran(n);
  bool thrown = false;
  try {
    threads.each(n, [&](int64_t i) {
      ran[i].fetch_add(1);
      if (throwing && i % 3 == 1) throw Thrown{i};
    });
  } catch (const Thrown& error) {
    thrown = error.task % 3 == 1;
  }
  require(thrown == (throwing && n > 1), "an exception did not reach the caller " + where);
  if (thrown && threads.count() == 1) return;  // alone, it leaves at once
  for (const auto& times : ran)
    require(times.load() == 1, "a task ran " + std::to_string(times.load()) + " times " + where);
}

void check_threads(Pool& pool) {
  for (int64_t n : {0, 1, 2, 3, 7, 1000})
    for (bool throwing : {false, true}) {
      each_once(Threads::none(), n, throwing, "alone");
      for (int64_t count : {1, 2, 3, 8})
        for (int repeat = 0; repeat < 20; ++repeat) each_once(pool.threads(count), n, throwing, "on a pool");
      Late late;
      each_once(late.threads(8), n, throwing, "in a pool without a thread to spare");
      late.run();  // what the tasks used is gone: a sanitizer sees whether they look
    }
  // A pool that cannot take a third task: the caller and the two do the work, and nobody looks at a call that is over.
  for (int repeat = 0; repeat < 40; ++repeat) {
    int taken = 0;
    Late late;
    const Threads threads(8, [&](std::function<void()> task) {
      if (taken++ == 2) throw std::bad_alloc();
      if (repeat % 2) pool.put(std::move(task));
      else late.put(std::move(task));
    });
    try {
      each_once(threads, 100, false, "where the pool was full");
    } catch (const std::bad_alloc&) {
      require(false, "a full pool ends the call, while tasks may be running");
    }
    late.run();
  }
}

// --- 16-bit floats ---------------------------------------------------------------------------------------------------

// Each of them is widened exactly, and what lies between two goes to the nearer one, or to the even one: a row of zeros
// says so, whose y is the bias and whose dbias is g.
void check_halves(const InstructionSet& set) {
  constexpr int64_t n = 4 * 65536 + 3;  // each of them, and the middle to the next with both its neighbours
  for (Type half : {Type::bf16, Type::f16}) {
    const auto buffer = [&](Type type, int64_t size) { return Buffer(type, size, Buffer::before_guard); };
    Buffer x = buffer(Type::f32, n), bias = buffer(Type::f32, n), g = buffer(half, n), y = buffer(half, n);
    const Buffer dx = buffer(Type::f32, n), dscale = buffer(Type::f32, n), dbias = buffer(Type::f32, n);
    const Buffer mean_hi = buffer(Type::f32, 1), mean_lo = buffer(Type::f32, 1), m2 = buffer(Type::f32, 1);
    for (int64_t i = 0; i < n; ++i) {
      const uint16_t bits = uint16_t(i / 4);
      const double value = of_half(half, bits), size = std::fabs(value), end = std::ldexp(1, format(half).high + 1);
      const double next = size == largest(half) ? end : of_half(half, uint16_t((bits & 0x7fff) + 1));
      const float middle = float((size + next) / 2);
      const float near[] = {float(size), middle, std::nextafter(middle, 0.f), std::nextafter(middle, float(next))};
      x.set(i, 0), g.set(i, value), bias.set(i, std::copysign(near[i % 4], value));
    }
    Job job;
    job.view = {1, 1, 1, 1, n, 1}, job.count = n, job.epsilon = 1, job.centered = false;
    job.x = x.data(), job.g = g.data(), job.mean_hi = mean_hi.data(), job.mean_lo = mean_lo.data(), job.m2 = m2.data();
    job.bias = bias.data(), job.out = y.data();
    const Kernels<float>& kernels = *set.of_float(Type::f32, half);
    Norm<float>(job, kernels, Threads::none()).forward();
    job.out = dx.data();
    Norm<float>(job, kernels, Threads::none()).backward(dscale.data<float>(), dbias.data<float>());
    for (int64_t i = 0; i < n; ++i) {
      const bool denormal = std::fabs(bias[i]) < smallest(Type::f32);  // for which some instructions write 0
      const auto wrong = [](double a, double b) { return a != b && !(std::isnan(a) && std::isnan(b)); };
      std::ostringstream out;
      out << std::hexfloat << format(half).name << ": ";
      if (wrong(dbias[i], g[i])) out << g[i] << " is widened to " << dbias[i];
      else if (wrong(y[i], double(rounded(half, bias[i]))) && !(denormal && y[i] == 0))
        out << bias[i] << " is narrowed to " << y[i];
      else continue;
      throw Failure{out.str()};
    }
  }
}

// --- the program -----------------------------------------------------------------------------------------------------

// What is being done is said also where a sanitizer or the system ends the program.
std::string doing;

void tell() {
  if (write(1, doing.data(), doing.size()) < 0) std::abort();
}

void tell_at_the_end() {
#if defined(SANITIZED)
  __sanitizer_set_death_callback(tell);
#else
  for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT})
    std::signal(signal, [](int of) {
      tell();
      std::signal(of, SIG_DFL);
      std::raise(of);
    });
#endif
}

int main_(int count, char** arguments) {
  if (count < 3) return std::fprintf(stderr, "usage: fuzz SEED CASES [FIRST]\n"), 2;
  const uint64_t seed = std::strtoull(arguments[1], nullptr, 10), cases = std::strtoull(arguments[2], nullptr, 10);
  const uint64_t first = count > 3 ? std::strtoull(arguments[3], nullptr, 10) : 0;
  std::setvbuf(stdout, nullptr, _IOLBF, 4096);
  tell_at_the_end();
  const std::vector<InstructionSet> sets = instruction_sets();
  std::printf("instruction sets:");
  for (const InstructionSet& set : sets) std::printf(" %s", set.name);
  std::printf("\n");
  Pool pool(3);
  try {
    doing = "threads\n";
    check_threads(pool);
    for (const InstructionSet& set : sets) {
      doing = std::string("16-bit floats on ") + set.name + "\n";
      check_halves(set);
    }
    for (uint64_t number = first; number < first + cases; ++number) {
      Random random(seed, number);
      const Case c = random_case(random);
      const Truth t = truth(c);
      for (const InstructionSet& set : sets) {
        doing = "fuzz " + std::to_string(seed) + " 1 " + std::to_string(number) + ", on " + set.name + "\n";
        doing += described(c);
        if (c.a_type == Type::f64) run<double>(c, t, set.of_double(c.x_type, c.y_type), pool, random);
        else run<float>(c, t, set.of_float(c.x_type, c.y_type), pool, random);
      }
    }
  } catch (const Failure& failure) {
    return std::printf("%s%s\n", doing.c_str(), failure.what.c_str()), 1;
  }
  std::printf("the largest error is %.2f of what is allowed\n", closest);
  std::printf("%llu cases, 0 failures\n", (unsigned long long)cases);
  return 0;
}

}  // namespace
}  // namespace jaxnorm

// ThreadSanitizer does not see the counts of exceptions, which libstdc++ keeps inside itself.
extern "C" const char* __tsan_default_suppressions() {
  return "race:std::__exception_ptr::exception_ptr::_M_release\n";
}

int main(int count, char** arguments) { return jaxnorm::main_(count, arguments); }
