// The kernels for AVX-512 (F, BW, VL, DQ); see CMakeLists.txt for the flags that this file alone is compiled with.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "view.h"

namespace jaxnorm::avx512 {
namespace {
#include "simd.h"
#include "kernels.h"
}  // namespace

extern const Table<float> float_table = table_float;
extern const Table<double> double_table = table_double;
}  // namespace jaxnorm::avx512
