// Vectors of V<A> lanes, loads and stores that convert, and what GCC and Clang leave to say about each instruction set.
//
// Included once by every source file that is compiled for an instruction set, inside that file's own namespace. The
// vector types are the compilers' own, so that one text serves x86-64 and arm64; intrinsics stand where those have no
// word: half precision, stores past the cache, and partial vectors under AVX-512.

#if defined(__AVX512F__)
constexpr int bytes = 64;
#elif defined(__AVX2__)
constexpr int bytes = 32;
#else
constexpr int bytes = 16;
#endif

template <class E, int size> struct vector_of { typedef E type __attribute__((vector_size(size))); };
template <class A> using V = typename vector_of<A, bytes>::type;
template <class A> constexpr int lanes = bytes / int(sizeof(A));
template <class A> using Bits = V<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>>;
template <class E> using Half = typename vector_of<E, bytes / 2>::type;  // as many 16-bit lanes as V<float> has

using U32 = V<uint32_t>;
using U16 = Half<uint16_t>;

#define JN_INLINE inline __attribute__((always_inline))

template <class To, class From> JN_INLINE To as(From from) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

JN_INLINE U32 choose(U32 where, U32 yes, U32 no) { return (where & yes) | (~where & no); }

// --- 16-bit floats ---------------------------------------------------------------------------------------------------

// GCC converts a vector between these widths in two halves, with three instructions more than the one there is.
#if defined(__AVX512F__)
JN_INLINE U32 wide(U16 h) { return as<U32>(_mm512_cvtepu16_epi32(as<__m256i>(h))); }
JN_INLINE U16 low(U32 v) { return as<U16>(_mm512_cvtepi32_epi16(as<__m512i>(v))); }
#elif defined(__AVX2__)
JN_INLINE U32 wide(U16 h) { return as<U32>(_mm256_cvtepu16_epi32(as<__m128i>(h))); }
JN_INLINE U16 low(U32 v) { return __builtin_convertvector(v, U16); }
#else
JN_INLINE U32 wide(U16 h) { return __builtin_convertvector(h, U32); }
JN_INLINE U16 low(U32 v) { return __builtin_convertvector(v, U16); }
#endif

JN_INLINE V<float> widened(bfloat16, U16 h) { return as<V<float>>(wide(h) << 16); }

#if defined(__AVX512BF16__)
JN_INLINE U16 narrowed(bfloat16, V<float> v) { return as<U16>(_mm512_cvtneps_pbh(as<__m512>(v))); }
#else
JN_INLINE U16 narrowed(bfloat16, V<float> v) {  // to the nearest, ties to even; NaN stays NaN
  const U32 u = as<U32>(v);
  const U32 nearest = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return low(choose(as<U32>(v != v), (u >> 16) | 0x40, nearest));
}
#endif

#if defined(__AVX512F__)
JN_INLINE V<float> widened(float16, U16 h) { return as<V<float>>(_mm512_cvtph_ps(as<__m256i>(h))); }
JN_INLINE U16 narrowed(float16, V<float> v) {
  return as<U16>(_mm512_cvtps_ph(as<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
JN_INLINE V<float> widened(float16, U16 h) { return as<V<float>>(_mm256_cvtph_ps(as<__m128i>(h))); }
JN_INLINE U16 narrowed(float16, V<float> v) {
  return as<U16>(_mm256_cvtps_ph(as<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
}
#else
JN_INLINE V<float> widened(float16, U16 h) {
  const U32 u = wide(h), rest = u & 0x7fff;
  const U32 normal = (rest << 13) + 0x38000000, special = (rest << 13) + 0x70000000;
  const U32 subnormal = as<U32>(__builtin_convertvector(as<V<int32_t>>(rest), V<float>) * 0x1p-24f);
  const U32 finite = choose(as<U32>(rest < 0x400), subnormal, normal);
  return as<V<float>>(choose(as<U32>(rest >= 0x7c00), special, finite) | ((u & 0x8000) << 16));
}
JN_INLINE U16 narrowed(float16, V<float> v) {
  const U32 u = as<U32>(v), size = u & 0x7fffffff;
  const U32 normal = (size + 0xc8000fff + ((size >> 13) & 1)) >> 13;
  const U32 small = as<U32>(as<V<float>>(size) + 0.5f) - 0x3f000000;  // the addition rounds
  const U32 special = choose(as<U32>(size > 0x7f800000), U32{} + 0x7e00, U32{} + 0x7c00);
  const U32 finite = choose(as<U32>(size < 0x38800000), small, normal);
  const U32 out = choose(as<U32>(size >= 0x47800000), special, finite) | ((u >> 16) & 0x8000);
  return low(out);
}
#endif

// --- loads and stores ------------------------------------------------------------------------------------------------

// The vector as it lies in memory, for as many elements as there are lanes of accumulators.
template <class T> struct stored { using type = U16; };
template <> struct stored<float> { using type = V<float>; };
template <> struct stored<double> { using type = V<double>; };
template <class T> using Stored = typename stored<T>::type;

JN_INLINE V<float> decoded(float, V<float> v) { return v; }
JN_INLINE V<double> decoded(double, V<double> v) { return v; }
template <class T> JN_INLINE V<float> decoded(T, U16 h) { return widened(T{}, h); }
JN_INLINE V<float> encoded(float, V<float> v) { return v; }
JN_INLINE V<double> encoded(double, V<double> v) { return v; }
template <class T> JN_INLINE U16 encoded(T, V<float> v) { return narrowed(T{}, v); }

template <class A> JN_INLINE V<A> all(A a) { return V<A>{} + a; }

// The sum of all lanes, by halves.
template <class A, int size = bytes> JN_INLINE A sum(typename vector_of<A, size>::type v) {
  if constexpr (size == 16) {
    return sizeof(A) == 4 ? (v[0] + v[1]) + (v[2 % (16 / sizeof(A))] + v[3 % (16 / sizeof(A))]) : v[0] + v[1];
  } else {
    struct Halves { typename vector_of<A, size / 2>::type low, high; };
    const Halves parts = as<Halves>(v);
    return sum<A, size / 2>(parts.low + parts.high);
  }
}

// Bytes that are 0 or 1, as many as there are lanes, as numbers.
template <class A> JN_INLINE V<A> numbers_of(const uint8_t* p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    return as<V<A>>(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
  } else {
    return as<V<A>>(_mm512_cvtepi32_pd(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4)
    return as<V<A>>(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#endif
  V<A> v;
  for (int i = 0; i < lanes<A>; ++i) v[i] = A(p[i]);
  return v;
}

// A whole vector at a pointer.
struct Whole {
  template <class A> JN_INLINE V<A> of_bytes(const uint8_t* p) const { return numbers_of<A>(p); }
  template <class T> JN_INLINE auto load(const T* p) const {
    Stored<T> v;
    __builtin_memcpy(&v, p, sizeof v);
    return decoded(T{}, v);
  }
  template <class W> JN_INLINE W kept(W v) const { return v; }
  template <class T, class W> JN_INLINE void store(T* p, W v) const {
    const Stored<T> out = encoded(T{}, v);
    __builtin_memcpy(p, &out, sizeof out);
  }
  // Past the cache. p lies at a multiple of the vector's size.
  template <class T, class W> JN_INLINE void store_nontemporal(T* p, W v) const {
    const Stored<T> out = encoded(T{}, v);
#if defined(__SSE2__)
    if constexpr (sizeof out == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), as<__m128i>(out));
#endif
#if defined(__AVX2__)
    if constexpr (sizeof out == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), as<__m256i>(out));
#endif
#if defined(__AVX512F__)
    if constexpr (sizeof out == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), as<__m512i>(out));
#endif
    __builtin_memcpy(p, &out, sizeof out);
  }
};

// The first `size` lanes at a pointer, 0 < size < lanes; the others are 0 and stay untouched in memory.
struct Part {
  int size;

  template <class A> JN_INLINE V<A> of_bytes(const uint8_t* p) const {
    uint8_t some[lanes<A>]{};
    for (int i = 0; i < size; ++i) some[i] = p[i];
    return numbers_of<A>(some);
  }
  template <class T> JN_INLINE auto load(const T* p) const {
    Stored<T> v{};
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    if constexpr (sizeof(T) == 2) v = as<Stored<T>>(_mm256_maskz_loadu_epi16(__mmask16(bits()), p));
    else if constexpr (sizeof(T) == 4) v = as<Stored<T>>(_mm512_maskz_loadu_ps(__mmask16(bits()), p));
    else v = as<Stored<T>>(_mm512_maskz_loadu_pd(__mmask8(bits()), p));
#else
    pieces<T>(&v, p);
#endif
    return decoded(T{}, v);
  }
  template <class W> JN_INLINE W kept(W v) const {  // 0 in the other lanes, whatever stood there
    using Index = typename vector_of<std::conditional_t<sizeof(v[0]) == 4, int32_t, int64_t>, bytes>::type;
    Index index;
    for (int i = 0; i < int(sizeof v / sizeof(v[0])); ++i) index[i] = i;
    return as<W>(as<Index>(v) & as<Index>(index < size));
  }
  template <class T, class W> JN_INLINE void store(T* p, W v) const {
    const Stored<T> out = encoded(T{}, v);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(p, __mmask16(bits()), as<__m256i>(out));
    else if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, __mmask16(bits()), as<__m512>(out));
    else _mm512_mask_storeu_pd(p, __mmask8(bits()), as<__m512d>(out));
#else
    pieces<T>(p, &out);
#endif
  }
  template <class T, class W> JN_INLINE void store_nontemporal(T* p, W v) const { store(p, v); }

 private:
  JN_INLINE unsigned bits() const { return (1u << size) - 1; }
  // In powers of two: no loop, and no call.
  template <class T> JN_INLINE void pieces(void* to, const void* from) const {
    auto* out = static_cast<char*>(to);
    auto* in = static_cast<const char*>(from);
    piece<8, T>(out, in);
    piece<4, T>(out, in);
    piece<2, T>(out, in);
    piece<1, T>(out, in);
  }
  template <int width, class T> JN_INLINE void piece(char*& to, const char*& from) const {
    if constexpr (width * sizeof(T) < sizeof(Stored<T>))
      if (size & width) {
        __builtin_memcpy(to, from, width * sizeof(T));
        to += width * sizeof(T), from += width * sizeof(T);
      }
  }
};

// Calls body(i, access, u) for i = 0, lanes, 2 lanes, ... below n, with u counting 0..unroll-1 for separate chains.
template <class A, int unroll, class Body> JN_INLINE void over(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + unroll * lanes<A> <= n; i += unroll * lanes<A>)
    for (int u = 0; u < unroll; ++u) body(i + u * lanes<A>, Whole{}, u);
  for (; i + lanes<A> <= n; i += lanes<A>) body(i, Whole{}, 0);
  if (i < n) body(i, Part{int(n - i)}, 0);
}
