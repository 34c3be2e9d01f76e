// The kernels for what every x86-64 has (SSE2), and for arm64 (NEON); see CMakeLists.txt for the flags that this file alone is compiled with.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "view.h"

namespace jaxnorm::baseline {
namespace {
#include "simd.h"
#include "kernels.h"
}  // namespace

extern const Table<float> float_table = table_float;
extern const Table<double> double_table = table_double;
}  // namespace jaxnorm::baseline
