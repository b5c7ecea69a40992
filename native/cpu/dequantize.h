// Values of quantized rows: in vector code for types that ggml's own functions, used for the others, read
// slowly.

#pragma once

#include <cstdint>

#include "ggml.h"

namespace zo {

// Whether there is any way to read a type.
bool can_dequantize(ggml_type type);

// to[0 .. n) = the values of whole blocks that begin at `from`.
void dequantize(ggml_type type, const char * from, int64_t n, float * to);

}  // namespace zo
