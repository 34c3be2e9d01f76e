// The loops over tiles of elements that have weights. Part of kernels.h.
//
// An element of weight 0 is absent. It is in no statistic, but normalized like the others, unless it is NaN, infinite or
// beyond 1e30: then its xhat is 0 and so is its gradient.

#define JN_LOOP static __attribute__((noinline)) void

template <class A> struct WeightedLoops {
  using T = Tile<A>;
  struct Sums { double first = 0, second = 0, count = 0; };
  static constexpr A largest = A(1e30);

  // v where the element is present, or is usable, and 0 elsewhere.
  static JN_INLINE V<A> where_present(V<A> weight, V<A> v) { return weight != V<A>{} ? v : V<A>{}; }
  static JN_INLINE V<A> where_usable(V<A> weight, V<A> x, V<A> v) {
    const V<A> size = weight != V<A>{} ? V<A>{} : as<V<A>>(as<Bits<A>>(x) & ~as<Bits<A>>(-V<A>{}));
    return size <= all(largest) ? v : V<A>{};
  }
  // It is held in range, so that a cotangent of 0 gives 0. NaN stays NaN.
  static JN_INLINE V<A> xhat_of(V<A> weight, V<A> x, V<A> mean_hi, V<A> mean_lo, V<A> r) {
    const V<A> z = where_usable(weight, x, (x - mean_hi) - mean_lo) * r, below = all(largest) < z ? all(largest) : z;
    return all(-largest) > below ? all(-largest) : below;
  }

  // --- loops over tiles -----------------------------------------------------------------------------------------------

  // loop(tile, Lines) over runs, 4 at a time as long as there are as many.
  template <class Loop> static JN_INLINE void by_fours(T t, int64_t runs, Loop loop) {
    for (; runs >= 4; runs -= 4, t = t.after(4)) loop(t, Lines<4>{});
    for (; runs > 0; --runs, t = t.after(1)) loop(t, Lines<1>{});
  }

  // Sums of w (x - mean_hi), of w (prescale (x - mean_hi))^2 and of w, over a run ...
  JN_LOOP add_run_sums(const T& t, int64_t n, A mean_hi, A prescale, Sums& total) {
    const V<A> from = all(mean_hi), in = all(prescale);
    V<A> s[4]{}, q[4]{}, c[4]{};
    over<A, 4>(n, JN_BODY(i, at, u) {
      const V<A> weight = at.load(t.w + i), d = where_present(weight, at.load(t.x + i) - from), z = d * in;
      s[u] += weight * d;
      q[u] += weight * z * z;
      c[u] += weight;
    });
    total.first += sum<A>((s[0] + s[1]) + (s[2] + s[3])), total.second += sum<A>((q[0] + q[1]) + (q[2] + q[3]));
    total.count += sum<A>((c[0] + c[1]) + (c[2] + c[3]));
  }

  // ... and for each column.
  JN_LOOP add_column_sums(const T& tile, int64_t runs, int64_t n, A prescale, const A* mean_hi, A* total, A* square,
                          A* count) {
    const V<A> in = all(prescale);
    by_fours(tile, runs, [&](const T& t, auto lines) {
      over<A, 1>(n, JN_BODY(i, at, u) {
        const V<A> about = at.load(mean_hi + i);
        V<A> s{}, q{}, c{};
        for (int line = 0; line < lines.value; ++line) {
          const V<A> weight = at.load(t.w + line * t.of_w + i);
          const V<A> d = where_present(weight, at.load(t.x + line * t.of_x + i) - about), z = d * in;
          s += weight * d, q += weight * z * z, c += weight;
        }
        at.store(total + i, at.load(total + i) + s);
        at.store(square + i, at.load(square + i) + q);
        at.store(count + i, at.load(count + i) + c);
      });
    });
  }

  template <int lines, class Stat, class Param>
  static JN_INLINE void normalize_lines(const T& t, int64_t n, const Stat& mean_hi, const Stat& mean_lo, const Stat& r,
                                        const Param& scale, const Param& bias) {
    over<A, 1>(n, JN_BODY(i, at, u) {
      const V<A> from = mean_hi.at(i, at), rest = mean_lo.at(i, at), by = r.at(i, at);
      const V<A> times = scale.at(i, at), plus = bias.at(i, at);
      for (int line = 0; line < lines; ++line) {
        const V<A> xhat = xhat_of(at.load(t.w + line * t.of_w + i), at.load(t.x + line * t.of_x + i), from, rest, by);
        at.store(t.out + line * t.of_out + i, xhat * times + plus);
      }
    });
  }

  // y; where xhat is rounded first, in two steps.
  template <class Stat, class Param>
  JN_LOOP normalize_tile(const Tiles<A>& tiles, const T& tile, int64_t runs, int64_t n, Stat mean_hi, Stat mean_lo, Stat r,
                         Param scale, Param bias) {
    if (!tiles.rounds())
      return by_fours(tile, runs, [&](const T& t, auto lines) {
        normalize_lines<lines.value>(t, n, mean_hi, mean_lo, r, scale, bias);
      });
    for (T t = tile; runs > 0; --runs, t = t.after(1)) {
      normalize_lines<1>(t, n, mean_hi, mean_lo, r, Same<A>(1), Same<A>(0));
      tiles.plain.y->round(t.out, n);
      over<A, 1>(n, JN_BODY(i, at, u) { at.store(t.out + i, at.load(t.out + i) * scale.at(i, at) + bias.at(i, at)); });
    }
  }

  // Whether each x would be usable if it were absent.
  static __attribute__((noinline)) bool are_usable(const T& tile, int64_t runs, int64_t n) {
    V<A> wrong{};
    by_fours(tile, runs, [&](const T& t, auto lines) {
      over<A, 1>(n, JN_BODY(i, at, u) {
        for (int line = 0; line < lines.value; ++line)
          wrong += where_usable(V<A>{}, at.load(t.x + line * t.of_x + i), all(A(-1))) + all(A(1));
      });
    });
    return sum<A>(wrong) == 0;
  }

  JN_LOOP add(const T& t, int64_t n, A* total_g) {
    over<A, 1>(n, JN_BODY(i, at, u) { at.store(total_g + i, at.load(total_g + i) + at.load(t.g + i)); });
  }

  // Sums of g scale xhat and of g scale over a run ...
  JN_LOOP add_run_gradient_sums(const T& t, int64_t n, A mean_hi, A mean_lo, A r, Pair<double>& total) {
    const V<A> from = all(mean_hi), rest = all(mean_lo), by = all(r);
    V<A> gx[4]{}, gs[4]{};
    over<A, 4>(n, JN_BODY(i, at, u) {
      const V<A> g = at.load(t.g + i);
      gx[u] += at.kept(g * xhat_of(at.load(t.w + i), at.load(t.x + i), from, rest, by));
      gs[u] += g;
    });
    total.first += sum<A>((gx[0] + gx[1]) + (gx[2] + gx[3])), total.second += sum<A>((gs[0] + gs[1]) + (gs[2] + gs[3]));
  }

  // ... where scale is another at each position, with those of g xhat and g for each position ...
  JN_LOOP add_row_gradient_sums(const T& t, int64_t n, A mean_hi, A mean_lo, A r, const A* scale, Pair<double>& total,
                                A* dscale, A* dbias) {
    const V<A> from = all(mean_hi), rest = all(mean_lo), by = all(r);
    V<A> hx[2]{}, h[2]{};
    over<A, 2>(n, JN_BODY(i, at, u) {
      const V<A> g = at.load(t.g + i), times = at.load(scale + i);
      const V<A> gx = at.kept(g * xhat_of(at.load(t.w + i), at.load(t.x + i), from, rest, by));
      hx[u] += gx * times;
      h[u] += g * times;
      at.store(dscale + i, at.load(dscale + i) + gx);
      at.store(dbias + i, at.load(dbias + i) + g);
    });
    total.first += sum<A>(hx[0] + hx[1]), total.second += sum<A>(h[0] + h[1]);
  }

  // ... and of g xhat and g for each column.
  JN_LOOP add_column_gradient_sums(const T& tile, int64_t runs, int64_t n, const Columns<A>& c, int64_t first, A* total_gx,
                                   A* total_g) {
    by_fours(tile, runs, [&](const T& t, auto lines) {
      over<A, 1>(n, JN_BODY(i, at, u) {
        const int64_t k = first + i;
        const V<A> mean_hi = at.load(c.mean_hi + k), mean_lo = at.load(c.mean_lo + k), r = at.load(c.r + k);
        V<A> gx{}, gs{};
        for (int line = 0; line < lines.value; ++line) {
          const V<A> g = at.load(t.g + line * t.of_g + i), x = at.load(t.x + line * t.of_x + i);
          gx += g * xhat_of(at.load(t.w + line * t.of_w + i), x, mean_hi, mean_lo, r);
          gs += g;
        }
        at.store(total_gx + k, at.load(total_gx + k) + gx);
        at.store(total_g + k, at.load(total_g + k) + gs);
      });
    });
  }

  // dx = r (g scale - w (mean_h + xhat mean_hx)), the first term where x is usable.
  template <class Stat, class Param>
  JN_LOOP gradient_tile(const T& tile, int64_t runs, int64_t n, Stat mean_hi, Stat mean_lo, Stat r, Stat mean_h,
                        Stat mean_hx, Param scale) {
    by_fours(tile, runs, [&](const T& t, auto lines) {
      over<A, 1>(n, JN_BODY(i, at, u) {
        const V<A> from = mean_hi.at(i, at), rest = mean_lo.at(i, at), by = r.at(i, at);
        const V<A> first = mean_h.at(i, at), second = mean_hx.at(i, at), times = scale.at(i, at);
        for (int line = 0; line < lines.value; ++line) {
          const V<A> weight = at.load(t.w + line * t.of_w + i), x = at.load(t.x + line * t.of_x + i);
          const V<A> means = where_present(weight, weight * (first + xhat_of(weight, x, from, rest, by) * second));
          const V<A> direct = where_usable(weight, x, at.load(t.g + line * t.of_g + i) * times);
          at.store(t.out + line * t.of_out + i, by * (direct - means));
        }
      });
    });
  }
};
#undef JN_LOOP
