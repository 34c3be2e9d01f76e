// The arrays of a job with weights, tile by tile. Part of kernels.h.

// Some runs of elements as numbers of type A, and for each array the distance from one run to the next.
template <class A> struct Tile {
  const A *x, *w, *g;
  A* out;
  int64_t of_x, of_w, of_g, of_out;
  Tile after(int64_t runs) const {
    return {x + runs * of_x, w + runs * of_w, g + runs * of_g, out + runs * of_out, of_x, of_w, of_g, of_out};
  }
};

// x, its cotangent and the weights are decoded a tile at a time, and so is the output encoded: what lies between stays in
// the first cache. Arrays of type A are where they are.
template <class A> class Tiles {
 public:
  static constexpr int64_t most = 8192 / sizeof(A);  // elements of a tile

  // Of x for y, or in the backward pass of x and g for dx.
  Tiles(const Job& job, bool backward)
      : plain(*static_cast<const Kernels<A>*>(job.plain)),
        job_(job),
        g_of_y_(backward ? job.g : nullptr),
        of_out_(backward ? *plain.x : *plain.y) {}

  const Kernels<A>& plain;  // without weights
  bool writes = false;      // whether there is output
  bool absent = false;      // whether all is absent: x is not read, but 0
  bool rounds() const { return job_.cast_before_scale && plain.y->round; }
  int64_t ahead = 0;        // how far ahead of a tile its arrays are fetched; 0 is not at all

  // body(first run, runs, start in each run, size, tile) over `runs` runs of `length` elements, `stride` apart. Where each
  // run has one weight, these are in `weights`, `step` apart.
  template <class Body>
  JN_INLINE void over_runs(int64_t at, int64_t runs, int64_t length, int64_t stride, Body body, const A* weights = nullptr,
                           int64_t step = 0) {
    const int64_t longest = length < most ? length : most, together = most / longest;
    for (int64_t run = 0; run < runs; run += together)
      for (int64_t start = 0; start < length; start += longest) {
        Area area{at + run * stride + start, runs - run < together ? runs - run : together,
                  length - start < longest ? length - start : longest, stride};
        if (area.runs == 1 || longest < length) area.stride = area.size;
        read(area, weights ? weights + run * step : nullptr, step);
        body(run, area.runs, start, area.size, tile_);
        if (writes) write(area);
      }
  }

  // n numbers, from a position of the output on; and as many zeros.
  void put(const A* values, int64_t at, int64_t n) const {
    of_out_.store(values, n, static_cast<char*>(job_.out) + at * of_out_.size, job_.nontemporal);
  }
  void zero(int64_t at, int64_t n) const {
    alignas(64) static constexpr A zeros[most]{};
    for (int64_t i = 0; i < n; i += most) put(zeros, at + i, n - i < most ? n - i : most);
  }

 private:
  struct Area {
    int64_t at = -1, runs = 0, size = 0, stride = 0;
    bool absent = false;
    bool operator==(const Area& o) const {
      return at == o.at && runs == o.runs && size == o.size && stride == o.stride && absent == o.absent;
    }
    // run(offset in the array, offset in a tile, size): once if all is one piece.
    template <class Run> void pieces(Run run) const {
      const bool one = stride == size;
      for (int64_t i = 0; i < (one ? 1 : runs); ++i) run(at + i * stride, i * size, one ? runs * size : size);
    }
  };

  __attribute__((noinline)) void read(Area area, const A* weights, int64_t step) {
    area.absent = absent;
    if (!(area == read_)) {
      if (ahead && !absent) fetch(plain.x->size, job_.x, area);
      if (ahead && g_of_y_) fetch(plain.y->size, g_of_y_, area);
      if (ahead && !absent && !weights) fetch(job_.weighting == Weighting::values ? sizeof(A) : 1, job_.weights, area);
      if (absent) {
        for (int64_t i = 0; i < area.runs * area.size; ++i) x_[i] = w_[i] = 0;
        tile_.x = x_, tile_.w = w_, tile_.of_x = tile_.of_w = area.size;
      } else {
        tile_.x = taken(*plain.x, job_.x, area, x_, tile_.of_x);
        weigh(area, weights, step);
      }
      if (g_of_y_) tile_.g = taken(*plain.y, g_of_y_, area, g_, tile_.of_g);
    }
    read_ = area;
    if (!writes) return;
    in_place_ = !of_out_.load && !job_.nontemporal;
    tile_.out = in_place_ ? static_cast<A*>(job_.out) + area.at : out_, tile_.of_out = in_place_ ? area.stride : area.size;
  }

  void fetch(int64_t size, const void* from, const Area& area) const {
    const char* first = static_cast<const char*>(from) + ahead * size;
    area.pieces([&](int64_t at, int64_t, int64_t n) {
      for (int64_t i = 0; i < n * size; i += 64) __builtin_prefetch(first + at * size + i, 0, 2);
    });
  }

  static const A* taken(const Codec<A>& codec, const void* from, const Area& area, A* into, int64_t& of) {
    of = codec.load ? area.size : area.stride;
    if (!codec.load) return static_cast<const A*>(from) + area.at;
    const char* first = static_cast<const char*>(from);
    area.pieces([&](int64_t at, int64_t to, int64_t n) { codec.load(first + at * codec.size, n, into + to); });
    return into;
  }

  void weigh(const Area& area, const A* weights, int64_t step) {
    if (!weights && job_.weighting == Weighting::values) {
      tile_.w = static_cast<const A*>(job_.weights) + area.at, tile_.of_w = area.stride;
      return;
    }
    tile_.w = w_, tile_.of_w = area.size;
    const auto* bytes = static_cast<const uint8_t*>(job_.weights);
    for (int64_t run = 0; weights && run < area.runs; ++run)
      over<A, 1>(area.size, JN_BODY(i, at, u) { at.store(w_ + run * area.size + i, all(weights[run * step])); });
    if (!weights)
      area.pieces([&](int64_t from, int64_t to, int64_t n) {
        over<A, 1>(n, JN_BODY(i, at, u) { at.store(w_ + to + i, at.template of_bytes<A>(bytes + from + i)); });
      });
  }

  __attribute__((noinline)) void write(const Area& area) {
    char* first = static_cast<char*>(job_.out);
    if (!in_place_)
      area.pieces([&](int64_t at, int64_t from, int64_t n) {
        of_out_.store(out_ + from, n, first + at * of_out_.size, job_.nontemporal);
      });
  }

  const Job& job_;
  const void* const g_of_y_;
  const Codec<A>& of_out_;
  bool in_place_ = false;
  Tile<A> tile_{};
  Area read_;  // what the tile holds
  static constexpr int64_t apart = 1088 / sizeof(A);  // else a store to one would delay loads 4096 bytes from it
  alignas(64) A x_[most + apart], w_[most + apart], g_[most + apart], out_[most];
};
