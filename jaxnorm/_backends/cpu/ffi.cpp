// The backend's door: XLA calls these handlers. Everything that comes in is checked here, and whatever goes wrong leaves as
// an error of the call; Python sees an exception.

#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <string>
#include <vector>

#include "norm.h"
#include "segments.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxnorm {

#define JN_TABLES(isa)                      \
  namespace isa {                           \
  extern const Table<float> float_table;    \
  extern const Table<double> double_table;  \
  }
JN_TABLES(baseline)
#if defined(__x86_64__)
JN_TABLES(avx2)
JN_TABLES(avx512)
JN_TABLES(avx512bf16)
#endif

namespace {

struct InstructionSet {
  const char* name;
  Table<float> of_float;
  Table<double> of_double;
};

bool supported(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!std::strcmp(name, "avx2")) return avx2;
  if (!std::strcmp(name, "avx512")) return avx512;
  if (!std::strcmp(name, "avx512bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return !std::strcmp(name, "baseline");
}

// What this processor can run, the best one first.
std::vector<InstructionSet> supported_sets() {
  const InstructionSet sets[] = {
#if defined(__x86_64__)
      {"avx512bf16", avx512bf16::float_table, avx512bf16::double_table},
      {"avx512", avx512::float_table, avx512::double_table},
      {"avx2", avx2::float_table, avx2::double_table},
#endif
      {"baseline", baseline::float_table, baseline::double_table},
  };
  std::vector<InstructionSet> found;
  for (const InstructionSet& set : sets)
    if (supported(set.name)) found.push_back(set);
  return found;
}

// The set that JAXNORM_ISA names, otherwise the best one. Python refuses a name that is not supported here.
InstructionSet chosen() {
  const std::vector<InstructionSet> sets = supported_sets();
  if (const char* wanted = std::getenv("JAXNORM_ISA"))
    for (const InstructionSet& set : sets)
      if (!std::strcmp(wanted, set.name)) return set;
  return sets.front();
}

const InstructionSet& instruction_set() {
  static const InstructionSet set = chosen();
  return set;
}

// Outputs at least this large will not stay in cache, so write them with non-temporal stores.
constexpr int64_t nontemporal_bytes = int64_t(4) << 20;

struct Invalid {
  std::string what;
};

void require(bool holds, const char* what) {
  if (!holds) throw Invalid{std::string("jaxnorm: ") + what};
}

Type type_of(const ffi::AnyBuffer& a) {
  switch (a.element_type()) {
    case ffi::DataType::F32: return Type::f32;
    case ffi::DataType::BF16: return Type::bf16;
    case ffi::DataType::F16: return Type::f16;
    case ffi::DataType::F64: return Type::f64;
    default: throw Invalid{"jaxnorm: an array is not float16, bfloat16, float32 or float64"};
  }
}

View view_of(ffi::Span<const int64_t> dims) {
  require(dims.size() == 6, "a view has six sizes");
  int64_t size = 1;
  for (int64_t n : dims) {
    require(n >= 0 && (n == 0 || size <= std::numeric_limits<int64_t>::max() / 64 / n), "a size is out of range");
    size *= n == 0 ? 1 : n;
  }
  return {dims[0], dims[1], dims[2], dims[3], dims[4], dims[5]};
}

// What the attributes say; the same of every handler.
struct Call {
  View view;
  double count, epsilon, prescale;
  bool centered, cast_before_scale;
};

// A buffer's data, once its size and type are what they must be.
void* checked(const ffi::AnyBuffer& a, int64_t size, Type type, const char* what) {
  require(int64_t(a.element_count()) == size, what);
  require(type_of(a) == type, what);
  return a.untyped_data();
}

// The weights of a call, and what they are, by their number and type: bytes are those of a mask.
template <class A> void place_weights(Job& job, const ffi::AnyBuffer& a) {
  const View& v = job.view;
  const int64_t number = int64_t(a.element_count());
  const bool mask = a.element_type() == ffi::DataType::PRED;
  require(mask || type_of(a) == (std::is_same_v<A, double> ? Type::f64 : Type::f32),
          "weights are booleans, or of the accumulator's type");
  if (number == v.size()) job.weighting = mask ? Weighting::bytes : Weighting::values;
  else if (mask && v.S == 1 && number == v.statistics()) job.weighting = Weighting::rows;
  else if (!mask && v.S != 1 && number == v.B * v.N * v.S) job.weighting = Weighting::lines;
  else require(false, "there is a weight for each element, a byte for each row, or a number for each line");
  job.weights = a.untyped_data();
}

// The buffers of one call, checked as they are asked for by name.
template <class A> struct Arrays {
  const View& v;
  Type x, y;

  using Accumulator = A;
  static constexpr Type accumulated = std::is_same_v<A, double> ? Type::f64 : Type::f32;

  void* of_x(const ffi::AnyBuffer& a) const { return checked(a, v.size(), x, "x and dx have the view's size and x's type"); }
  void* of_y(const ffi::AnyBuffer& a) const { return checked(a, v.size(), y, "y and its cotangent have the view's size and y's type"); }
  A* statistic(const ffi::AnyBuffer& a) const {
    return static_cast<A*>(checked(a, v.statistics(), accumulated, "a statistic has a value for each group, of the accumulator's type"));
  }
  A* parameter(const ffi::AnyBuffer& a) const {  // null where it is absent, which is an array of no elements
    if (a.element_count() == 0) return require(type_of(a) == accumulated, "a parameter has the accumulator's type"), nullptr;
    return gradient(a);
  }
  A* gradient(const ffi::AnyBuffer& a) const {
    return static_cast<A*>(checked(a, v.parameters(), accumulated, "a parameter has a value for each of (B, G, D), of the accumulator's type"));
  }
};

// Finds the kernels for x and y, and calls run(arrays, job, kernels, threads) with errors turned into the call's.
template <class Run>
ffi::Error run(const Call& call, const ffi::ThreadPool& pool, const ffi::AnyBuffer& x, Type y, Run body) {
  try {
    const Type in = type_of(x);
    ffi::ThreadPool own = pool;
    const Threads threads(own.num_threads(), [&own](std::function<void()> task) { own.Schedule(std::move(task)); });
    Job job;
    job.view = call.view, job.count = call.count, job.epsilon = call.epsilon, job.prescale = call.prescale;
    job.centered = call.centered, job.cast_before_scale = call.cast_before_scale;
    const auto with = [&](auto zero, const auto* kernels) {
      using A = decltype(zero);
      require(kernels != nullptr, "there is no kernel for this pair of dtypes");
      const Arrays<A> arrays{job.view, in, y};
      job.x = arrays.of_x(x);
      body(arrays, job, *kernels, threads);
    };
    if (in == Type::f64) with(double(0), instruction_set().of_double(in, y));
    else with(float(0), instruction_set().of_float(in, y));
    return ffi::Error::Success();
  } catch (const Invalid& error) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, error.what);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jaxnorm: no memory for partial sums");
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string("jaxnorm: ") + error.what());
  }
}

// The arguments that every handler has, and how they are bound.
#define JN_CALL                                                                                                \
  ffi::ThreadPool pool, ffi::Span<const int64_t> dims, double count, double epsilon, double prescale, bool centered, \
      bool cast_before_scale
#define JN_BIND                                                                                              \
  ffi::Ffi::Bind()                                                                                           \
      .Ctx<ffi::ThreadPool>()                                                                                \
      .Attr<ffi::Span<const int64_t>>("view")                                                                \
      .Attr<double>("count")                                                                                 \
      .Attr<double>("epsilon")                                                                               \
      .Attr<double>("prescale")                                                                                  \
      .Attr<bool>("centered")                                                                                \
      .Attr<bool>("cast_before_scale")
#define JN_BODY [&](const auto& arrays, Job & job, const auto& kernels, const Threads& threads)

using In = const ffi::AnyBuffer&;
using Out = ffi::Result<ffi::AnyBuffer>;

template <class Body> ffi::Error guarded(JN_CALL, In x, const ffi::AnyBuffer* y, Body body) {
  try {
    return run({view_of(dims), count, epsilon, prescale, centered, cast_before_scale}, pool, x, type_of(y ? *y : x), body);
  } catch (const Invalid& error) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, error.what);
  }
}
#define JN_ARGS pool, dims, count, epsilon, prescale, centered, cast_before_scale

template <class Arrays> void place_statistics(Job& job, const Arrays& arrays, In mean_hi, In mean_lo, In m2) {
  job.mean_hi = arrays.statistic(mean_hi), job.mean_lo = arrays.statistic(mean_lo), job.m2 = arrays.statistic(m2);
}

void place_output(Job& job, void* out, In buffer) {
  job.out = out, job.nontemporal = int64_t(buffer.size_bytes()) >= nontemporal_bytes;
}

using More = ffi::RemainingArgs;
using MoreOut = ffi::RemainingRets;

// What further operands there are: none; or the weights, and the counts that belong to them, if these are not an output.
// A row that is absent here may be present on another device, so only a whole pass takes bytes for rows.
template <class Arrays>
void place_further(Job& job, const Arrays& arrays, More more, const MoreOut* out, bool whole = false) {
  if (more.size() == 0) return require(!out || out->size() == 0, "counts are an output where there are weights");
  require(more.size() == (out ? 1 : 2) && (!out || out->size() == 1), "weights come with their counts");
  place_weights<typename Arrays::Accumulator>(job, more.get<ffi::AnyBuffer>(0).value());
  require(whole || job.weighting != Weighting::rows, "a part of a pass takes a weight for each element or line");
  job.counts = arrays.statistic(out ? **out->get<ffi::AnyBuffer>(0) : more.get<ffi::AnyBuffer>(1).value());
}

ffi::Error forward(JN_CALL, ffi::AnyBuffer x, ffi::AnyBuffer scale, ffi::AnyBuffer bias, More more, Out y, Out mean_hi,
                   Out mean_lo, Out m2, MoreOut out) {
  return guarded(JN_ARGS, x, &*y, JN_BODY {
    place_output(job, arrays.of_y(*y), *y), place_statistics(job, arrays, *mean_hi, *mean_lo, *m2);
    place_further(job, arrays, more, &out, true);
    job.scale = arrays.parameter(scale), job.bias = arrays.parameter(bias);
    Norm(job, kernels, threads).forward();
  });
}

ffi::Error quantize(JN_CALL, int64_t kind, int64_t rule, int64_t block, double inverse, double upper, double floor,
                    int64_t exponent, int64_t rounding, bool round_first, ffi::AnyBuffer x, ffi::AnyBuffer scale,
                    ffi::AnyBuffer bias, ffi::AnyBuffer given, Out data, Out found, Out mean_hi, Out mean_lo, Out m2) {
  return run({view_of(dims), count, epsilon, prescale, centered, cast_before_scale}, pool, x, Type::f32, JN_BODY {
    require(job.view.S == 1 && job.view.size() > 0, "rows are quantized, and there is an element at least");
    require(0 <= kind && kind <= 2 && 0 <= rule && rule <= 3 && 0 <= rounding && rounding <= 2, "an unknown format");
    require(block > 0 && job.view.row() % block == 0, "blocks divide a row");
    Quantizer q;
    q.kind = Quantizer::Kind(kind), q.rule = Quantizer::Rule(rule), q.block = block, q.exponent = int32_t(exponent);
    q.inverse = float(inverse), q.upper = float(upper), q.floor = float(floor);
    q.rounding = Type(rounding), q.round_first = round_first;
    const bool comes = q.rule == Quantizer::given, powers = q.rule >= Quantizer::power_up;
    const int64_t values = comes ? job.view.statistics() : job.view.size() / block;
    require(int64_t(data->element_count()) == job.view.size() && data->size_bytes() == data->element_count(),
            "data has the view's size, in bytes");
    require(int64_t(found->size_bytes()) == values * (powers ? 1 : 4), "there is a scale for each block");
    require(int64_t(given.element_count()) == (comes ? values : 0) && type_of(given) == Type::f32,
            "a scale that is given is one for each row, in float32");
    q.found = found->untyped_data(), q.scales = static_cast<const float*>(given.untyped_data());
    job.out = data->untyped_data(), place_statistics(job, arrays, *mean_hi, *mean_lo, *m2);
    job.scale = arrays.parameter(scale), job.bias = arrays.parameter(bias);
    require(kernels.rows_quantize != nullptr, "there is no kernel for float64");
    Norm(job, kernels, threads).quantize(q);
  });
}

ffi::Error moments(JN_CALL, ffi::AnyBuffer x, More more, Out mean_hi, Out mean_lo, Out m2, MoreOut out) {
  return guarded(JN_ARGS, x, nullptr, JN_BODY {
    place_statistics(job, arrays, *mean_hi, *mean_lo, *m2), place_further(job, arrays, more, &out);
    Norm(job, kernels, threads).moments();
  });
}

ffi::Error normalize(JN_CALL, ffi::AnyBuffer x, ffi::AnyBuffer mean_hi, ffi::AnyBuffer mean_lo, ffi::AnyBuffer m2,
                     ffi::AnyBuffer scale, ffi::AnyBuffer bias, More more, Out y) {
  return guarded(JN_ARGS, x, &*y, JN_BODY {
    place_output(job, arrays.of_y(*y), *y), place_statistics(job, arrays, mean_hi, mean_lo, m2);
    place_further(job, arrays, more, nullptr);
    job.scale = arrays.parameter(scale), job.bias = arrays.parameter(bias);
    Norm(job, kernels, threads).normalize();
  });
}

ffi::Error backward(JN_CALL, ffi::AnyBuffer x, ffi::AnyBuffer g, ffi::AnyBuffer mean_hi, ffi::AnyBuffer mean_lo,
                    ffi::AnyBuffer m2, ffi::AnyBuffer scale, More more, Out dx, Out dscale, Out dbias) {
  return guarded(JN_ARGS, x, &g, JN_BODY {
    place_output(job, arrays.of_x(*dx), *dx), place_statistics(job, arrays, mean_hi, mean_lo, m2);
    place_further(job, arrays, more, nullptr, true);
    job.g = arrays.of_y(g), job.scale = arrays.parameter(scale);
    Norm(job, kernels, threads).backward(arrays.gradient(*dscale), arrays.gradient(*dbias));
  });
}

ffi::Error gradient_sums(JN_CALL, ffi::AnyBuffer x, ffi::AnyBuffer g, ffi::AnyBuffer mean_hi, ffi::AnyBuffer mean_lo,
                         ffi::AnyBuffer m2, ffi::AnyBuffer scale, More more, Out h, Out hx, Out dscale, Out dbias) {
  return guarded(JN_ARGS, x, &g, JN_BODY {
    place_statistics(job, arrays, mean_hi, mean_lo, m2);
    place_further(job, arrays, more, nullptr);
    job.g = arrays.of_y(g), job.scale = arrays.parameter(scale);
    Norm(job, kernels, threads)
        .gradient_sums(arrays.statistic(*h), arrays.statistic(*hx), arrays.gradient(*dscale), arrays.gradient(*dbias));
  });
}

ffi::Error gradient(JN_CALL, ffi::AnyBuffer x, ffi::AnyBuffer g, ffi::AnyBuffer mean_hi, ffi::AnyBuffer mean_lo,
                    ffi::AnyBuffer m2, ffi::AnyBuffer scale, ffi::AnyBuffer h, ffi::AnyBuffer hx, More more, Out dx) {
  return guarded(JN_ARGS, x, &g, JN_BODY {
    place_output(job, arrays.of_x(*dx), *dx), place_statistics(job, arrays, mean_hi, mean_lo, m2);
    place_further(job, arrays, more, nullptr);
    job.g = arrays.of_y(g), job.scale = arrays.parameter(scale);
    Norm(job, kernels, threads).gradient(arrays.statistic(h), arrays.statistic(hx));
  });
}

// Norms of segments: x is lines of one slab, each with an id. A table has a row for each segment, and one for absent lines.
template <class Arrays, class Kernels, class Accumulator = typename Arrays::Accumulator>
Segments<Accumulator> segments_of(const Arrays& arrays, const Job& job, const Kernels& kernels, const Threads& threads,
                                  In ids, int64_t number) {
  const View& v = arrays.v;
  require(v.B == 1 && v.N == 1 && v.P == 1, "segments are of lines of one slab");
  require(number >= 1 && number <= std::numeric_limits<int32_t>::max(), "the number of segments is out of range");
  require(ids.element_type() == ffi::DataType::S32 && int64_t(ids.element_count()) == v.S,
          "there is an id for each line, of 32 bits");
  return Segments<Accumulator>(job, kernels, threads, static_cast<const int32_t*>(ids.untyped_data()), number);
}

template <class Arrays> typename Arrays::Accumulator* table(const Arrays& arrays, In a, int64_t rows, int64_t columns) {
  return static_cast<typename Arrays::Accumulator*>(
      checked(a, rows * columns, Arrays::accumulated, "a table has a row for each segment, of the accumulator's type"));
}

template <class Arrays> void place_segments(Job& job, const Arrays& arrays, int64_t number, In mean_hi, In mean_lo, In m2, In counts) {
  const auto of = [&](In a) { return table(arrays, a, number, job.view.G); };
  job.mean_hi = of(mean_hi), job.mean_lo = of(mean_lo), job.m2 = of(m2), job.counts = of(counts);
}

ffi::Error segment_forward(JN_CALL, int64_t segments, ffi::AnyBuffer x, ffi::AnyBuffer ids, ffi::AnyBuffer scale,
                           ffi::AnyBuffer bias, Out y, Out mean_hi, Out mean_lo, Out m2, Out counts) {
  return guarded(JN_ARGS, x, &*y, JN_BODY {
    place_output(job, arrays.of_y(*y), *y), place_segments(job, arrays, segments, *mean_hi, *mean_lo, *m2, *counts);
    job.scale = arrays.gradient(scale), job.bias = arrays.gradient(bias);
    segments_of(arrays, job, kernels, threads, ids, segments).forward();
  });
}

ffi::Error segment_backward(JN_CALL, int64_t segments, ffi::AnyBuffer x, ffi::AnyBuffer g, ffi::AnyBuffer ids,
                            ffi::AnyBuffer mean_hi, ffi::AnyBuffer mean_lo, ffi::AnyBuffer m2, ffi::AnyBuffer counts,
                            ffi::AnyBuffer scale, Out dx, Out dscale, Out dbias) {
  return guarded(JN_ARGS, x, &g, JN_BODY {
    place_output(job, arrays.of_x(*dx), *dx), place_segments(job, arrays, segments, mean_hi, mean_lo, m2, counts);
    job.g = arrays.of_y(g), job.scale = arrays.gradient(scale);
    segments_of(arrays, job, kernels, threads, ids, segments).backward(arrays.gradient(*dscale), arrays.gradient(*dbias));
  });
}

ffi::Error segment_moments(JN_CALL, int64_t segments, ffi::AnyBuffer x, ffi::AnyBuffer ids, Out mean_hi, Out mean_lo,
                           Out m2, Out counts) {
  return guarded(JN_ARGS, x, nullptr, JN_BODY {
    place_segments(job, arrays, segments, *mean_hi, *mean_lo, *m2, *counts);
    segments_of(arrays, job, kernels, threads, ids, segments).moments();
  });
}

ffi::Error segment_normalize(JN_CALL, int64_t segments, ffi::AnyBuffer x, ffi::AnyBuffer ids, ffi::AnyBuffer shift,
                             ffi::AnyBuffer r, ffi::AnyBuffer a, ffi::AnyBuffer b, Out y) {
  return guarded(JN_ARGS, x, &*y, JN_BODY {
    const auto of = [&](In from) { return table(arrays, from, segments + 1, job.view.columns()); };
    place_output(job, arrays.of_y(*y), *y);
    segments_of(arrays, job, kernels, threads, ids, segments).normalize(of(shift), of(r), of(a), of(b));
  });
}

ffi::Error segment_gradient_sums(JN_CALL, int64_t segments, ffi::AnyBuffer x, ffi::AnyBuffer g, ffi::AnyBuffer ids,
                                 ffi::AnyBuffer shift, ffi::AnyBuffer r, Out of_gu, Out of_g) {
  return guarded(JN_ARGS, x, &g, JN_BODY {
    const auto of = [&](In from) { return table(arrays, from, segments + 1, job.view.columns()); };
    job.g = arrays.of_y(g);
    segments_of(arrays, job, kernels, threads, ids, segments).gradient_sums(of(shift), of(r), of(*of_gu), of(*of_g));
  });
}

ffi::Error segment_gradient(JN_CALL, int64_t segments, ffi::AnyBuffer x, ffi::AnyBuffer g, ffi::AnyBuffer ids,
                            ffi::AnyBuffer shift, ffi::AnyBuffer r, ffi::AnyBuffer a, ffi::AnyBuffer p,
                            ffi::AnyBuffer q, Out dx) {
  return guarded(JN_ARGS, x, &g, JN_BODY {
    const auto of = [&](In from) { return table(arrays, from, segments + 1, job.view.columns()); };
    place_output(job, arrays.of_x(*dx), *dx), job.g = arrays.of_y(g);
    segments_of(arrays, job, kernels, threads, ids, segments).gradient(of(shift), of(r), of(a), of(p), of(q));
  });
}

}  // namespace
}  // namespace jaxnorm

#define JN_IN(n) JN_IN##n
#define JN_IN1 .Arg<ffi::AnyBuffer>()
#define JN_IN2 JN_IN1 JN_IN1
#define JN_IN3 JN_IN1 JN_IN1 JN_IN1
#define JN_IN4 JN_IN3 JN_IN1
#define JN_IN5 JN_IN4 JN_IN1
#define JN_IN6 JN_IN3 JN_IN3
#define JN_IN8 JN_IN6 JN_IN1 JN_IN1
#define JN_OUT1 .Ret<ffi::AnyBuffer>()
#define JN_OUT2 JN_OUT1 JN_OUT1
#define JN_OUT3 JN_OUT1 JN_OUT1 JN_OUT1
#define JN_OUT4 JN_OUT3 JN_OUT1
#define JN_OUT5 JN_OUT4 JN_OUT1
#define JN_FORMAT                                                                                                  \
  .Attr<int64_t>("kind").Attr<int64_t>("rule").Attr<int64_t>("block").Attr<double>("inverse").Attr<double>("upper") \
      .Attr<double>("floor").Attr<int64_t>("exponent").Attr<int64_t>("rounding").Attr<bool>("round_first")
#define JN_SEGMENTS .Attr<int64_t>("segments")
#define JN_MORE .RemainingArgs()
#define JN_MORE_OUT .RemainingRets()
#define JN_SYMBOL extern "C" __attribute__((visibility("default")))
#define JN_HANDLER(name, in, out)                                   \
  JN_SYMBOL XLA_FFI_Error* jaxnorm_##name(XLA_FFI_CallFrame* frame); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxnorm_##name, jaxnorm::name, JN_BIND in out)

JN_HANDLER(forward, JN_IN3 JN_MORE, JN_OUT4 JN_MORE_OUT);
JN_HANDLER(quantize, JN_FORMAT JN_IN4, JN_OUT5);
JN_HANDLER(moments, JN_IN1 JN_MORE, JN_OUT3 JN_MORE_OUT);
JN_HANDLER(normalize, JN_IN6 JN_MORE, JN_OUT1);
JN_HANDLER(backward, JN_IN6 JN_MORE, JN_OUT3);
JN_HANDLER(gradient_sums, JN_IN6 JN_MORE, JN_OUT4);
JN_HANDLER(gradient, JN_IN8 JN_MORE, JN_OUT1);
JN_HANDLER(segment_forward, JN_SEGMENTS JN_IN4, JN_OUT5);
JN_HANDLER(segment_backward, JN_SEGMENTS JN_IN8, JN_OUT3);
JN_HANDLER(segment_moments, JN_SEGMENTS JN_IN2, JN_OUT4);
JN_HANDLER(segment_normalize, JN_SEGMENTS JN_IN6, JN_OUT1);
JN_HANDLER(segment_gradient_sums, JN_SEGMENTS JN_IN5, JN_OUT2);
JN_HANDLER(segment_gradient, JN_SEGMENTS JN_IN8, JN_OUT1);

JN_SYMBOL const char* jaxnorm_instruction_set() { return jaxnorm::instruction_set().name; }

// The names of the instruction sets that this processor supports, the best one first, each followed by a space.
JN_SYMBOL const char* jaxnorm_instruction_sets() {
  static const std::string names = [] {
    std::string all;
    for (const auto& set : jaxnorm::supported_sets()) all += std::string(set.name) + ' ';
    return all;
  }();
  return names.c_str();
}

// The version of XLA's FFI that the handlers above were compiled for. Python compares it with that of jaxlib.
JN_SYMBOL const int* jaxnorm_ffi_version() {
  static const int version[] = {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
  return version;
}
