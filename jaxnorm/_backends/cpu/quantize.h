// Rows written in 8 bits: each is normalized into float32 scratch, which stays in the cache, and there its largest values
// are taken and it is divided by its scales. The format is data, so no kernel is compiled for each. Part of kernels.h.

template <int size> using Bytes = typename vector_of<uint8_t, size>::type;

#if defined(__AVX512F__)
JN_INLINE Bytes<bytes / 4> lowest(U32 v) { return as<Bytes<bytes / 4>>(_mm512_cvtepi32_epi8(as<__m512i>(v))); }
#else
JN_INLINE Bytes<bytes / 4> lowest(U32 v) { return __builtin_convertvector(v, Bytes<bytes / 4>); }
#endif
JN_INLINE void store_bytes(Whole, uint8_t* p, U32 v) {
  const auto out = lowest(v);
  __builtin_memcpy(p, &out, sizeof out);
}
JN_INLINE void store_bytes(Part part, uint8_t* p, U32 v) {
  const auto out = lowest(v);
  for (int i = 0; i < part.size; ++i) p[i] = out[i];
}

// Of numbers below 2^31.
JN_INLINE U32 larger(U32 a, U32 b) { return choose(as<U32>(as<V<int32_t>>(a) > as<V<int32_t>>(b)), a, b); }
JN_INLINE U32 smaller(U32 a, U32 b) { return choose(as<U32>(as<V<int32_t>>(a) > as<V<int32_t>>(b)), b, a); }

constexpr uint32_t sizes = 0x7fffffff, infinity = 0x7f800000;

// The bits of the largest absolute value of a run. As integers they are in the order of the values, and NaN comes last.
inline uint32_t largest_bits(const float* y, int64_t n) {
  U32 top[2]{};
  over<float, 2>(n, JN_BODY(i, at, u) { top[u] = larger(top[u], as<U32>(at.load(y + i)) & sizes); });
  const U32 both = larger(top[0], top[1]);
  uint32_t found = 0;
  for (int i = 0; i < lanes<float>; ++i) found = both[i] > found ? both[i] : found;
  return found;
}

// A float of 8 bits to the nearest, ties to even, clipped to the largest finite one; NaN stays NaN.
struct E4M3 { static constexpr uint32_t shift = 20, bias = 0x3c000000, most = 0x43e00000, unit = 0x46800000, nan = 0x7f; };
struct E5M2 { static constexpr uint32_t shift = 21, bias = 0x38000000, most = 0x47600000, unit = 0x43000000, nan = 0x7e; };
template <class F> JN_INLINE U32 encoded_in(V<float> v) {
  const U32 u = as<U32>(v), whole = u & sizes, size = smaller(whole, U32{} + F::most);
  const U32 normal = (size - F::bias + ((1u << (F::shift - 1)) - 1) + ((size >> F::shift) & 1)) >> F::shift;
  const U32 small = as<U32>(as<V<float>>(size) + as<V<float>>(U32{} + F::unit)) - F::unit;  // the addition rounds
  const U32 finite = choose(as<U32>(as<V<int32_t>>(size) < int32_t(F::bias + 0x800000)), small, normal);
  return choose(as<U32>(as<V<int32_t>>(whole) > int32_t(infinity)), U32{} + F::nan, finite) | ((u >> 24) & 0x80);
}
struct I8 {};
template <> JN_INLINE U32 encoded_in<I8>(V<float> v) {
  const U32 there = as<U32>(v == v);
  v = as<V<float>>(as<U32>(v) & there);  // NaN is in the scale
  v = as<V<float>>(choose(as<U32>(v > all(127.0f)), as<U32>(all(127.0f)), as<U32>(v)));
  v = as<V<float>>(choose(as<U32>(v < all(-128.0f)), as<U32>(all(-128.0f)), as<U32>(v)));
  return as<U32>(v + all(12582912.0f));  // the addition rounds, and the lowest byte is the number
}

// y (1 / scale) or y / scale; powers of two come as their reciprocals.
template <class F, bool times> JN_INLINE void encode_run(const float* y, uint8_t* data, int64_t n, float by) {
  const V<float> factor = all(by);
  over<float, 1>(n, JN_BODY(i, at, u) {
    const V<float> v = at.load(y + i);
    store_bytes(at, data + i, encoded_in<F>(times ? v * factor : v / factor));
  });
}
inline void encode(Quantizer::Kind kind, const float* y, uint8_t* data, int64_t n, float by, bool reciprocal) {
  if (kind == Quantizer::int8) return encode_run<I8, true>(y, data, n, reciprocal ? by : 1.0f / by);
  if (kind == Quantizer::e4m3) return reciprocal ? encode_run<E4M3, true>(y, data, n, by) : encode_run<E4M3, false>(y, data, n, by);
  reciprocal ? encode_run<E5M2, true>(y, data, n, by) : encode_run<E5M2, false>(y, data, n, by);
}

JN_INLINE float of_bits(uint32_t bits) { return as<float>(bits); }

// One row: the rules of `quantized_rows` in _ops/quantize.py.
inline void quantize_row(const Quantizer& q, const float* y, int64_t n, int64_t row, uint8_t* data) {
  if (q.rule == Quantizer::given) {
    static_cast<float*>(q.found)[row] = of_bits(largest_bits(y, n));
    return encode(q.kind, y, data, n, q.scales[row], false);
  }
  for (int64_t i = 0, block = row * (n / q.block); i < n; i += q.block, ++block) {
    const uint32_t top = largest_bits(y + i, q.block);
    const bool nan = top > infinity;
    if (q.rule == Quantizer::linear) {
      const float amax = of_bits(top), clipped = amax > q.upper ? q.upper : amax;
      float scale = clipped * q.inverse;
      scale = !nan && scale < q.floor ? q.floor : scale;
      static_cast<float*>(q.found)[block] = scale;
      encode(q.kind, y + i, data + i, q.block, scale, false);
      continue;
    }
    const uint32_t bits = top < infinity ? top : infinity - 1;  // an infinity is clipped
    int32_t code = int32_t(bits >> 23) - q.exponent + (q.rule == Quantizer::power_up && (bits & 0x7fffff) > 0x600000);
    code = nan ? 255 : code < 0 ? 0 : code;
    static_cast<uint8_t*>(q.found)[block] = uint8_t(code);
    encode(q.kind, y + i, data + i, q.block, of_bits(nan ? 0x7fc00000 : uint32_t(254 - code) << 23), true);
  }
}

template <class U> void round_run(float* y, int64_t n) {
  over<float, 1>(n, JN_BODY(i, at, u) { at.store(y + i, decoded(U{}, encoded(U{}, at.load(y + i)))); });
}
inline void round_row(Type type, float* y, int64_t n) {
  if (type == Type::bf16) round_run<bfloat16>(y, n);
  if (type == Type::f16) round_run<float16>(y, n);
}

template <class T> void rows_quantize(const Job& job, const Quantizer& q, int64_t first, int64_t last, float* y) {
  using A = typename accumulator<T>::type;
  if constexpr (std::is_same_v<A, float>) {
    const Rows<T, float, false> rows{job};
    const int64_t n = rows.n;
    for (int64_t row = first; row < last; ++row) {
      const T* x = rows.x + row * n;
      const Statistic<float> s = row_statistic(job, x, n);
      rows.keep(row, s);
      const float r = rstd<float>(job, s.m2);
      if (job.cast_before_scale) {
        normalize_lines<T, float, false, false, 1>(x, y, n, 0, 0, Same<A>(s.mean_hi), Same<A>(s.mean_lo), Same<A>(r),
                                                   Same<A>(1), Same<A>(0));
        round_row(q.rounding, y, n);
        const float *scale = rows.parameter(job.scale, row), *bias = rows.parameter(job.bias, row);
        for (int64_t i = 0; i < n; ++i) y[i] = y[i] * scale[i / job.view.P] + bias[i / job.view.P];
      } else {
        rows.template normalize<false>(row, s, r, y);
      }
      if (q.round_first) round_row(q.rounding, y, n);
      quantize_row(q, y, n, row, static_cast<uint8_t*>(job.out) + row * n);
    }
  }
}
