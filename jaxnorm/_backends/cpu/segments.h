// Norms of segments: lines that carry one id share statistics, wherever they lie. y and dx are affine in x, with
// coefficients for each segment and column that come from outside:
//
//     y = u a + b,     dx = r (g a - q - u p),     u = (x - shift) r
//
// For the plain norm these are made here, of a scale and a bias for each column.
//
// Segments are worked on one after the other, each by its runs of lines, so that a second pass finds it in the cache. Where
// runs are short, or segments too few for all threads, they are worked on together: threads have columns or lines.
//
// Tables are (segments + 1, K), K columns. A line with another id than 0 .. segments - 1 is absent, its x is not read, and
// it goes by the last row of a table. Runs of lines of one id are done together by the loops of slabs (kernels.h).
#pragma once

#include <cstring>
#include <limits>

#include "norm.h"

namespace jaxnorm {

template <class A> class Segments {
  using Vector = std::vector<A, Aligned<A>>;
  using Doubles = std::vector<double, Aligned<double>>;

 public:
  Segments(const Job& job, const Kernels<A>& kernels, const Threads& threads, const int32_t* ids, int64_t number)
      : job_(job), view_(job.view), kernels_(kernels), threads_(view_.size() < serial ? alone_ : threads), ids_(ids),
        number_(number), width_(view_.columns()), zeros_(width_, A(0)) {}

  // (segments, G): the statistics, about the mean of each segment's first few lines, again where that was far from the
  // mean of all.
  void moments() const {
    const Order order = order_of();
    if (order.apart) return each_segment(order, [&](int64_t id, int64_t, Scratch& scratch) {
      if (id < number_) moments_of(id, order, scratch);
    });
    A *mean_hi = static_cast<A*>(job_.mean_hi), *mean_lo = static_cast<A*>(job_.mean_lo), *m2 = static_cast<A*>(job_.m2);
    A* counts = static_cast<A*>(job_.counts);
    const int64_t statistics = number_ * view_.G;
    clear_statistics();
    const std::vector<int64_t> lines = lines_of_each();
    for (int64_t i = 0; i < statistics; ++i) counts[i] = A(lines[i / view_.G] * view_.D);
    if (width_ == 0) return;
    std::vector<uint8_t> wanted(number_);
    for (int64_t k = 0; k < number_; ++k) wanted[k] = lines[k] > 0;
    Vector about(number_ * width_);
    if (job_.centered) {
      const Sums first = sums(wanted, lines, about, A(1), few);
      for (int64_t k = 0; k < number_; ++k)
        for (int64_t g = 0; g < view_.G && wanted[k]; ++g)
          mean_hi[k * view_.G + g] = A(by_group(first, 0, k, g) / double(std::min(lines[k], few) * view_.D));
    }
    bool left = true;
    for (bool again = false; left; again = true) {
      left = false;
      for (int64_t k = 0; k < number_; ++k)
        for (int64_t c = 0; c < width_; ++c) about[k * width_ + c] = mean_hi[k * view_.G + c / view_.D];
      Sums all = sums(wanted, lines, about, A(1));
      for (const double prescale : {small_prescale, large_prescale}) {
        std::vector<uint8_t> scaled(number_);
        const auto needs = [&](int64_t k, int64_t g) {
          return prescale_for<A>(job_, by_group(all, 1, k, g), double(counts[k])) == prescale;
        };
        bool any = false;
        for (int64_t k = 0; k < number_; ++k)
          for (int64_t g = 0; g < view_.G && wanted[k]; ++g)
            if (needs(k, g)) any = scaled[k] = 1;
        if (!any) continue;
        const Sums in_range = sums(scaled, lines, about, A(prescale));
        all.squares.resize(statistics, nothing);
        for (int64_t k = 0; k < number_; ++k)
          for (int64_t g = 0; g < view_.G && scaled[k]; ++g)
            if (needs(k, g)) all.squares[k * view_.G + g] = by_group(in_range, 1, k, g) / (prescale * prescale);
      }
      for (int64_t k = 0; k < number_; ++k) {
        bool done = true;
        for (int64_t g = 0, i = k * view_.G; g < view_.G && wanted[k]; ++g, ++i) {
          Statistic<A> one{mean_hi[i], mean_lo[i], m2[i]};
          const double square = all.squares.empty() || all.squares[i] < 0 ? by_group(all, 1, k, g) : all.squares[i];
          if (!finalize(job_, double(counts[i]), by_group(all, 0, k, g), square, again, one)) done = false;
          mean_hi[i] = one.mean_hi, mean_lo[i] = one.mean_lo, m2[i] = one.m2;
        }
        wanted[k] = !done, left = left || !done;
      }
    }
  }

  // Statistics and y of the plain norm in one go.
  void forward() const {
    const Order order = order_of();
    const A *scale = static_cast<const A*>(job_.scale), *bias = static_cast<const A*>(job_.bias);
    if (order.apart) return each_segment(order, [&](int64_t id, int64_t, Scratch& scratch) {
      if (id < number_) moments_of(id, order, scratch);
      each_run(order, id, [&](const Run& run, int64_t ahead) {
        if (id == number_) return put(bias, run.first, run.lines);
        kernels_.normalize(storing(run), block(run.first, run.lines, ahead), scratch.columns(*this, id, scale, bias));
      });
    });
    moments();
    const Tables t = tables();
    each_part([&](int64_t id, int64_t first, int64_t lines) {
      if (id == number_) return put(bias, first, lines);
      kernels_.normalize(job_, block(first, lines), t.columns(id * width_, scale, bias));
    });
  }

  // dx of the plain norm, and for each column the sums of g xhat and of g.
  void backward(A* dscale, A* dbias) const {
    const Order order = order_of();
    const A* scale = static_cast<const A*>(job_.scale);
    std::fill_n(dscale, width_, A(0)), std::fill_n(dbias, width_, A(0));
    if (order.apart) {
      Doubles partial(order.tasks() * 2 * width_);
      each_segment(order, [&](int64_t id, int64_t task, Scratch& scratch) {
        gradient_sums_of(id, order, scratch, id < number_ ? scratch.columns(*this, id, scale, scale) : Columns<A>{});
        double* into = partial.data() + task * 2 * width_;
        for (int64_t c = 0; c < 2 * width_; ++c) into[c] += scratch.total[c];
        if (id < number_) means_of(id, scratch, scale);
        each_run(order, id, [&](const Run& run, int64_t ahead) {
          if (id == number_) return zero(run.first, run.lines);
          kernels_.gradient(storing(run), block(run.first, run.lines, ahead), scratch.columns(*this, id, scale, scale));
        });
      });
      for (int64_t c = 0; c < width_; ++c) {
        double s = 0, b = 0;
        for (int64_t i = 0; i < order.tasks(); ++i)
          s += partial[i * 2 * width_ + c], b += partial[i * 2 * width_ + width_ + c];
        dscale[c] = A(s), dbias[c] = A(b);
      }
      return;
    }
    Tables t = tables();
    Vector gx((number_ + 1) * width_), g((number_ + 1) * width_);
    gradient_sums(t, gx.data(), g.data());
    Doubles ds(width_), db(width_);
    t.mean_h.resize(number_ * width_), t.mean_hx.resize(number_ * width_);
    for (int64_t k = 0; k <= number_; ++k)
      for (int64_t group = 0; group < view_.G; ++group) {
        const int64_t at = k * width_ + group * view_.D, column = group * view_.D;
        double h = 0, hx = 0;
        for (int64_t d = 0; d < view_.D; ++d) {
          ds[column + d] += double(gx[at + d]), db[column + d] += double(g[at + d]);
          h += double(g[at + d]) * double(scale[column + d]), hx += double(gx[at + d]) * double(scale[column + d]);
        }
        const double count = k < number_ ? double(static_cast<const A*>(job_.counts)[k * view_.G + group]) : 0.0;
        if (count == 0) continue;
        std::fill_n(&t.mean_h[at], view_.D, job_.centered ? A(h / count) : A(0));
        std::fill_n(&t.mean_hx[at], view_.D, A(hx / count));
      }
    for (int64_t c = 0; c < width_; ++c) dscale[c] = A(ds[c]), dbias[c] = A(db[c]);
    each_part([&](int64_t id, int64_t first, int64_t lines) {
      if (id == number_) return zero(first, lines);
      kernels_.gradient(job_, block(first, lines), t.columns(id * width_, scale, scale));
    });
  }

  void normalize(const A* shift, const A* r, const A* a, const A* b) const {
    each_part([&](int64_t id, int64_t first, int64_t lines) {
      if (id < number_) kernels_.normalize(job_, block(first, lines), columns(id, shift, r, a, b));
      else put(b + id * width_, first, lines);
    });
  }

  // (segments + 1, K): the sums of g u and of g.
  void gradient_sums(const A* shift, const A* r, A* gu, A* g) const {
    const Order order = order_of();
    if (!order.apart) return gradient_sums(Given{*this, shift, r}, gu, g);
    std::fill_n(gu, (number_ + 1) * width_, A(0)), std::fill_n(g, (number_ + 1) * width_, A(0));
    each_segment(order, [&](int64_t id, int64_t, Scratch& scratch) {
      gradient_sums_of(id, order, scratch, columns(id, shift, r, r, r));
      for (int64_t c = 0; c < width_; ++c)
        gu[id * width_ + c] = A(scratch.total[c]), g[id * width_ + c] = A(scratch.total[width_ + c]);
    });
  }

  void gradient(const A* shift, const A* r, const A* a, const A* p, const A* q) const {
    each_part([&](int64_t id, int64_t first, int64_t lines) {
      if (id == number_) return zero(first, lines);
      Columns<A> c = columns(id, shift, r, a, r);
      c.mean_h = q + id * width_, c.mean_hx = p + id * width_;
      kernels_.gradient(job_, block(first, lines), c);
    });
  }

 private:
  static constexpr int64_t serial = 1 << 14;   // as in norm.h: elements up to which one thread is as fast as several,
  static constexpr int64_t cut = 1 << 15;      // elements of a task,
  static constexpr int64_t longest = 1024;     // and lines of a chain of sums
  static constexpr int64_t strip = 64;         // columns of a task that sums, at least
  static constexpr int64_t far = 2048;         // elements to fetch ahead
  static constexpr int64_t few = 8;            // lines of a segment whose mean is what sums are about
  static constexpr int64_t everything = std::numeric_limits<int64_t>::max();
  static constexpr int64_t most_fetched = 1 << 20;  // bytes of a segment up to which the next one is fetched meanwhile
  static constexpr double nothing = -1;

  struct Sums {
    Vector sum, square;
    Doubles total;    // of those, where chains are long
    Doubles squares;  // for each statistic, where another prescale was needed; else `nothing`
  };

  // Partial sums of one strip: chains that grow long go to the totals, in double.
  struct Pending {
    const Segments& of;
    const int64_t begin, end;
    const std::array<A*, 2> part;
    Doubles& total;
    std::vector<int64_t> lines;

    Pending(const Segments& of, int64_t begin, int64_t end, std::array<A*, 2> part, Doubles& total)
        : of(of), begin(begin), end(end), part(part), total(total), lines(total.empty() ? 0 : of.number_ + 1) {}

    template <class Run> void in_chains(int64_t id, int64_t count, Run run) {
      if (total.empty()) return run(0, count);
      for (int64_t done = 0; done < count;) {
        if (lines[id] == longest) empty(id);
        const int64_t some = std::min(count - done, longest - lines[id]);
        run(done, some);
        lines[id] += some, done += some;
      }
    }
    void empty(int64_t id) {
      const int64_t at = id * of.width_, size = int64_t(total.size()) / 2;
      for (int which = 0; which < 2; ++which)
        for (int64_t c = begin; c < end; ++c)
          total[which * size + at + c] += double(part[which][at + c]), part[which][at + c] = A(0);
      lines[id] = 0;
    }
    void finish() {
      if (total.empty()) return;
      const int64_t size = int64_t(total.size()) / 2;
      for (int64_t id = 0; id * of.width_ < size; ++id) {
        empty(id);
        for (int which = 0; which < 2; ++which)
          for (int64_t at = id * of.width_ + begin; at < id * of.width_ + end; ++at)
            part[which][at] = A(total[which * size + at]);
      }
    }
  };

  // The runs of lines of each segment, in order; the last segment is that of absent lines. `apart`: each is worked on by
  // itself, as one of the `tasks` that begin at these segments.
  struct Run { int64_t first, lines; };
  struct Order {
    std::vector<Run> runs;
    std::vector<int64_t> of, lines, begins;
    bool apart = false;
    int64_t tasks() const { return int64_t(begins.size()) - 1; }
  };
  Order order_of() const {
    Order order;
    order.of.resize(number_ + 2), order.lines.resize(number_ + 1);
    int64_t runs = 0;
    over_runs(0, view_.S, [&](int64_t id, int64_t, int64_t lines) { ++runs, ++order.of[id + 1], order.lines[id] += lines; });
    const int64_t largest = *std::max_element(order.lines.begin(), order.lines.end());
    const bool waits = threads_.count() > 1 && 2 * largest * threads_.count() > 3 * view_.S;
    if (waits || 4 * runs > view_.S) return order;  // lines in no order are faster read as they lie
    order.apart = true;
    for (int64_t id = 0; id <= number_; ++id) order.of[id + 1] += order.of[id];
    order.runs.resize(runs);
    std::vector<int64_t> at(order.of.begin(), order.of.end() - 1);
    over_runs(0, view_.S, [&](int64_t id, int64_t first, int64_t lines) { order.runs[at[id]++] = {first, lines}; });
    const int64_t step = std::max(cut, view_.size() / 64) / std::max<int64_t>(1, width_);
    for (int64_t id = 0, since = step; id <= number_; ++id) {
      if (since >= step) order.begins.push_back(id), since = 0;
      since += order.lines[id];
    }
    order.begins.push_back(number_ + 1);
    return order;
  }

  // What the columns of one segment go by, and sums of them; of a thread.
  struct Scratch {
    Vector about, sum, square, mean_hi, mean_lo, r, mean_h, mean_hx;
    Doubles total, first, second;
    explicit Scratch(const Segments& of)
        : about(of.width_), sum(of.width_), square(of.width_), mean_hi(of.width_), mean_lo(of.width_), r(of.width_),
          mean_h(of.width_), mean_hx(of.width_), total(2 * of.width_), first(of.view_.G), second(of.view_.G) {}
    int64_t filled = -1;
    Columns<A> columns(const Segments& of, int64_t id, const A* scale, const A* bias) {
      for (int64_t g = 0; g < of.view_.G && filled != id; ++g) {
        const int64_t at = id * of.view_.G + g, c = g * of.view_.D;
        const A count = static_cast<const A*>(of.job_.counts)[at];
        std::fill_n(&mean_hi[c], of.view_.D, static_cast<const A*>(of.job_.mean_hi)[at]);
        std::fill_n(&mean_lo[c], of.view_.D, static_cast<const A*>(of.job_.mean_lo)[at]);
        std::fill_n(&r[c], of.view_.D, rstd<A>(of.job_, static_cast<const A*>(of.job_.m2)[at], double(count)));
      }
      filled = id;
      return {mean_hi.data(), mean_lo.data(), r.data(), scale, bias, mean_h.data(), mean_hx.data()};
    }
  };

  template <class Body> void each_segment(const Order& order, Body body) const {
    threads_.each(order.tasks(), [&](int64_t task) {
      Scratch scratch(*this);
      for (int64_t id = order.begins[task]; id < order.begins[task + 1]; ++id) body(id, task, scratch);
    });
  }
  // body(run, how far ahead to fetch); short runs are fetched here.
  template <class Body> void each_run(const Order& order, int64_t id, Body body) const {
    const int64_t begin = order.of[id], end = order.of[id + 1], whole = order.lines[id] * width_;
    const bool next = end - begin == 1 && whole * kernels_.x->size <= most_fetched;  // the next segment lies behind it
    for (int64_t i = begin; i < end; ++i) {
      if (i + 1 < end && order.runs[i + 1].lines < few) fetch(order.runs[i + 1].first);
      body(order.runs[i], next ? whole : parts(far, 4 * width_) * 4 * width_);
    }
  }
  void fetch(int64_t line) const {
    const auto of = [&](const void* a, int64_t size) {
      const char* at = static_cast<const char*>(a) + line * width_ * size;
      for (int64_t i = 0; a && i < width_ * size; i += 64) __builtin_prefetch(at + i, 0, 2);
    };
    of(job_.x, kernels_.x->size), of(job_.g, kernels_.y->size);
  }
  // Of short runs, whose ends are fences, stores go through the cache.
  Job storing(const Run& run) const {
    Job job = job_;
    job.nontemporal = job.nontemporal && run.lines >= few;
    return job;
  }

  // The sums over at most so many first lines of a segment: total.
  void sums_of(int64_t id, const Order& order, Scratch& s, A prescale, int64_t most) const {
    in_chains(id, order, s, most, [&](int64_t first, int64_t lines) {
      kernels_.sums(job_, block(first, lines), 1, prescale, s.about.data(), s.sum.data(), s.square.data(), nullptr);
    });
  }
  void gradient_sums_of(int64_t id, const Order& order, Scratch& s, const Columns<A>& columns) const {
    in_chains(id, order, s, everything, [&](int64_t first, int64_t lines) {
      if (id == number_) return add_up(first, lines, 0, width_, s.square.data());
      kernels_.gradient_sums(job_, block(first, lines), columns, s.sum.data(), s.square.data());
    });
  }
  // run(first, lines), which adds to sum and square; what these grow to goes to total before chains are long.
  template <class Body> void in_chains(int64_t id, const Order& order, Scratch& s, int64_t most, Body body) const {
    std::fill(s.total.begin(), s.total.end(), 0.0);
    int64_t chain = 0, left = most;
    const auto flush = [&] {
      for (int64_t c = 0; c < width_; ++c)
        s.total[c] += double(s.sum[c]), s.total[width_ + c] += double(s.square[c]), s.sum[c] = s.square[c] = A(0);
      chain = 0;
    };
    std::fill(s.sum.begin(), s.sum.end(), A(0)), std::fill(s.square.begin(), s.square.end(), A(0));
    each_run(order, id, [&](const Run& run, int64_t) {
      for (int64_t done = 0; done < run.lines && left > 0;) {
        if (chain == longest) flush();
        const int64_t lines = std::min({run.lines - done, longest - chain, left});
        body(run.first + done, lines);
        done += lines, chain += lines, left -= lines;
      }
    });
    flush();
  }

  void moments_of(int64_t id, const Order& order, Scratch& s) const {
    const int64_t lines = order.lines[id], at = id * view_.G;
    A *mean_hi = static_cast<A*>(job_.mean_hi) + at, *mean_lo = static_cast<A*>(job_.mean_lo) + at;
    A *m2 = static_cast<A*>(job_.m2) + at, *counts = static_cast<A*>(job_.counts) + at;
    for (A* a : {mean_hi, mean_lo, m2}) std::fill_n(a, view_.G, A(0));
    std::fill_n(counts, view_.G, A(lines * view_.D));
    s.filled = -1;
    if (lines == 0) return;
    const auto group = [&](int which, int64_t g) {
      double total = 0;
      for (int64_t d = 0; d < view_.D; ++d) total += s.total[which * width_ + g * view_.D + d];
      return total;
    };
    std::fill(s.about.begin(), s.about.end(), A(0));
    if (job_.centered) {
      sums_of(id, order, s, A(1), few);
      for (int64_t g = 0; g < view_.G; ++g) mean_hi[g] = A(group(0, g) / double(std::min(lines, few) * view_.D));
    }
    bool done = false;
    for (bool again = false; !done; again = true) {
      for (int64_t g = 0; g < view_.G; ++g) std::fill_n(&s.about[g * view_.D], view_.D, mean_hi[g]);
      sums_of(id, order, s, A(1), everything);
      for (int64_t g = 0; g < view_.G; ++g) s.first[g] = group(0, g), s.second[g] = group(1, g);
      for (const double prescale : {small_prescale, large_prescale}) {
        const auto needs = [&](int64_t g) { return prescale_for<A>(job_, s.second[g], double(counts[g])) == prescale; };
        bool any = false;
        for (int64_t g = 0; g < view_.G; ++g) any = any || needs(g);
        if (!any) continue;
        sums_of(id, order, s, A(prescale), everything);
        for (int64_t g = 0; g < view_.G; ++g)
          if (needs(g)) s.second[g] = group(1, g) / (prescale * prescale);
      }
      done = true;
      for (int64_t g = 0; g < view_.G; ++g) {
        Statistic<A> one{mean_hi[g], mean_lo[g], m2[g]};
        if (!finalize(job_, double(counts[g]), s.first[g], s.second[g], again, one)) done = false;
        mean_hi[g] = one.mean_hi, mean_lo[g] = one.mean_lo, m2[g] = one.m2;
      }
    }
  }

  // mean_h and mean_hx of a segment, from the sums of g xhat and of g.
  void means_of(int64_t id, Scratch& s, const A* scale) const {
    for (int64_t g = 0; g < view_.G; ++g) {
      const double count = double(static_cast<const A*>(job_.counts)[id * view_.G + g]);
      double h = 0, hx = 0;
      for (int64_t c = g * view_.D; c < (g + 1) * view_.D; ++c)
        hx += s.total[c] * double(scale[c]), h += s.total[width_ + c] * double(scale[c]);
      const bool some = count > 0;
      std::fill_n(&s.mean_h[g * view_.D], view_.D, some && job_.centered ? A(h / count) : A(0));
      std::fill_n(&s.mean_hx[g * view_.D], view_.D, some ? A(hx / count) : A(0));
    }
  }

  // What the columns of each segment go by.
  struct Tables {
    const Segments& of;
    Vector mean_hi, mean_lo, r, mean_h, mean_hx;
    Columns<A> columns(int64_t at, const A* scale, const A* bias) const {
      return {&mean_hi[at], &mean_lo[at], &r[at], scale, bias, mean_h.empty() ? nullptr : &mean_h[at],
              mean_hx.empty() ? nullptr : &mean_hx[at]};
    }
    Columns<A> operator()(int64_t id) const { return columns(id * of.width_, &r[0], &r[0]); }
  };
  Tables tables() const {
    const int64_t size = number_ * width_;
    Tables t{*this, Vector(size), Vector(size), Vector(size), {}, {}};
    for (int64_t i = 0; i < number_ * view_.G; ++i) {
      std::fill_n(&t.mean_hi[i * view_.D], view_.D, static_cast<const A*>(job_.mean_hi)[i]);
      std::fill_n(&t.mean_lo[i * view_.D], view_.D, static_cast<const A*>(job_.mean_lo)[i]);
      const double count = double(static_cast<const A*>(job_.counts)[i]);
      std::fill_n(&t.r[i * view_.D], view_.D, rstd<A>(job_, static_cast<const A*>(job_.m2)[i], count));
    }
    return t;
  }
  struct Given {  // the same, from outside
    const Segments& of;
    const A *shift, *r;
    Columns<A> operator()(int64_t id) const { return of.columns(id, shift, r, r, r); }
  };

  template <class Columns> void gradient_sums(const Columns& columns_of, A* gu, A* g) const {
    std::fill_n(gu, (number_ + 1) * width_, A(0)), std::fill_n(g, (number_ + 1) * width_, A(0));
    const std::vector<int64_t> lines = lines_of_each();
    const bool is_long = *std::max_element(lines.begin(), lines.end()) > longest;
    Doubles total(is_long ? 2 * (number_ + 1) * width_ : 0);
    each_strip([&](int64_t begin, int64_t end) {
      Pending pending(*this, begin, end, {gu, g}, total);
      over_runs(0, view_.S, [&](int64_t id, int64_t first, int64_t count) {
        pending.in_chains(id, count, [&](int64_t done, int64_t some) {
          if (id == number_) return add_up(first + done, some, begin, end, g + id * width_);
          const Block lines_of_run = block(first + done, some, begin, end);
          kernels_.gradient_sums(job_, lines_of_run, columns_of(id), gu + id * width_, g + id * width_);
        });
      });
      pending.finish();
    });
  }

  void clear_statistics() const {
    for (void* a : {job_.mean_hi, job_.mean_lo, job_.m2, job_.counts})
      std::fill_n(static_cast<A*>(a), number_ * view_.G, A(0));
  }

  // Of absent lines: y is `line`, dx is 0, and g is added to `sum`.
  void put(const A* line, int64_t first, int64_t lines) const {
    char* y = static_cast<char*>(job_.out) + first * width_ * kernels_.y->size;
    for (int64_t i = 0; i < lines; ++i) kernels_.y->store(line, width_, y + i * width_ * kernels_.y->size, false);
  }
  void zero(int64_t first, int64_t lines) const {
    const int64_t size = width_ * kernels_.x->size;
    std::memset(static_cast<char*>(job_.out) + first * size, 0, size_t(lines * size));
  }
  void add_up(int64_t first, int64_t lines, int64_t begin, int64_t end, A* sum) const {
    Vector wide(end - begin);
    for (int64_t i = first; i < first + lines; ++i) {
      const char* line = static_cast<const char*>(job_.g) + (i * width_ + begin) * kernels_.y->size;
      const A* values = reinterpret_cast<const A*>(line);
      if (kernels_.y->load) kernels_.y->load(line, end - begin, wide.data()), values = wide.data();
      for (int64_t c = begin; c < end; ++c) sum[c] += values[c - begin];
    }
  }

  static int64_t parts(int64_t n, int64_t step) { return (n + step - 1) / step; }
  int64_t id_of(int64_t line) const { return ids_[line] < 0 || ids_[line] >= number_ ? number_ : ids_[line]; }

  std::vector<int64_t> lines_of_each() const {
    std::vector<int64_t> lines(number_ + 1);
    for (int64_t i = 0; i < view_.S; ++i) ++lines[id_of(i)];
    return lines;
  }

  // run(id, first, lines) of each run of lines with one id; of absent ones it is the number of segments.
  template <class Run> void over_runs(int64_t first, int64_t last, Run run) const {
    for (int64_t i = first; i < last;) {
      const int64_t id = id_of(i), begun = i;
      while (++i < last && id_of(i) == id) {
      }
      run(id, begun, i - begun);
    }
  }

  template <class Run> void each_part(Run run) const {
    const int64_t step = std::max<int64_t>(1, cut / std::max<int64_t>(1, width_));
    threads_.each(parts(view_.S, step), [&](int64_t i) {
      over_runs(i * step, std::min(view_.S, (i + 1) * step), run);
    });
  }

  // Strips of columns, whole vectors wide: each thread has some.
  template <class Run> void each_strip(Run run) const {
    const int64_t most = std::max<int64_t>(1, width_ / strip), number = std::min(most, threads_.count());
    const int64_t step = parts(parts(width_, number), strip / 2) * (strip / 2);
    threads_.each(parts(width_, step), [&](int64_t i) { run(i * step, std::min(width_, (i + 1) * step)); });
  }

  Block block(int64_t first, int64_t lines) const { return block(first, lines, 0, width_); }
  Block block(int64_t first, int64_t lines, int64_t ahead) const {
    Block b = block(first, lines);
    b.ahead = ahead;
    return b;
  }
  Block block(int64_t first, int64_t lines, int64_t begin, int64_t end) const {
    return {0, first, 1, lines, begin, end, parts(far, 4 * width_) * 4 * width_};
  }

  Columns<A> columns(int64_t id, const A* shift, const A* r, const A* a, const A* b) const {
    const int64_t at = id * width_;
    return {shift + at, zeros_.data(), r + at, a + at, b + at, nullptr, nullptr};
  }

  // For the segments wanted: the sums of x - about, and of the squares of that, of so many of their first lines.
  Sums sums(const std::vector<uint8_t>& wanted, const std::vector<int64_t>& lines, const Vector& about, A prescale,
            int64_t most = everything) const {
    Sums all{Vector(number_ * width_), Vector(number_ * width_), {}, {}};
    int64_t largest = 0;
    for (int64_t k = 0; k < number_; ++k) largest = std::max(largest, wanted[k] ? lines[k] : 0);
    if (std::min(largest, most) > longest) all.total.resize(2 * number_ * width_);
    each_strip([&](int64_t begin, int64_t end) {
      Pending pending(*this, begin, end, {all.sum.data(), all.square.data()}, all.total);
      std::vector<int64_t> seen(most < largest ? number_ : 0);
      over_runs(0, view_.S, [&](int64_t id, int64_t first, int64_t count) {
        if (id == number_ || !wanted[id]) return;
        if (!seen.empty()) {
          count = std::min(count, most - seen[id]), seen[id] += count;
          if (count == 0) return;
        }
        pending.in_chains(id, count, [&](int64_t done, int64_t some) {
          const int64_t at = id * width_;
          kernels_.sums(job_, block(first + done, some, begin, end), 1, prescale, about.data() + at,
                        all.sum.data() + at, all.square.data() + at, nullptr);
        });
      });
      for (int64_t k = 0; k < number_ && !all.total.empty(); ++k) pending.empty(k);
    });
    return all;
  }

  // Of group g of a segment.
  double by_group(const Sums& all, int which, int64_t segment, int64_t g) const {
    double total = 0;
    const int64_t at = segment * width_ + g * view_.D;
    for (int64_t i = at; i < at + view_.D; ++i)
      total += !all.total.empty() ? all.total[which * number_ * width_ + i] : double((which ? all.square : all.sum)[i]);
    return total;
  }

  const Job job_;
  const View view_;  // (1, 1, lines, G, D, 1)
  const Kernels<A>& kernels_;
  const Threads alone_ = Threads::none();
  const Threads& threads_;
  const int32_t* ids_;
  const int64_t number_, width_;
  const Vector zeros_;
};

}  // namespace jaxnorm
