// Rows and slabs where elements have weights, for x and y of any type. Part of kernels.h.
//
// These loops get numbers of type A (tiles.h), so they are compiled once for each A. Rows and lines of weight 1 go to the
// loops without weights. Rows that are absent as a whole give the bias, and x is not read there.

#include "tiles.h"
#include "weighted_loops.h"

template <class A> struct Weighted : WeightedLoops<A> {
  using Loops = WeightedLoops<A>;
  using typename Loops::Sums;
  using T = Tile<A>;
  using Loops::add, Loops::add_column_gradient_sums, Loops::add_column_sums, Loops::add_row_gradient_sums;
  using Loops::add_run_gradient_sums, Loops::add_run_sums, Loops::gradient_tile, Loops::normalize_tile;

  // --- rows -----------------------------------------------------------------------------------------------------------

  struct RowArrays {
    const Job& job;
    const View& view = job.view;
    const int64_t n = view.row();
    A *mean_hi = static_cast<A*>(job.mean_hi), *mean_lo = static_cast<A*>(job.mean_lo), *m2 = static_cast<A*>(job.m2);
    A* counts = static_cast<A*>(job.counts);

    const A* parameter(const void* table, int64_t row) const {
      return static_cast<const A*>(table) + (row / (view.N * view.G) * view.G + row % view.G) * view.D;
    }
    void keep(int64_t row, Statistic<A> s, A count) const {
      mean_hi[row] = s.mean_hi, mean_lo[row] = s.mean_lo, m2[row] = s.m2, counts[row] = count;
    }
    // Whether all of a row counts alike: 1 where it is present, 0 where it is absent, -1 where it is neither.
    int presence(int64_t row) const {
      const auto* bytes = static_cast<const uint8_t*>(job.weights);
      if (job.weighting == Weighting::rows) return bytes[row];
      if (job.weighting != Weighting::bytes) return -1;
      const uint8_t* of_row = bytes + row * n;
      return __builtin_memchr(of_row, 1 - of_row[0], size_t(n)) ? -1 : of_row[0];
    }
    // present(first, last) of runs of rows that are, and other(row, is absent) of all others.
    template <class Present, class Other>
    JN_INLINE void by_presence(int64_t first, int64_t last, Present present, Other other) const {
      for (int64_t begun = first, row = first; row <= last; ++row) {
        const int kind = row < last ? presence(row) : 0;
        if (kind == 1) continue;
        if (begun < row) present(begun, row);
        if (row < last) other(row, kind == 0);
        begun = row + 1;
      }
    }
  };

  // The mean of the first few elements that are present.
  static A first_present(Tiles<A>& tiles, int64_t at, int64_t n) {
    constexpr int few = 16 / sizeof(A), some = 64;
    A total = 0;
    int taken = 0;
    for (int64_t i = 0; i < n && taken < few; i += some)
      tiles.over_runs(at + i, 1, n - i < some ? n - i : some, 0, [&](int64_t, int64_t, int64_t, int64_t size, const T& t) {
        for (int64_t k = 0; k < size && taken < few; ++k)
          if (t.w[k] != 0) total += t.x[k], ++taken;
      });
    return taken ? total / A(taken) : A(0);
  }

  static Statistic<A> row_statistic(const Job& job, Tiles<A>& tiles, int64_t at, int64_t n, A& count) {
    Statistic<A> s{0, 0, 0};
    if (job.centered) s.mean_hi = first_present(tiles, at, n);
    const auto sums_in = [&](A prescale) {
      Sums sums;
      tiles.over_runs(at, 1, n, 0, [&](int64_t, int64_t, int64_t, int64_t size, const T& t) {
        add_run_sums(t, size, s.mean_hi, prescale, sums);
      });
      return sums;
    };
    for (bool again = false;; again = true) {
      Sums sums = sums_in(1);
      count = A(sums.count);
      if (sums.count == 0) return {0, 0, 0};
      if (const double prescale = prescale_for<A>(job, sums.second, sums.count); prescale != 1)
        sums.second = sums_in(A(prescale)).second / (prescale * prescale);
      if (finalize(job, sums.count, sums.first, sums.second, again, s)) return s;
    }
  }

  static void rows_moments(const Job& job, int64_t first, int64_t last) {
    const RowArrays rows{job};
    Tiles<A> tiles(job, false);
    tiles.ahead = rows.n;
    for (int64_t row = first; row < last; ++row) {
      A count = 0;
      const Statistic<A> s = row_statistic(job, tiles, row * rows.n, rows.n, count);
      rows.keep(row, s, count);
    }
  }

  // y from the statistics of a row.
  static void normalize_row(const Job& job, const RowArrays& rows, Tiles<A>& tiles, int64_t row) {
    const View& view = job.view;
    const Same<A> from(rows.mean_hi[row]), rest(rows.mean_lo[row]), by(rstd<A>(job, rows.m2[row], rows.counts[row]));
    const A *scale = rows.parameter(job.scale, row), *bias = rows.parameter(job.bias, row);
    tiles.writes = true;
    if (view.P == 1)
      tiles.over_runs(row * rows.n, 1, rows.n, 0, [&](int64_t, int64_t, int64_t start, int64_t size, const T& t) {
        normalize_tile(tiles, t, 1, size, from, rest, by, Each<A>{scale + start}, Each<A>{bias + start});
      });
    else
      tiles.over_runs(row * rows.n, view.D, view.P, view.P, [&](int64_t d, int64_t runs, int64_t, int64_t size, const T& t) {
        for (int64_t i = 0; i < runs; ++i)
          normalize_tile(tiles, t.after(i), 1, size, from, rest, by, Same<A>(scale[d + i]), Same<A>(bias[d + i]));
      });
    tiles.writes = false;
  }

  static void rows_forward(const Job& job, int64_t first, int64_t last) {
    const RowArrays rows{job};
    Tiles<A> tiles(job, false);
    tiles.ahead = rows.n;
    const auto present = [&](int64_t from, int64_t to) {
      tiles.plain.rows_forward(job, from, to);
      for (int64_t row = from; row < to; ++row) rows.counts[row] = A(rows.n);
    };
    rows.by_presence(first, last, present, [&](int64_t row, bool absent) {
      A count = 0;
      Statistic<A> s{0, 0, 0};
      tiles.absent = absent;
      if (!absent) s = row_statistic(job, tiles, row * rows.n, rows.n, count);
      rows.keep(row, s, count);
      if (absent && job.view.P == 1) return tiles.put(rows.parameter(job.bias, row), row * rows.n, rows.n);
      normalize_row(job, rows, tiles, row);
    });
    fence(job);
  }

  static void rows_normalize(const Job& job, int64_t first, int64_t last) {
    const RowArrays rows{job};
    Tiles<A> tiles(job, false);
    tiles.ahead = rows.n;
    for (int64_t row = first; row < last; ++row) normalize_row(job, rows, tiles, row);
    fence(job);
  }

  // Of a row: the sums of g scale xhat and g scale, with those for scale and bias ...
  static Pair<double> row_gradient_sums(const Job& job, const RowArrays& rows, Tiles<A>& tiles, int64_t row, A* dscale, A* dbias) {
    const View& view = job.view;
    const A mean_hi = rows.mean_hi[row], mean_lo = rows.mean_lo[row], r = rstd<A>(job, rows.m2[row], rows.counts[row]);
    const A* scale = rows.parameter(job.scale, row);
    Pair<double> total{0, 0};
    if (view.P == 1 && tiles.absent)
      tiles.over_runs(row * rows.n, 1, rows.n, 0, [&](int64_t, int64_t, int64_t start, int64_t size, const T& t) {
        add(t, size, dbias + start);
      });
    else if (view.P == 1)
      tiles.over_runs(row * rows.n, 1, rows.n, 0, [&](int64_t, int64_t, int64_t start, int64_t size, const T& t) {
        add_row_gradient_sums(t, size, mean_hi, mean_lo, r, scale + start, total, dscale + start, dbias + start);
      });
    else
      tiles.over_runs(row * rows.n, view.D, view.P, view.P, [&](int64_t d, int64_t runs, int64_t, int64_t size, const T& t) {
        for (int64_t i = 0; i < runs; ++i) {
          Pair<double> of{0, 0};
          add_run_gradient_sums(t.after(i), size, mean_hi, mean_lo, r, of);
          dscale[d + i] += A(of.first), dbias[d + i] += A(of.second);
          total.first += scale[d + i] * of.first, total.second += scale[d + i] * of.second;
        }
      });
    return total;
  }

  // ... and dx from them, which may be over more devices than this one.
  static void row_gradient(const Job& job, const RowArrays& rows, Tiles<A>& tiles, int64_t row, double sum_hx, double sum_h) {
    const View& view = job.view;
    const A count = rows.counts[row];
    const Same<A> from(rows.mean_hi[row]), rest(rows.mean_lo[row]), by(rstd<A>(job, rows.m2[row], count));
    const Same<A> h(job.centered && count != 0 ? A(sum_h / count) : A(0)), hx(count != 0 ? A(sum_hx / count) : A(0));
    const A* scale = rows.parameter(job.scale, row);
    tiles.writes = true;
    if (view.P == 1)
      tiles.over_runs(row * rows.n, 1, rows.n, 0, [&](int64_t, int64_t, int64_t start, int64_t size, const T& t) {
        gradient_tile(t, 1, size, from, rest, by, h, hx, Each<A>{scale + start});
      });
    else
      tiles.over_runs(row * rows.n, view.D, view.P, view.P, [&](int64_t d, int64_t runs, int64_t, int64_t size, const T& t) {
        for (int64_t i = 0; i < runs; ++i)
          gradient_tile(t.after(i), 1, size, from, rest, by, h, hx, Same<A>(scale[d + i]));
      });
    tiles.writes = false;
  }

  static void rows_backward(const Job& job, int64_t first, int64_t last, A* dscale, A* dbias) {
    const RowArrays rows{job};
    Tiles<A> tiles(job, true);
    tiles.ahead = rows.n;
    const auto present = [&](int64_t from, int64_t to) { tiles.plain.rows_backward(job, from, to, dscale, dbias); };
    rows.by_presence(first, last, present, [&](int64_t row, bool absent) {
      tiles.absent = absent;
      const int64_t group = row % job.view.G * job.view.D;
      const auto [hx, h] = row_gradient_sums(job, rows, tiles, row, dscale + group, dbias + group);
      if (absent) tiles.zero(row * rows.n, rows.n);
      else row_gradient(job, rows, tiles, row, hx, h);
    });
    fence(job);
  }
  static void rows_gradient_sums(const Job& job, int64_t first, int64_t last, A* dscale, A* dbias, A* h, A* hx) {
    const RowArrays rows{job};
    Tiles<A> tiles(job, true);
    tiles.ahead = rows.n;
    for (int64_t row = first; row < last; ++row) {
      const int64_t group = row % job.view.G * job.view.D;
      const auto [of_hx, of_h] = row_gradient_sums(job, rows, tiles, row, dscale + group, dbias + group);
      h[row] = A(of_h), hx[row] = A(of_hx);
    }
  }
  static void rows_gradient(const Job& job, int64_t first, int64_t last, A* h, A* hx) {
    const RowArrays rows{job};
    Tiles<A> tiles(job, true);
    tiles.ahead = rows.n;
    for (int64_t row = first; row < last; ++row) row_gradient(job, rows, tiles, row, hx[row], h[row]);
    fence(job);
  }

  // --- slabs ----------------------------------------------------------------------------------------------------------

  // The lines of a block. Where lines have a weight each, long runs of the same weight go to plain(block, weight) if that
  // is 1 or 0 and it returns true. All others go to run(column, runs, size, tile): a run is a line where P is 1, and else
  // the first `length` elements of a plane.
  template <class Plain, class Run>
  static JN_INLINE void over_lines(const Job& job, const Block& b, int64_t length, Tiles<A>& tiles, Plain plain, Run run) {
    const View& view = job.view;
    const int64_t line = b.step * view.line(), width = b.end - b.begin;
    const int64_t start = b.slab * view.slab() + b.first * view.line() + b.begin * view.P;
    tiles.ahead = view.P == 1 ? b.ahead : 0;
    const auto tile_by_tile = [&](int64_t first, int64_t lines, const A* w) {
      if (view.P == 1)
        return tiles.over_runs(
            start + first * line, lines, width, line,
            [&](int64_t, int64_t runs, int64_t at, int64_t size, const T& t) { run(b.begin + at, runs, size, t); }, w, b.step);
      for (int64_t i = first; i < first + lines; ++i, w += w ? b.step : 0)
        tiles.over_runs(
            start + i * line, width, length, view.P,
            [&](int64_t k, int64_t runs, int64_t, int64_t size, const T& t) { run(b.begin + k, runs, size, t); }, w, 0);
    };
    if (job.weighting != Weighting::lines) return tile_by_tile(0, b.lines, nullptr);

    // As many lines at a time as a tile has: if they have one weight, with those after them that have it as well.
    const A* w = static_cast<const A*>(job.weights) + b.slab * view.S + b.first;
    const int64_t size = width * length, most = Tiles<A>::most, together = size < most ? most / size : 1;
    const auto alike = [&](int64_t from, A weight) {
      int64_t end = from;
      while (end < b.lines && w[end * b.step] == weight) ++end;
      return end - from;
    };
    for (int64_t first = 0, lines; first < b.lines; first += lines) {
      const A weight = w[first * b.step];
      const int64_t least = b.lines - first < together ? b.lines - first : together;
      lines = weight == 0 || weight == 1 ? alike(first, weight) : 0;
      Block some = b;
      some.first += first * b.step, some.lines = lines;
      if (lines >= least && plain(some, weight)) continue;
      if (lines < least) lines = least;
      tile_by_tile(first, lines, w + first * b.step);
    }
  }

  // Whether all x of a block are usable: those that are absent are then normalized like the others.
  static bool are_usable(const Job& job, const Block& b) {
    Tiles<A> tiles(job, false);
    bool usable = true;
    over_lines(job, b, job.view.P, tiles, [](const Block&, A) { return false; },
               [&](int64_t, int64_t runs, int64_t n, const T& t) { usable = usable && Loops::are_usable(t, runs, n); });
    return usable;
  }

  static void sums(const Job& job, const Block& b, int64_t length, A prescale, const A* mean_hi, A* total, A* square, A* count) {
    Tiles<A> tiles(job, false);
    const auto plain = [&](const Block& lines, A weight) {
      if (weight == 0) return true;  // they are not read
      tiles.plain.sums(job, lines, length, prescale, mean_hi, total, square, nullptr);
      for (int64_t k = b.begin; k < b.end; ++k) count[k] += A(lines.lines * length);
      return true;
    };
    over_lines(job, b, length, tiles, plain, [&](int64_t k, int64_t runs, int64_t n, const T& t) {
      if (job.view.P == 1) return add_column_sums(t, runs, n, prescale, mean_hi + k, total + k, square + k, count + k);
      for (int64_t i = 0; i < runs; ++i) {
        Sums of;
        add_run_sums(t.after(i), n, mean_hi[k + i], prescale, of);
        total[k + i] += A(of.first), square[k + i] += A(of.second), count[k + i] += A(of.count);
      }
    });
  }

  static void gradient_sums(const Job& job, const Block& b, const Columns<A>& c, A* total_gx, A* total_g) {
    Tiles<A> tiles(job, true);
    tiles.absent = c.empty;
    const auto plain = [&](const Block& lines, A weight) {
      if (weight == 0 && (c.empty || !are_usable(job, lines))) return false;
      tiles.plain.gradient_sums(job, lines, c, total_gx, total_g);
      return true;
    };
    over_lines(job, b, job.view.P, tiles, plain, [&](int64_t k, int64_t runs, int64_t n, const T& t) {
      if (job.view.P == 1) return add_column_gradient_sums(t, runs, n, c, k, total_gx, total_g);
      for (int64_t i = 0; i < runs; ++i) {
        Pair<double> of{0, 0};
        add_run_gradient_sums(t.after(i), n, c.mean_hi[k + i], c.mean_lo[k + i], c.r[k + i], of);
        total_gx[k + i] += A(of.first), total_g[k + i] += A(of.second);
      }
    });
  }

  // run(tables' values from a column on, as they are for a tile; runs; size; tile).
  template <class Run>
  static JN_INLINE void over_outputs(const Job& job, const Block& b, const Columns<A>& c, Tiles<A>& tiles,
                                     void (*const plain)(const Job&, const Block&, const Columns<A>&), Run run) {
    tiles.writes = true, tiles.absent = c.empty;
    const auto lines_alike = [&](const Block& lines, A weight) {
      if (weight == 0 && (c.empty || !are_usable(job, lines))) return false;
      Columns<A> of = c;
      if (weight == 0) of.mean_h = of.mean_hx = c.zero;  // absent elements are in no mean
      return plain(job, lines, of), true;
    };
    over_lines(job, b, job.view.P, tiles, lines_alike, [&](int64_t k, int64_t runs, int64_t n, const T& t) {
      if (job.view.P == 1) return run([&](const A* table) { return Each<A>{table + k}; }, runs, n, t);
      for (int64_t i = 0; i < runs; ++i) run([&](const A* table) { return Same<A>(table[k + i]); }, 1, n, t.after(i));
    });
    fence(job);
  }

  static void normalize(const Job& job, const Block& b, const Columns<A>& c) {
    Tiles<A> tiles(job, false);
    over_outputs(job, b, c, tiles, tiles.plain.normalize, [&](auto of, int64_t runs, int64_t n, const T& t) {
      normalize_tile(tiles, t, runs, n, of(c.mean_hi), of(c.mean_lo), of(c.r), of(c.scale), of(c.bias));
    });
  }

  static void gradient(const Job& job, const Block& b, const Columns<A>& c) {
    Tiles<A> tiles(job, true);
    over_outputs(job, b, c, tiles, tiles.plain.gradient, [&](auto of, int64_t runs, int64_t n, const T& t) {
      gradient_tile(t, runs, n, of(c.mean_hi), of(c.mean_lo), of(c.r), of(c.mean_h), of(c.mean_hx), of(c.scale));
    });
  }

  static constexpr Kernels<A> table{rows_forward,  rows_backward, rows_moments,  rows_normalize, rows_gradient_sums,
                                    rows_gradient, nullptr, sums, gradient_sums, normalize, gradient};
};
