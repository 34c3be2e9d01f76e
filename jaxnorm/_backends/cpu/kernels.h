// The loops, for one instruction set. Included after simd.h, inside the same namespace.
//
// A Value is what a loop multiplies or subtracts at position i: the same number everywhere (Same), or one for each
// position (Each). Rows have the same mean and a scale for each position; slabs have both for each; planes of pixels
// have the same of both. So the formulas stand here once for all layouts.

template <class A> struct Same {
  V<A> value;
  explicit Same(A a) : value(all(a)) {}
  template <class At> JN_INLINE V<A> at(int64_t, At) const { return value; }
  Same after(int64_t) const { return *this; }
};

template <class A> struct Each {
  const A* values;
  template <class At> JN_INLINE V<A> at(int64_t i, At a) const { return a.load(values + i); }
  Each after(int64_t i) const { return {values + i}; }
};

#define JN_BODY(i, at, u) [&](int64_t i, auto at, [[maybe_unused]] int u) __attribute__((always_inline))

template <class A> struct Pair { A first, second; };

// Sums of x - mean_hi and of (prescale (x - mean_hi))^2 over a run of n elements. `scaled` is false where the prescale is 1.
template <class T, bool scaled, class A = typename accumulator<T>::type>
Pair<A> run_sums(const T* x, int64_t n, A mean_hi, A prescale) {
  V<A> s[4]{}, q[4]{};
  const V<A> from = all(mean_hi), in = all(prescale);
  over<A, 4>(n, JN_BODY(i, at, u) {
    const V<A> d = at.kept(at.load(x + i) - from), z = scaled ? d * in : d;
    s[u] += d;
    q[u] += z * z;
  });
  return {sum<A>((s[0] + s[1]) + (s[2] + s[3])), sum<A>((q[0] + q[1]) + (q[2] + q[3]))};
}

// A pair of sums over a whole row, in pieces: a long chain of terms that round alike drifts; the pieces add up in double.
template <class Run> JN_INLINE Pair<double> in_pieces(int64_t n, Run run) {
  constexpr int64_t piece = 4096;
  Pair<double> total{0, 0};
  for (int64_t i = 0; i < n; i += piece) {
    const auto [first, second] = run(i, n - i < piece ? n - i : piece);
    total.first += first, total.second += second;
  }
  return total;
}
template <class T, bool scaled, class A = typename accumulator<T>::type>
Pair<double> row_sums(const T* x, int64_t n, A mean_hi, A prescale) {
  return in_pieces(n, [&](int64_t i, int64_t size) { return run_sums<T, scaled, A>(x + i, size, mean_hi, prescale); });
}

// The mean of the first few elements: a mean_hi for the others, near their mean but where they are peculiar.
template <class T, class A = typename accumulator<T>::type> A sample(const T* x, int64_t n) {
  constexpr int few = 16 / sizeof(A);
  if (n >= lanes<A>) {
    const V<A> v = Whole{}.load(x);
    A total = 0;
    for (int i = 0; i < few; ++i) total += v[i];
    return total / few;
  }
  return sum<A>(Part{int(n)}.load(x)) / A(n);
}

// In one pass about a mean_hi near the mean; `finalize` says when that was near enough, and what the sums come to.
template <class T, class A = typename accumulator<T>::type>
Statistic<A> row_statistic(const Job& job, const T* x, int64_t n) {
  Statistic<A> s{0, 0, 0};
  if (n == 0) return s;
  if (job.centered) s.mean_hi = sample(x, n);
  for (bool again = false;; again = true) {
    Pair<double> sums = row_sums<T, false, A>(x, n, s.mean_hi, A(1));
    if (const double prescale = prescale_for<A>(job, sums.second, double(n)); prescale != 1) {
      sums = row_sums<T, true, A>(x, n, s.mean_hi, A(prescale));
      sums.second /= prescale * prescale;
    }
    if (finalize(job, double(job.view.count()), sums.first, sums.second, again, s)) return s;
  }
}

// y = ((x - mean_hi) - mean_lo) r scale + bias for `lines` lines, `stride` apart, of n elements; several fetch `ahead`.
template <class T, class U, bool cast_before_scale, bool nontemporal, int lines, class Stat, class Param,
          class A = typename accumulator<T>::type>
void normalize_lines(const T* x, U* y, int64_t n, int64_t stride, int64_t ahead, Stat mean_hi, Stat mean_lo, Stat r,
                     Param scale, Param bias) {
  over<A, 1>(n, JN_BODY(i, at, u) {
    const V<A> from = mean_hi.at(i, at), rest = mean_lo.at(i, at), by = r.at(i, at);
    const V<A> times = scale.at(i, at), plus = bias.at(i, at);
    for (int line = 0; line < lines; ++line) {
      if constexpr (lines > 1) __builtin_prefetch(x + line * stride + i + ahead, 0, 2);
      V<A> xhat = ((at.load(x + line * stride + i) - from) - rest) * by;
      if constexpr (cast_before_scale) xhat = decoded(U{}, encoded(U{}, xhat));
      const V<A> v = xhat * times + plus;
      if constexpr (nontemporal) at.store_nontemporal(y + line * stride + i, v);
      else at.store(y + line * stride + i, v);
    }
  });
}

// dx = r (g scale - mean_h - xhat mean_hx), likewise.
template <class T, class U, bool nontemporal, int lines, class Stat, class Param, class A = typename accumulator<T>::type>
void gradient_lines(const T* x, const U* g, T* dx, int64_t n, int64_t stride, int64_t ahead, Stat mean_hi, Stat mean_lo,
                    Stat r, Stat mean_h, Stat mean_hx, Param scale) {
  over<A, 1>(n, JN_BODY(i, at, u) {
    const V<A> from = mean_hi.at(i, at), rest = mean_lo.at(i, at), by = r.at(i, at);
    const V<A> first = mean_h.at(i, at), second = mean_hx.at(i, at), times = scale.at(i, at);
    for (int line = 0; line < lines; ++line) {
      if constexpr (lines > 1) {
        __builtin_prefetch(x + line * stride + i + ahead, 0, 2);
        __builtin_prefetch(g + line * stride + i + ahead, 0, 2);
      }
      const V<A> xhat = ((at.load(x + line * stride + i) - from) - rest) * by;
      const V<A> v = by * (at.load(g + line * stride + i) * times - first - xhat * second);
      if constexpr (nontemporal) at.store_nontemporal(dx + line * stride + i, v);
      else at.store(dx + line * stride + i, v);
    }
  });
}

// Sums of g scale and g scale (x - mean_hi) over a run, the latter times r if `scaled` ...
template <class T, class U, bool scaled, class Param, class A = typename accumulator<T>::type>
Pair<A> run_gradient_sums(const T* x, const U* g, int64_t n, A mean_hi, A r, Param scale) {
  V<A> h[4]{}, hx[4]{};
  const V<A> from = all(mean_hi), by = all(r);
  over<A, 4>(n, JN_BODY(i, at, u) {
    const V<A> gs = at.load(g + i) * scale.at(i, at), d = at.load(x + i) - from;
    h[u] += gs;
    hx[u] += at.kept(gs * (scaled ? d * by : d));
  });
  return {sum<A>((h[0] + h[1]) + (h[2] + h[3])), sum<A>((hx[0] + hx[1]) + (hx[2] + hx[3]))};
}

// ... and of g scale and g scale xhat over a row. The rest of the mean is taken in at the end; so is r, unless x is so
// large or small that its products with g might leave A's range.
template <class T, class U, class Param, class A = typename accumulator<T>::type>
Pair<A> row_gradient_sums(const T* x, const U* g, int64_t n, Statistic<A> s, A r, Param scale) {
  const auto sums = [&](auto scaled) {
    return in_pieces(n, [&](int64_t i, int64_t size) {
      return run_gradient_sums<T, U, scaled.value>(x + i, g + i, size, s.mean_hi, r, scale.after(i));
    });
  };
  if (r < A(0x1p-40) || r > A(0x1p40)) {
    const Pair<double> of = sums(std::true_type{});
    return {A(of.first), A(of.second - double(s.mean_lo) * double(r) * of.first)};
  }
  const Pair<double> of = sums(std::false_type{});
  return {A(of.first), A((of.second - double(s.mean_lo) * of.first) * double(r))};
}

// Whether stores past the cache may be used from here on in steps of `step` elements: every vector must be aligned.
template <class T, class A> bool can_store_nontemporal(const Job& job, const T* p, int64_t step) {
  constexpr int64_t size = sizeof(Stored<T>);
  return job.nontemporal && reinterpret_cast<uintptr_t>(p) % size == 0 && step * int64_t(sizeof(T)) % size == 0;
}

JN_INLINE void fence(const Job& job) {
#if defined(__SSE2__)
  if (job.nontemporal) _mm_sfence();
#endif
}

#include "rows.h"
#include "quantize.h"

// --- slabs -----------------------------------------------------------------------------------------------------------

// The lines of a block in groups of 4, then one by one: call(position in x, Lines) with Lines::value in {4, 1}.
template <int lines> struct Lines { static constexpr int value = lines; };

template <class Call> JN_INLINE void over_lines(const View& view, const Block& b, Call call) {
  const int64_t stride = b.step * view.line();
  int64_t at = b.slab * view.slab() + b.first * view.line() + b.begin * view.P, left = b.lines;
  for (; left >= 4; left -= 4, at += 4 * stride) call(at, Lines<4>{});
  for (; left > 0; --left, at += stride) call(at, Lines<1>{});
}

// The planes of a block: call(position in x, column) for each column of each line.
template <class Call> JN_INLINE void over_planes(const View& view, const Block& b, Call call) {
  for (int64_t line = 0; line < b.lines; ++line) {
    const int64_t at = b.slab * view.slab() + (b.first + line * b.step) * view.line();
    for (int64_t k = b.begin; k < b.end; ++k) call(at + k * view.P, k);
  }
}

template <class T, bool scaled, class A = typename accumulator<T>::type>
void slab_sums_in(const Job& job, const Block& b, int64_t run, A prescale, const A* mean_hi, A* total, A* square) {
  const T* x = static_cast<const T*>(job.x);
  const int64_t stride = b.step * job.view.line();
  if (job.view.P > 1) {
    over_planes(job.view, b, [&](int64_t at, int64_t k) {
      const auto [s, q] = row_sums<T, scaled, A>(x + at, run, mean_hi[k], prescale);
      total[k] += A(s), square[k] += A(q);
    });
    return;
  }
  const V<A> in = all(prescale);
  over_lines(job.view, b, [&](int64_t from, auto lines) {
    over<A, 1>(b.end - b.begin, JN_BODY(i, at, u) {
      const int64_t k = b.begin + i;
      const V<A> about = at.load(mean_hi + k);
      V<A> s{}, q{};
      for (int line = 0; line < lines.value; ++line) {
        __builtin_prefetch(x + from + line * stride + i + b.ahead, 0, 2);
        const V<A> d = at.load(x + from + line * stride + i) - about, z = scaled ? d * in : d;
        s += d;
        q += z * z;
      }
      at.store(total + k, at.load(total + k) + s);
      at.store(square + k, at.load(square + k) + q);
    });
  });
}

template <class T, class A = typename accumulator<T>::type>
void slab_sums(const Job& job, const Block& b, int64_t run, A prescale, const A* mean_hi, A* total, A* square, A*) {
  if (prescale == 1) slab_sums_in<T, false>(job, b, run, prescale, mean_hi, total, square);
  else slab_sums_in<T, true>(job, b, run, prescale, mean_hi, total, square);
}

template <class T, class U, class A = typename accumulator<T>::type>
void slab_gradient_sums(const Job& job, const Block& b, const Columns<A>& c, A* total_gx, A* total_g) {
  const T* x = static_cast<const T*>(job.x);
  const U* g = static_cast<const U*>(job.g);
  const int64_t stride = b.step * job.view.line();
  if (job.view.P > 1) {
    over_planes(job.view, b, [&](int64_t at, int64_t k) {
      const Statistic<A> s{c.mean_hi[k], c.mean_lo[k], 0};
      const auto [of_g, of_gx] = row_gradient_sums<T, U>(x + at, g + at, job.view.P, s, c.r[k], Same<A>(1));
      total_gx[k] += of_gx, total_g[k] += of_g;
    });
    return;
  }
  over_lines(job.view, b, [&](int64_t from, auto lines) {
    over<A, 1>(b.end - b.begin, JN_BODY(i, at, u) {
      const int64_t k = b.begin + i;
      const V<A> mean_hi = at.load(c.mean_hi + k), mean_lo = at.load(c.mean_lo + k), r = at.load(c.r + k);
      V<A> gx{}, gs{};
      for (int line = 0; line < lines.value; ++line) {
        __builtin_prefetch(x + from + line * stride + i + b.ahead, 0, 2);
        __builtin_prefetch(g + from + line * stride + i + b.ahead, 0, 2);
        const V<A> one = at.load(g + from + line * stride + i);
        gx += one * (((at.load(x + from + line * stride + i) - mean_hi) - mean_lo) * r);
        gs += one;
      }
      at.store(total_gx + k, at.load(total_gx + k) + gx);
      at.store(total_g + k, at.load(total_g + k) + gs);
    });
  });
}

template <class T, class U, bool cast_before_scale, bool nontemporal, class A = typename accumulator<T>::type>
void slab_normalize_by(const Job& job, const Block& b, const Columns<A>& c) {
  const T* x = static_cast<const T*>(job.x);
  U* y = static_cast<U*>(job.out);
  if (job.view.P > 1) {
    over_planes(job.view, b, [&](int64_t at, int64_t k) {
      normalize_lines<T, U, cast_before_scale, nontemporal, 1>(x + at, y + at, job.view.P, 0, 0, Same<A>(c.mean_hi[k]),
                                                    Same<A>(c.mean_lo[k]), Same<A>(c.r[k]), Same<A>(c.scale[k]),
                                                    Same<A>(c.bias[k]));
    });
    return;
  }
  const auto each = [&](const A* table) { return Each<A>{table + b.begin}; };
  over_lines(job.view, b, [&](int64_t at, auto lines) {
    normalize_lines<T, U, cast_before_scale, nontemporal, lines.value>(x + at, y + at, b.end - b.begin, b.step * job.view.line(),
                                                            b.ahead, each(c.mean_hi), each(c.mean_lo), each(c.r),
                                                            each(c.scale), each(c.bias));
  });
}

template <class T, class U, class A = typename accumulator<T>::type>
void slab_normalize(const Job& job, const Block& b, const Columns<A>& c) {
  const U* y = static_cast<const U*>(job.out);
  const int64_t step = job.view.P > 1 ? job.view.P : job.view.line();
  const bool aligned = b.begin * int64_t(sizeof(U)) % int64_t(sizeof(Stored<U>)) == 0;
  const bool nontemporal = aligned && can_store_nontemporal<U, A>(job, y, step);
  constexpr bool half = sizeof(U) == 2;
  if (half && job.cast_before_scale)
    nontemporal ? slab_normalize_by<T, U, half, true>(job, b, c) : slab_normalize_by<T, U, half, false>(job, b, c);
  else
    nontemporal ? slab_normalize_by<T, U, false, true>(job, b, c) : slab_normalize_by<T, U, false, false>(job, b, c);
  fence(job);
}

template <class T, class U, bool nontemporal, class A = typename accumulator<T>::type>
void slab_gradient_by(const Job& job, const Block& b, const Columns<A>& c) {
  const T* x = static_cast<const T*>(job.x);
  const U* g = static_cast<const U*>(job.g);
  T* dx = static_cast<T*>(job.out);
  if (job.view.P > 1) {
    over_planes(job.view, b, [&](int64_t at, int64_t k) {
      gradient_lines<T, U, nontemporal, 1>(x + at, g + at, dx + at, job.view.P, 0, 0, Same<A>(c.mean_hi[k]),
                                      Same<A>(c.mean_lo[k]), Same<A>(c.r[k]), Same<A>(c.mean_h[k]),
                                      Same<A>(c.mean_hx[k]), Same<A>(c.scale[k]));
    });
    return;
  }
  const auto each = [&](const A* table) { return Each<A>{table + b.begin}; };
  over_lines(job.view, b, [&](int64_t at, auto lines) {
    gradient_lines<T, U, nontemporal, lines.value>(x + at, g + at, dx + at, b.end - b.begin, b.step * job.view.line(),
                                              b.ahead, each(c.mean_hi), each(c.mean_lo), each(c.r), each(c.mean_h),
                                              each(c.mean_hx), each(c.scale));
  });
}

template <class T, class U, class A = typename accumulator<T>::type>
void slab_gradient(const Job& job, const Block& b, const Columns<A>& c) {
  const T* dx = static_cast<const T*>(job.out);
  const int64_t step = job.view.P > 1 ? job.view.P : job.view.line();
  const bool aligned = b.begin * int64_t(sizeof(T)) % int64_t(sizeof(Stored<T>)) == 0;
  const bool nontemporal = aligned && can_store_nontemporal<T, A>(job, dx, step);
  nontemporal ? slab_gradient_by<T, U, true>(job, b, c) : slab_gradient_by<T, U, false>(job, b, c);
  fence(job);
}

#include "weighted.h"

// --- the table -------------------------------------------------------------------------------------------------------

template <class T, class A> const Codec<A>* codec_of() {
  static constexpr bool same = std::is_same_v<T, A>;
  struct Of {
    static void load(const void* from, int64_t n, A* into) {
      over<A, 4>(n, JN_BODY(i, at, u) { at.store(into + i, at.load(static_cast<const T*>(from) + i)); });
    }
    static void store(const A* from, int64_t n, void* into, bool nontemporal) {
      T* out = static_cast<T*>(into);
      if (nontemporal && reinterpret_cast<uintptr_t>(out) % sizeof(Stored<T>) == 0)
        over<A, 4>(n, JN_BODY(i, at, u) { at.store_nontemporal(out + i, at.load(from + i)); });
      else
        over<A, 4>(n, JN_BODY(i, at, u) { at.store(out + i, at.load(from + i)); });
    }
    static void round(A* values, int64_t n) {
      over<A, 1>(n, JN_BODY(i, at, u) { at.store(values + i, decoded(T{}, encoded(T{}, at.load(values + i)))); });
    }
  };
  static constexpr Codec<A> codec{sizeof(T), same ? nullptr : Of::load, Of::store, sizeof(T) == 2 ? Of::round : nullptr};
  return &codec;
}

template <class A> const Kernels<A>* weighted_kernels() {
#if defined(__AVX512BF16__)
  return avx512::float_table(Type::f32, Type::f32)->weighted;  // there is no bfloat16 in them
#else
  return &Weighted<A>::table;
#endif
}

template <class T, class U, class A = typename accumulator<T>::type> const Kernels<A>* kernels_of() {
  static const Kernels<A> table{rows_forward<T, U, false>, rows_backward<T, U>,      rows_moments<T>,
                                rows_forward<T, U, true>,  rows_gradient_sums<T, U>, rows_gradient<T, U>,
                                rows_quantize<T>,
                                slab_sums<T>,              slab_gradient_sums<T, U>, slab_normalize<T, U>,
                                slab_gradient<T, U>,       weighted_kernels<A>(),    codec_of<T, A>(),
                                codec_of<U, A>()};
  return &table;
}

inline const Kernels<float>* table_float(Type x, Type y) {
  if (x == Type::bf16 && y == Type::bf16) return kernels_of<bfloat16, bfloat16>();
  if (x == Type::f32 && y == Type::bf16) return kernels_of<float, bfloat16>();
  if (x == Type::bf16 && y == Type::f32) return kernels_of<bfloat16, float>();
#if defined(__AVX512BF16__)
  return avx512::float_table(x, y);  // what has no bfloat16 in it is compiled once
#else
  if (x == Type::f32 && y == Type::f32) return kernels_of<float, float>();
  if (x == Type::f16 && y == Type::f16) return kernels_of<float16, float16>();
  if (x == Type::f32 && y == Type::f16) return kernels_of<float, float16>();
  if (x == Type::f16 && y == Type::f32) return kernels_of<float16, float>();
  return nullptr;
#endif
}

inline const Kernels<double>* table_double(Type x, Type y) {
#if defined(__AVX512BF16__)
  return avx512::double_table(x, y);
#else
  return x == Type::f64 && y == Type::f64 ? kernels_of<double, double>() : nullptr;
#endif
}
