// What every file of this backend shares: the shape of a problem, and the table of kernels that an instruction set fills.
//
// Every norm is seen as one shape, row-major,
//
//     x: (B, N, S, G, D, P)      statistics over S, D and P, one for each (b, n, g);      n = S D P
//
// with scale and bias of shape (B, G, D). Layer norm is N rows of D; batch norm is S examples of G channels (NHWC) with
// P pixels each (NCHW); group norm is N images of S pixels of G groups of D channels, or of G x D planes of P pixels.
// A "line" is what follows S: K = G D columns of P elements. No layout is ever transposed.
//
// Where S is 1 an example is a run of rows of D P elements, each with its statistic ("rows"); else it is a slab of S
// lines whose statistics run down the columns ("slab").
#pragma once

#include <cstdint>
#include <type_traits>

namespace jaxnorm {

struct View {
  int64_t B, N, S, G, D, P;

  int64_t columns() const { return G * D; }
  int64_t row() const { return D * P; }
  int64_t line() const { return G * D * P; }
  int64_t slab() const { return S * line(); }
  int64_t count() const { return S * D * P; }  // the elements of one statistic
  int64_t statistics() const { return B * N * G; }
  int64_t parameters() const { return B * G * D; }
  int64_t size() const { return B * N * slab(); }
};

// The element types of x and of y; what is added up is A, float for all but double.
struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };
template <class T> struct accumulator { using type = float; };
template <> struct accumulator<double> { using type = double; };

enum class Type { f32, bf16, f16, f64 };

// A statistic as the library keeps it: mean == mean_hi + mean_lo, and m2 the sum of (prescale (x - mean))^2. A prescale
// of 0 says that none keeps all squares in A's range: then m2 is the root of the sum of (x - mean)^2.
template <class A> struct Statistic { A mean_hi, mean_lo, m2; };

// One value for each column of a slab, and what a kernel needs of the statistics there.
// `empty`: nothing in the slab counts, and x is not read.
template <class A> struct Columns {
  const A *mean_hi, *mean_lo, *r, *scale, *bias, *mean_h, *mean_hx;
  bool empty = false;
  const A* zero = nullptr;  // where there are weights: as many zeros
};

// How much each element counts. One whose weight is 0 is absent: it is in no statistic, whatever it holds.
enum class Weighting {
  none,
  rows,    // rows, of whole passes: a byte for each statistic, 0 where a whole row is absent, which is then not read
  lines,   // slabs: an A for each line, (B, N, S)
  bytes,   // a byte for each element, 0 or 1
  values,  // an A for each element
};

struct Job {
  View view;
  const void *x = nullptr, *g = nullptr;                         // x of type T; the cotangent of y, of type U
  void *out = nullptr;                                           // y (U) or dx (T)
  void *mean_hi = nullptr, *mean_lo = nullptr, *m2 = nullptr;       // (B, N, G), A
  const void *scale = nullptr, *bias = nullptr;                  // (B, G, D), A: never null, ones and zeros stand in
  double epsilon = 0, prescale = 1, count = 0;                       // count: elements of a statistic, on all devices
  bool centered = true, cast_before_scale = false;
  bool nontemporal = false;                                           // the output is too large to stay in the cache
  Weighting weighting = Weighting::none;
  const void* weights = nullptr;
  void* counts = nullptr;  // (B, N, G), A: where there are weights, their sums on all devices, in the place of `count`
  const void* plain = nullptr;  // where there are weights: the Kernels<A> without them
};

// How a row is written in 8 bits: the formats of _core/formats.py.
struct Quantizer {
  enum Kind { e4m3, e5m2, int8 } kind = e4m3;
  enum Rule { given, linear, power_up, power_ocp } rule = given;  // the scale: one for each row that comes, or of `block`
  int64_t block = 1;                                              // neighbouring elements, which divides a row
  float inverse = 1, upper = 0, floor = 0;                        // linear: max(min(amax, upper) inverse, floor)
  int32_t exponent = 0;                                           // of the largest number of the format, for powers
  Type rounding = Type::f32;                                      // what rounding before, if any, is to
  bool round_first = false;
  const float* scales = nullptr;  // (B, N, G), given
  void* found = nullptr;          // scales in float or as the bits of a power; where they are given the largest of a row
};

// r = 1 / sqrt(var + epsilon); 0 where that is 1 / 0, and where nothing was counted; NaN where m2 overflowed.
template <class A> inline A rstd(const Job& job, A m2, double count) {
  if (!__builtin_isfinite(m2)) return A(__builtin_nan(""));
  const bool root = job.prescale == 0;
  const double prescale = root ? 1.0 : job.prescale, square = root ? double(m2) * double(m2) : double(m2);
  const double v = count == 0 ? 0.0 : square / count + job.epsilon * prescale * prescale;
  return v == 0 ? A(0) : A(prescale / __builtin_sqrt(v));
}
template <class A> inline A rstd(const Job& job, A m2) { return rstd(job, m2, job.count); }

// Sums of n squares are made without a prescale, or else with one of these. One that overflowed, or nearly so, needs a
// small prescale. One whose terms were flushed to zero needs a large one, unless it is nothing beside epsilon.
constexpr double small_prescale = 0x1p-64, large_prescale = 0x1p64;
template <class A> inline double prescale_for(const Job& job, double square, double n) {
  if (sizeof(A) == 8) return 1;
  if (!(square < 1e37)) return small_prescale;
  return job.prescale == 0 && job.epsilon < 0x1p-80 && square < n * 0x1p-102 ? large_prescale : 1;
}

// From sums of n terms x - mean_hi and (x - mean_hi)^2 to the statistic: the formula, and the rule for constants, are those of
// `shifted_moments` in _core/formulas.py. False where mean_hi was so far from the mean that the two terms of m2 cancel:
// mean_hi is then brought to the mean, for the caller to sum again.
template <class A> inline bool finalize(const Job& job, double n, double sum, double square, bool again, Statistic<A>& s) {
  const double mean_lo = job.centered ? sum / n : 0.0;
  const double correction = n * mean_lo * mean_lo, m2 = square - correction;
  const bool constant = m2 <= 0x1p-18 * correction, far = !again && correction > 4 * m2;
  if (constant || far) s.mean_hi += A(mean_lo);
  s.mean_lo = constant ? A(0) : A(mean_lo);
  s.m2 = constant ? A(0) : A(job.prescale == 0 ? __builtin_sqrt(m2) : m2 * job.prescale * job.prescale);
  return !far;
}

// Lines first, first + step, ... of one slab, `lines` of them, and of each the columns [begin, end). While an element is
// worked on, the one `ahead` of it is fetched.
struct Block { int64_t slab, first, step, lines, begin, end, ahead; };

// Between n elements of one type and numbers: `load` is null where they are the same. `round` rounds numbers to 16 bits,
// and is null for wider types.
template <class A> struct Codec {
  int64_t size;  // bytes of an element
  void (*load)(const void* from, int64_t n, A* into);
  void (*store)(const A* from, int64_t n, void* into, bool nontemporal);
  void (*round)(A* values, int64_t n);
};

template <class A> struct Kernels {
  // Rows [first, last): statistics and y; statistics given, dx, and sums over the rows added to (G, D) dscale, dbias.
  void (*rows_forward)(const Job&, int64_t first, int64_t last);
  void (*rows_backward)(const Job&, int64_t first, int64_t last, A* dscale, A* dbias);
  // The same in parts: statistics alone; y from statistics that are given; the sums h, hx (B, N, G) with those for scale
  // and bias; and dx from such sums. The last two are for P == 1.
  void (*rows_moments)(const Job&, int64_t first, int64_t last);
  void (*rows_normalize)(const Job&, int64_t first, int64_t last);
  void (*rows_gradient_sums)(const Job&, int64_t first, int64_t last, A* dscale, A* dbias, A* h, A* hx);
  void (*rows_gradient)(const Job&, int64_t first, int64_t last, A* h, A* hx);
  // The first in 8 bits, with scratch for a row; null for double.
  void (*rows_quantize)(const Job&, const Quantizer&, int64_t first, int64_t last, float* scratch);
  // Sums down the columns, added to `sum` and `square`: of x - mean_hi and (prescale (x - mean_hi))^2 over the first `run`
  // elements of each column's P; where elements have weights of their own, also these, added to `count` ...
  void (*sums)(const Job&, const Block&, int64_t run, A prescale, const A* mean_hi, A* sum, A* square, A* count);
  // ... and of g xhat and g.
  void (*gradient_sums)(const Job&, const Block&, const Columns<A>&, A* gx, A* g);
  // y, and dx = r (g scale - mean_h - xhat mean_hx).
  void (*normalize)(const Job&, const Block&, const Columns<A>&);
  void (*gradient)(const Job&, const Block&, const Columns<A>&);
  // What the same for a job with weights need; null in those themselves.
  const Kernels* weighted;
  const Codec<A>*x, *y;
};

// The kernels of one instruction set for x of type T and y of type U; null where there is no such pair.
template <class A> using Table = const Kernels<A>* (*)(Type x, Type y);

}  // namespace jaxnorm
