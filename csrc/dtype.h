// The element types that cross the Python boundary, and the narrow ones as plain structs that every compiler has.
#pragma once
#include <cstdint>

namespace pyunlearn {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

}  // namespace pyunlearn
