// The kernels for AVX-512 with its bfloat16 instructions; see CMakeLists.txt for the flags that this file alone is compiled with.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "view.h"

namespace jaxnorm::avx512 {
extern const Table<float> float_table;
extern const Table<double> double_table;
}  // namespace jaxnorm::avx512

namespace jaxnorm::avx512bf16 {
namespace {
#include "simd.h"
#include "kernels.h"
}  // namespace

extern const Table<float> float_table = table_float;
extern const Table<double> double_table = table_double;
}  // namespace jaxnorm::avx512bf16
