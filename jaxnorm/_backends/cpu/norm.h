// A whole norm: how its work is cut into tasks, and what is done between the passes. For every instruction set alike.
//
// The cuts depend on shapes alone, never on the number of threads or on which thread was first, and partial sums are
// joined in the order of the cuts, in double: equal inputs give equal bits, and long columns lose nothing.
#pragma once

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "parallel.h"
#include "scratch.h"
#include "view.h"

namespace jaxnorm {

template <class A> class Norm {
  using Vector = std::vector<A, Aligned<A>>;
  using Doubles = std::vector<double, Aligned<double>>;

 public:
  Norm(Job job, const Kernels<A>& kernels, const Threads& threads)
      : job_(job),
        view_(job_.view),
        kernels_(job.weighting == Weighting::none ? kernels : *kernels.weighted),
        threads_(view_.size() < serial ? alone_ : threads) {
    job_.plain = &kernels;
    if (!job_.scale) ones_.assign(view_.parameters(), A(1)), job_.scale = ones_.data();
    if (!job_.bias) zeros_.assign(view_.parameters(), A(0)), job_.bias = zeros_.data();
  }

  // Statistics and y in one go.
  void forward() {
    if (view_.size() == 0) return no_moments();
    if (view_.S == 1) return each_rows(kernels_.rows_forward);
    each_slab([&](int64_t slab, const Threads& threads) {
      moments(slab, threads);
      normalize(slab, threads);
    });
  }

  // The same of rows, y in 8 bits.
  void quantize(const Quantizer& quantizer) {
    each_rows([&](const Job& job, int64_t first, int64_t last) {
      std::vector<float, Aligned<float>> scratch(view_.row());
      kernels_.rows_quantize(job, quantizer, first, last, scratch.data());
    });
  }

  // Statistics alone, and y from statistics that are given.
  void moments() {
    if (view_.size() == 0) return no_moments();
    if (view_.S == 1) return each_rows(kernels_.rows_moments);
    each_slab([&](int64_t slab, const Threads& threads) { moments(slab, threads); });
  }
  void normalize() {
    if (view_.S == 1) return each_rows(kernels_.rows_normalize);
    each_slab([&](int64_t slab, const Threads& threads) { normalize(slab, threads); });
  }

  // dx, and the sums (B, G, D) of g xhat and of g.
  void backward(A* dscale, A* dbias) {
    if (view_.S == 1)
      return rows_with_partial(dscale, dbias, [&](int64_t first, int64_t last, A* ds, A* db) {
        kernels_.rows_backward(job_, first, last, ds, db);
      });
    with_partial(dscale, dbias, [&](int64_t first, int64_t last, const Threads& threads, double* ds, double* db) {
      Vector h(view_.G), hx(view_.G);
      for (int64_t slab = first; slab < last; ++slab) {
        Tables t = tables(slab);
        gradient_sums(slab, threads, t, h.data(), hx.data(), ds, db);
        gradient(slab, threads, t, h.data(), hx.data());
      }
    });
  }

  // The two halves of it: the sums (B, N, G) of h = g scale and of h xhat with those for scale and bias, and dx from
  // such sums, which may be over more devices than this one.
  void gradient_sums(A* h, A* hx, A* dscale, A* dbias) {
    std::fill_n(h, view_.statistics(), A(0)), std::fill_n(hx, view_.statistics(), A(0));
    if (view_.S == 1 && view_.P == 1)
      return rows_with_partial(dscale, dbias, [&](int64_t first, int64_t last, A* ds, A* db) {
        kernels_.rows_gradient_sums(job_, first, last, ds, db, h, hx);
      });
    with_partial(dscale, dbias, [&](int64_t first, int64_t last, const Threads& threads, double* ds, double* db) {
      for (int64_t slab = first; slab < last; ++slab)
        gradient_sums(slab, threads, tables(slab), h + slab * view_.G, hx + slab * view_.G, ds, db);
    });
  }
  void gradient(A* h, A* hx) {
    if (view_.S == 1 && view_.P == 1)
      return each_rows([&](const Job& job, int64_t first, int64_t last) {
        kernels_.rows_gradient(job, first, last, h, hx);
      });
    each_slab([&](int64_t slab, const Threads& threads) {
      Tables t = tables(slab);
      gradient(slab, threads, t, h + slab * view_.G, hx + slab * view_.G);
    });
  }

 private:
  static constexpr int64_t serial = 1 << 14;  // up to this many elements one thread is as fast as several
  static constexpr int64_t cut = 1 << 15;     // elements of a task at least: what its own overhead is small beside
  static constexpr int64_t most = 64;         // tasks at the most, where the cut allows
  static constexpr int64_t width_cut = 512;   // columns of a task: what there is for each stays in the first cache
  static constexpr int64_t longest = 1024;    // lines of a task: a longer chain of terms that round alike drifts
  static constexpr int64_t far = 2048;        // elements to fetch ahead of a line, which ends and goes on elsewhere
  static constexpr int64_t samples = 64;      // lines that the mean_hi of a slab is taken from, by elements of a group

  static int64_t parts(int64_t n, int64_t step) { return (n + step - 1) / step; }
  static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
  int64_t task_size() const { return std::max(cut, view_.size() / most); }
  int64_t per_task(int64_t each) const { return std::max<int64_t>(1, task_size() / std::max<int64_t>(1, each)); }

  bool slabs_in_parallel() const { return view_.B * view_.N >= 2 * 8; }

  // run(job, first, last) over all rows.
  template <class Run> void each_rows(Run run) {
    const int64_t rows = view_.size() == 0 ? 0 : view_.B * view_.N * view_.G, step = per_task(view_.row());
    threads_.each(parts(rows, step), [&](int64_t i) { run(job_, i * step, std::min(rows, (i + 1) * step)); });
  }

  // run(first, last, dscale, dbias) over rows [first, last), in chains so short that they do not drift.
  template <class Run> void rows_with_partial(A* dscale, A* dbias, Run run) {
    with_partial(dscale, dbias, [&](int64_t first, int64_t last, const Threads&, double* ds, double* db) {
      const int64_t width = padded(view_.columns());
      Vector part(2 * width);
      for (int64_t i = first; i < last; i += longest) {
        std::fill(part.begin(), part.end(), A(0));
        run(i * view_.G, std::min(last, i + longest) * view_.G, &part[0], &part[width]);
        for (int64_t k = 0; k < view_.columns(); ++k) ds[k] += part[k], db[k] += part[width + k];
      }
    });
  }

  // Slabs are tasks of their own where there are many, and are cut into lines and columns where there are few.
  template <class Run> void each_slab(Run run) {
    if (view_.size() == 0) return;
    const int64_t slabs = view_.B * view_.N;
    if (!slabs_in_parallel()) {
      for (int64_t slab = 0; slab < slabs; ++slab) run(slab, threads_);
      return;
    }
    const int64_t step = per_task(view_.slab());
    threads_.each(parts(slabs, step), [&](int64_t i) {
      for (int64_t slab = i * step; slab < std::min(slabs, (i + 1) * step); ++slab) run(slab, alone_);
    });
  }

  // Of no elements: every statistic is 0.
  void no_moments() {
    for (void* a : {job_.mean_hi, job_.mean_lo, job_.m2, job_.counts})
      if (a) std::fill_n(static_cast<A*>(a), view_.statistics(), A(0));
  }

  // run(first, last, threads, dscale, dbias) over examples [first, last) that share their parameters, each run with
  // sums of its own, which are joined.
  template <class Run> void with_partial(A* dscale, A* dbias, Run run) {
    std::fill_n(dscale, view_.parameters(), A(0)), std::fill_n(dbias, view_.parameters(), A(0));
    if (view_.size() == 0) return;
    const bool cut_slabs = view_.S > 1 && !slabs_in_parallel();  // then the threads are inside a slab
    const int64_t examples = cut_slabs ? view_.N : per_task(view_.slab()), cuts = parts(view_.N, examples);
    const int64_t width = view_.columns();
    Doubles partial(view_.B * cuts * 2 * width);
    (cut_slabs ? alone_ : threads_).each(view_.B * cuts, [&](int64_t i) {
      const int64_t b = i / cuts, first = b * view_.N + i % cuts * examples;
      double* sums = partial.data() + i * 2 * width;
      run(first, std::min((b + 1) * view_.N, first + examples), cut_slabs ? threads_ : alone_, sums, sums + width);
    });
    for (int64_t b = 0; b < view_.B; ++b) {
      const double* first = partial.data() + b * cuts * 2 * width;
      const Doubles ds = join(first, cuts, 2 * width), db = join(first + width, cuts, 2 * width);
      std::copy(ds.begin(), ds.end(), dscale + b * width), std::copy(db.begin(), db.end(), dbias + b * width);
    }
  }

  // A slab in blocks of lines by columns: so small that sums of one block are short chains, which rounds them little.
  struct Blocks {
    int64_t lines, columns, down, across, ahead;
    int64_t count() const { return down * across; }
    Block operator()(const View& v, int64_t slab, int64_t i) const {
      const int64_t line = i / across * lines, column = i % across * columns;
      return {slab, line, 1, std::min(lines, v.S - line), column, std::min(v.columns(), column + columns), ahead};
    }
  };
  Blocks blocks() const {
    Blocks b;
    b.columns = view_.P == 1 ? width_cut : std::max<int64_t>(1, 16 * width_cut / view_.P);
    b.columns = std::min(b.columns, view_.columns());
    const int64_t size = std::min(task_size(), int64_t(1) << 18);
    b.lines = std::min({view_.S, longest, std::max<int64_t>(1, size / (b.columns * view_.P))});
    b.ahead = parts(far, 4 * view_.line()) * 4 * view_.line();
    b.down = parts(view_.S, b.lines), b.across = parts(view_.columns(), b.columns);
    return b;
  }

  // Sums for each column, two or three of them, over all blocks of a slab, in the order of the blocks.
  template <int number, class Run> std::array<Doubles, number> sums(int64_t slab, const Threads& threads, Run run) {
    const Blocks cuts = blocks();
    const int64_t width = padded(view_.columns()), stride = number * width;
    Vector partial(cuts.down * stride);
    threads.each(cuts.count(), [&](int64_t i) {
      run(cuts(view_, slab, i), &partial[i / cuts.across * stride], width);
    });
    std::array<Doubles, number> total;
    for (int i = 0; i < number; ++i) total[i] = join(partial.data() + i * width, cuts.down, stride);
    return total;
  }

  // For each column the sum of the cuts' partial sums, in their order.
  template <class Sum> Doubles join(const Sum* partial, int64_t cuts, int64_t stride) const {
    Doubles total(view_.columns());
    for (int64_t i = 0; i < cuts; ++i)
      for (int64_t k = 0; k < view_.columns(); ++k) total[k] += double(partial[i * stride + k]);
    return total;
  }

  // The sums of each group's D columns, of values `weight` times as large where a weight is given.
  template <class Columns> Doubles by_group(const Columns& columns, const A* weight = nullptr) const {
    Doubles total(view_.G);
    for (int64_t g = 0; g < view_.G; ++g)
      for (int64_t d = 0; d < view_.D; ++d)
        total[g] += double(columns[g * view_.D + d]) * (weight ? double(weight[g * view_.D + d]) : 1.0);
    return total;
  }

  A* statistics(void* of, int64_t slab) const { return static_cast<A*>(of) + slab * view_.G; }

  // In one pass about a mean_hi near the mean, again about the mean itself where the mean_hi was not near enough.
  void moments(int64_t slab, const Threads& threads) {
    if (job_.weighting == Weighting::none) moments<2>(slab, threads);
    else moments<3>(slab, threads);
  }

  // With two sums for each column, of which all elements count alike; or three, the last of which are the counts.
  template <int number> void moments(int64_t slab, const Threads& threads) {
    A *mean_hi = statistics(job_.mean_hi, slab), *mean_lo = statistics(job_.mean_lo, slab), *m2 = statistics(job_.m2, slab);
    std::fill_n(mean_hi, view_.G, A(0)), std::fill_n(mean_lo, view_.G, A(0)), std::fill_n(m2, view_.G, A(0));
    if (number == 3) std::fill_n(statistics(job_.counts, slab), view_.G, A(0));
    if (view_.count() == 0) return;
    if (job_.centered) sample(slab, mean_hi);
    bool done = false;
    for (bool again = false; !done; again = true) {
      const Vector about = spread(mean_hi);
      const auto in_prescale = [&](A prescale) {
        return sums<number>(slab, threads, [&](const Block& b, A* s, int64_t width) {
          A* count = number == 3 ? s + 2 * width : nullptr;
          kernels_.sums(job_, b, view_.P, prescale, about.data(), s, s + width, count);
        });
      };
      std::array<Doubles, number> all = in_prescale(A(1));
      Doubles& square = all[1];
      const auto count_of = [&](size_t k) { return number == 3 ? all[number - 1][k] : double(view_.S * view_.P); };
      for (const double prescale : {small_prescale, large_prescale}) {
        const auto needs = [&](size_t k) { return prescale_for<A>(job_, square[k], count_of(k)) == prescale; };
        bool any = false;
        for (size_t k = 0; k < square.size(); ++k) any = any || needs(k);
        if (!any) continue;
        const std::array<Doubles, number> scaled = in_prescale(A(prescale));
        for (size_t k = 0; k < square.size(); ++k)
          if (needs(k)) square[k] = scaled[1][k] / (prescale * prescale);
      }
      const Doubles s = by_group(all[0]), q = by_group(square), n = by_group(all[number - 1]);
      done = true;
      for (int64_t g = 0; g < view_.G; ++g) {
        const double count = number == 3 ? n[g] : double(view_.count());
        if (number == 3) statistics(job_.counts, slab)[g] = A(count);
        Statistic<A> one{mean_hi[g], mean_lo[g], m2[g]};
        if (count == 0) one = {0, 0, 0};
        else if (!finalize(job_, count, s[g], q[g], again, one)) done = false;
        mean_hi[g] = one.mean_hi, mean_lo[g] = one.mean_lo, m2[g] = one.m2;
      }
    }
  }

  // The mean of some evenly spaced lines, and of the first pixels of their planes: of lines that are there. Where none of
  // these elements is, it is 0, and the sums may have to be made again.
  void sample(int64_t slab, A* mean_hi) {
    const int64_t lines = std::min(view_.S, std::max<int64_t>(1, samples / view_.D)), step = view_.S / lines;
    const int64_t run = view_.P == 1 ? 1 : std::min<int64_t>(view_.P, 64);
    const Vector zero(view_.columns());
    Vector total(view_.columns()), square(view_.columns()), count(view_.columns());
    const auto add = [&](int64_t first, int64_t number) {
      const Block some{slab, first, step, number, 0, view_.columns(), 0};
      kernels_.sums(job_, some, run, A(1), zero.data(), total.data(), square.data(), count.data());
    };
    if (job_.weighting == Weighting::lines) {
      for (const int64_t line : present_lines(slab, lines)) add(line, 1);
    } else {
      add(0, lines);
    }
    const Doubles s = by_group(total), n = by_group(count);
    const bool counted = job_.weighting != Weighting::none;
    for (int64_t g = 0; g < view_.G; ++g) {
      if (counted) mean_hi[g] = n[g] == 0 ? A(0) : A(s[g] / n[g]);
      else mean_hi[g] = A(s[g] / double(lines * run * view_.D));
    }
  }

  // At most so many lines whose weight is not 0, evenly spaced among those.
  std::vector<int64_t> present_lines(int64_t slab, int64_t most) const {
    const A* weights = static_cast<const A*>(job_.weights) + slab * view_.S;
    const int64_t present = view_.S - std::count(weights, weights + view_.S, A(0));
    const int64_t step = std::max<int64_t>(1, present / most);
    std::vector<int64_t> lines;
    for (int64_t line = 0, left = 0; line < view_.S && int64_t(lines.size()) < most; ++line) {
      if (weights[line] == 0 || left-- > 0) continue;
      lines.push_back(line), left = step - 1;
    }
    return lines;
  }

  // A value for each column from one for each group.
  Vector spread(const A* groups) const {
    Vector columns(view_.columns());
    for (int64_t g = 0; g < view_.G; ++g) std::fill_n(&columns[g * view_.D], view_.D, groups[g]);
    return columns;
  }

  // The columns of one slab, with backend for what its tables point at.
  struct Tables {
    Vector mean_hi, mean_lo, r, mean_h, mean_hx, zero;
    Columns<A> columns;
  };
  Tables tables(int64_t slab) const {
    Tables t;
    t.mean_hi = spread(statistics(job_.mean_hi, slab)), t.mean_lo = spread(statistics(job_.mean_lo, slab));
    Vector r(view_.G);
    for (int64_t g = 0; g < view_.G; ++g) r[g] = rstd<A>(job_, statistics(job_.m2, slab)[g], count_of(slab, g));
    t.r = spread(r.data());
    const int64_t at = slab / view_.N * view_.columns();
    t.columns = {t.mean_hi.data(), t.mean_lo.data(), t.r.data(), static_cast<const A*>(job_.scale) + at,
                 static_cast<const A*>(job_.bias) + at, nullptr, nullptr};
    if (job_.counts) t.zero.assign(view_.columns(), A(0)), t.columns.zero = t.zero.data();
    t.columns.empty = job_.counts != nullptr;
    for (int64_t g = 0; g < view_.G; ++g) t.columns.empty = t.columns.empty && count_of(slab, g) == 0;
    return t;
  }
  double count_of(int64_t slab, int64_t g) const {
    return job_.counts ? double(statistics(job_.counts, slab)[g]) : job_.count;
  }

  // Iterate backwards: the summation pass left the end of the slab in cache. If one thread owns the whole slab, prefetch
  // its next slab.
  template <class Run> void each_block(int64_t slab, const Threads& threads, Run run) {
    Blocks cuts = blocks();
    if (slabs_in_parallel()) cuts.ahead = (per_task(view_.slab()) == 1 ? threads_.count() : 1) * view_.slab();
    const int64_t n = cuts.count();
    threads.each(n, [&](int64_t i) { run(cuts(view_, slab, n - 1 - i)); });
  }

  void normalize(int64_t slab, const Threads& threads) {
    const Tables t = tables(slab);
    each_block(slab, threads, [&](const Block& b) { kernels_.normalize(job_, b, t.columns); });
  }

  void gradient_sums(int64_t slab, const Threads& threads, const Tables& t, A* h, A* hx, double* dscale,
                     double* dbias) {
    const auto [gx, g] = sums<2>(slab, threads, [&](const Block& b, A* of_gx, int64_t width) {
      kernels_.gradient_sums(job_, b, t.columns, of_gx, of_gx + width);
    });
    for (int64_t k = 0; k < view_.columns(); ++k) dscale[k] += gx[k], dbias[k] += g[k];
    const Doubles of_h = by_group(g, t.columns.scale), of_hx = by_group(gx, t.columns.scale);
    for (int64_t i = 0; i < view_.G; ++i) h[i] = A(of_h[i]), hx[i] = A(of_hx[i]);
  }

  void gradient(int64_t slab, const Threads& threads, Tables& t, const A* h, const A* hx) {
    Vector mean_h(view_.G), mean_hx(view_.G);
    for (int64_t i = 0; i < view_.G; ++i) {
      const double count = count_of(slab, i);
      if (count > 0) mean_h[i] = job_.centered ? A(h[i] / count) : A(0), mean_hx[i] = A(hx[i] / count);
    }
    t.mean_h = spread(mean_h.data()), t.mean_hx = spread(mean_hx.data());
    t.columns.mean_h = t.mean_h.data(), t.columns.mean_hx = t.mean_hx.data();
    each_block(slab, threads, [&](const Block& b) { kernels_.gradient(job_, b, t.columns); });
  }

  Job job_;
  const View view_;
  const Kernels<A>& kernels_;
  const Threads alone_ = Threads::none();
  const Threads& threads_;
  Vector ones_, zeros_;
};

}  // namespace jaxnorm
