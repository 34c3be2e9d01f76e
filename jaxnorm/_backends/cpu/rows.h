// Rows: each has a statistic of its own, and what is done to it is done while it is in the cache. Part of kernels.h.

template <class T, class U, bool cast_before_scale> struct Rows {
  using A = typename accumulator<T>::type;

  const Job& job;
  const View& view = job.view;
  const int64_t n = view.row();
  const T* x = static_cast<const T*>(job.x);
  A *mean_hi = static_cast<A*>(job.mean_hi), *mean_lo = static_cast<A*>(job.mean_lo), *m2 = static_cast<A*>(job.m2);

  const A* parameter(const void* table, int64_t row) const {
    return static_cast<const A*>(table) + (row / (view.N * view.G) * view.G + row % view.G) * view.D;
  }
  Statistic<A> statistic(int64_t row) const { return {mean_hi[row], mean_lo[row], m2[row]}; }

  template <bool nontemporal> void normalize(int64_t row, Statistic<A> s, A r, U* y) const {
    const Same<A> from(s.mean_hi), rest(s.mean_lo), by(r);
    const A *scale = parameter(job.scale, row), *bias = parameter(job.bias, row);
    if (view.P == 1) {
      normalize_lines<T, U, cast_before_scale, nontemporal, 1>(x + row * n, y, n, 0, 0, from, rest, by, Each<A>{scale},
                                                    Each<A>{bias});
      return;
    }
    for (int64_t d = 0, at = 0; d < view.D; ++d, at += view.P)
      normalize_lines<T, U, cast_before_scale, nontemporal, 1>(x + row * n + at, y + at, view.P, 0, 0, from, rest, by,
                                                    Same<A>(scale[d]), Same<A>(bias[d]));
  }

  // run(row, count) for `count` rows, apart() from each other: as many as `most` where there are so many. Rows that are
  // groups of channels are alike in all but their statistics with those of the lines below. start(first, last) comes
  // before the runs of these rows, in the order of memory.
  int64_t apart() const { return view.P == 1 ? view.G : 1; }
  template <class Start, class Run> void each_set(int64_t first, int64_t last, int most, Start start, Run run) const {
    const int64_t step = apart(), lines = most * step;
    for (int64_t row = first; row < last;) {
      const int rows = step > 1 ? 1 : last - row < most ? int(last - row) : most;
      const int64_t together = row % step == 0 && last - row >= lines ? lines : rows;
      start(row, row + together);
      if (together == lines)
        for (int64_t group = 0; group < step; ++group) run(row + group, most);
      else run(row, rows);
      row += together;
    }
  }
  // Whether these rows have one scale: those of a group, of one example.
  bool share(int64_t row, int rows) const {
    const int64_t lines = view.N * view.G;
    return view.P == 1 && row / lines == (row + (rows - 1) * view.G) / lines;
  }

  // `lines` rows that share their scale, which is then loaded once for all.
  template <bool nontemporal, int lines> void normalize_together(int64_t row, const Statistic<A>* s, const A* r) const {
    const int64_t step = apart() * n;
    const T* at_x = x + row * n;
    U* y = static_cast<U*>(job.out) + row * n;
    const Each<A> scale{parameter(job.scale, row)}, bias{parameter(job.bias, row)};
    V<A> from[lines], rest[lines], by[lines];
    for (int k = 0; k < lines; ++k) from[k] = all(s[k].mean_hi), rest[k] = all(s[k].mean_lo), by[k] = all(r[k]);
    over<A, 1>(n, JN_BODY(i, at, u) {
      const V<A> times = scale.at(i, at), plus = bias.at(i, at);
      for (int k = 0; k < lines; ++k) {
        V<A> xhat = ((at.load(at_x + k * step + i) - from[k]) - rest[k]) * by[k];
        if constexpr (cast_before_scale) xhat = decoded(U{}, encoded(U{}, xhat));
        if constexpr (nontemporal) at.store_nontemporal(y + k * step + i, xhat * times + plus);
        else at.store(y + k * step + i, xhat * times + plus);
      }
    });
  }

  void moments(int64_t first, int64_t last) const {
    for (int64_t row = first; row < last; ++row) keep(row, row_statistic(job, x + row * n, n));
  }
  void keep(int64_t row, Statistic<A> s) const { mean_hi[row] = s.mean_hi, mean_lo[row] = s.mean_lo, m2[row] = s.m2; }

  // Some rows at a time, first all their statistics, unless they are given: the end of one sum overlaps the start of the
  // next.
  template <bool given> void forward(int64_t first, int64_t last) const {
    constexpr int most = 4;
    const int64_t step = apart();
    const auto start = [&](int64_t from, int64_t to) {
      if constexpr (!given) moments(from, to);
    };
    each_set(first, last, n * int64_t(sizeof(T)) <= 32768 ? most : 1, start, [&](int64_t row, int rows) {
      Statistic<A> s[most];
      A r[most];
      for (int k = 0; k < rows; ++k) s[k] = statistic(row + k * step), r[k] = rstd<A>(job, s[k].m2);
      U* y = static_cast<U*>(job.out) + row * n;
      if (rows == most && share(row, rows)) {
        if (can_store_nontemporal<U, A>(job, y, n)) normalize_together<true, most>(row, s, r);
        else normalize_together<false, most>(row, s, r);
        return;
      }
      for (int k = 0; k < rows; ++k, y += step * n)
        if (can_store_nontemporal<U, A>(job, y, view.P == 1 ? 0 : view.P)) normalize<true>(row + k * step, s[k], r[k], y);
        else normalize<false>(row + k * step, s[k], r[k], y);
    });
    fence(job);
  }

  // `lines` rows that share their scale: the sums of h and hx in one pass, then dx, dscale and dbias in another. A part
  // of it alone keeps those sums in `of_h`, `of_hx` or takes them from there, where they may be over more devices.
  enum Part { whole, sums_alone, dx_alone };
  template <bool nontemporal, int lines, Part part = whole>
  void backward_each(int64_t row, A* dscale, A* dbias, A* of_h = nullptr, A* of_hx = nullptr) const {
    const U* g = static_cast<const U*>(job.g) + row * n;
    const T* at_x = x + row * n;
    T* dx = static_cast<T*>(job.out) + row * n;
    const Each<A> scale{parameter(job.scale, row)};
    const A count = A(part == whole ? n : job.count);
    const int64_t step = apart(), next = (step > 1 ? 1 : lines) * n;
    V<A> from[lines], rest[lines], by[lines], first[lines], second[lines];
    for (int k = 0; k < lines; ++k) {
      const Statistic<A> s = statistic(row + k * step);
      const A r = rstd<A>(job, s.m2);
      Pair<A> sums{0, 0};
      if constexpr (part == dx_alone) sums = {of_h[row + k * step], of_hx[row + k * step]};
      else sums = row_gradient_sums<T, U>(at_x + k * step * n, g + k * step * n, n, s, r, scale);
      if constexpr (part == sums_alone) of_h[row + k * step] = sums.first, of_hx[row + k * step] = sums.second;
      from[k] = all(s.mean_hi), rest[k] = all(s.mean_lo), by[k] = all(r);
      first[k] = all(job.centered ? sums.first / count : A(0)), second[k] = all(sums.second / count);
    }
    over<A, 1>(n, JN_BODY(i, at, u) {
      const V<A> times = scale.at(i, at);
      V<A> ds{}, db{};
      for (int k = 0; k < lines; ++k) {
        const int64_t at_line = k * step * n + i;
        __builtin_prefetch(at_x + at_line + next, 0, 2);
        __builtin_prefetch(g + at_line + next, 0, 2);
        const V<A> xhat = ((at.load(at_x + at_line) - from[k]) - rest[k]) * by[k], gk = at.load(g + at_line);
        if constexpr (part != sums_alone) {
          const V<A> v = by[k] * (gk * times - first[k] - xhat * second[k]);
          if constexpr (nontemporal) at.store_nontemporal(dx + at_line, v);
          else at.store(dx + at_line, v);
        }
        ds += gk * xhat;
        db += gk;
      }
      if constexpr (part != dx_alone) {
        at.store(dscale + i, at.load(dscale + i) + ds);
        at.store(dbias + i, at.load(dbias + i) + db);
      }
    });
  }

  // A row whose scale is the same along each of D runs of P elements.
  template <bool nontemporal> void backward_runs(int64_t row, A* dscale, A* dbias) const {
    const U* g = static_cast<const U*>(job.g) + row * n;
    T* dx = static_cast<T*>(job.out) + row * n;
    const A* scale = parameter(job.scale, row);
    const Statistic<A> s = statistic(row);
    const A r = rstd<A>(job, s.m2);
    A h = 0, hx = 0;
    for (int64_t d = 0, at = 0; d < view.D; ++d, at += view.P) {
      const auto [of_g, of_gx] = row_gradient_sums<T, U>(x + row * n + at, g + at, view.P, s, r, Same<A>(1));
      dscale[d] += of_gx, dbias[d] += of_g;
      h += scale[d] * of_g, hx += scale[d] * of_gx;
    }
    const Same<A> from(s.mean_hi), rest(s.mean_lo), by(r), first(job.centered ? h / A(n) : A(0)), second(hx / A(n));
    for (int64_t d = 0, at = 0; d < view.D; ++d, at += view.P)
      gradient_lines<T, U, nontemporal, 1>(x + row * n + at, g + at, dx + at, view.P, 0, 0, from, rest, by, first, second,
                                      Same<A>(scale[d]));
  }

  void backward(int64_t first, int64_t last, A* dscale, A* dbias) const {
    constexpr int together = 4;
    each_set(first, last, view.P == 1 ? together : 1, [](int64_t, int64_t) {}, [&](int64_t row, int rows) {
      const int64_t group = row % view.G * view.D;
      const bool nontemporal = can_store_nontemporal<T, A>(job, static_cast<T*>(job.out) + row * n, view.P == 1 ? n : view.P);
      if (view.P > 1) {
        if (nontemporal) backward_runs<true>(row, dscale + group, dbias + group);
        else backward_runs<false>(row, dscale + group, dbias + group);
      } else if (rows == together) {
        if (nontemporal) backward_each<true, together>(row, dscale + group, dbias + group);
        else backward_each<false, together>(row, dscale + group, dbias + group);
      } else {
        for (int k = 0; k < rows; ++k) backward_each<false, 1>(row + k, dscale + group, dbias + group);
      }
    });
    fence(job);
  }

  template <Part part> void backward_part(int64_t first, int64_t last, A* dscale, A* dbias, A* h, A* hx) const {
    constexpr int together = 4;
    each_set(first, last, together, [](int64_t, int64_t) {}, [&](int64_t row, int rows) {
      const int64_t group = part == dx_alone ? 0 : row % view.G * view.D;
      const bool nontemporal = part == dx_alone && can_store_nontemporal<T, A>(job, static_cast<T*>(job.out) + row * n, n);
      if (rows == together && share(row, rows)) {
        if (nontemporal) backward_each<true, together, part>(row, dscale + group, dbias + group, h, hx);
        else backward_each<false, together, part>(row, dscale + group, dbias + group, h, hx);
      } else {
        for (int k = 0; k < rows; ++k)
          backward_each<false, 1, part>(row + k * apart(), dscale + group, dbias + group, h, hx);
      }
    });
    fence(job);
  }
};

template <class T, class U, bool given> void rows_forward(const Job& job, int64_t first, int64_t last) {
  if (job.cast_before_scale && sizeof(U) == 2) Rows<T, U, sizeof(U) == 2>{job}.template forward<given>(first, last);
  else Rows<T, U, false>{job}.template forward<given>(first, last);
}

template <class T> void rows_moments(const Job& job, int64_t first, int64_t last) {
  Rows<T, T, false>{job}.moments(first, last);
}

template <class T, class U, class A = typename accumulator<T>::type>
void rows_backward(const Job& job, int64_t first, int64_t last, A* dscale, A* dbias) {
  Rows<T, U, false>{job}.backward(first, last, dscale, dbias);
}

// The two halves of it, for rows of one run each (P == 1).
template <class T, class U, class A = typename accumulator<T>::type>
void rows_gradient_sums(const Job& job, int64_t first, int64_t last, A* dscale, A* dbias, A* h, A* hx) {
  Rows<T, U, false>{job}.template backward_part<Rows<T, U, false>::sums_alone>(first, last, dscale, dbias, h, hx);
}
template <class T, class U, class A = typename accumulator<T>::type>
void rows_gradient(const Job& job, int64_t first, int64_t last, A* h, A* hx) {
  Rows<T, U, false>{job}.template backward_part<Rows<T, U, false>::dx_alone>(first, last, nullptr, nullptr, h, hx);
}
