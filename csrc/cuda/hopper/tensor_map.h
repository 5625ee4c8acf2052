// Descriptors of matrices for the tensor memory accelerator (TMA).
#pragma once
#include <cuda.h>  // types only: the encoder is looked up at run time, so nothing links libcuda

#include "../../dtype.h"

namespace pyunlearn {

// A row-major matrix of 2-byte elements, read or written in boxes of box_rows x box_columns, swizzled by the box's row
// length (64 columns: 128 bytes, 32: 64 bytes). What lies outside the matrix reads as zero and is not written. Recent
// descriptors are remembered. Returns null, or a sentence that says what is wrong.
const char* tensor_map(CUtensorMap* map, const void* data, Dtype dtype, int64_t rows, int64_t columns, int64_t stride,
                       int box_rows, int box_columns);

}  // namespace pyunlearn
