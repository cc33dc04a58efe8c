// How a launcher finds the instance of its kernel for a type or format that is known at run time.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "container.cuh"

namespace bitpalette {

template <Format F>
using FormatIs = std::integral_constant<Format, F>;
template <Dtype D>
using DtypeIs = std::integral_constant<Dtype, D>;

// call(DtypeIs<dtype>()): the instance for a type that is known at run time.
template <class Call>
int with_dtype(Dtype dtype, Call call) {
    switch (dtype) {
    case Dtype::f32:
        return call(DtypeIs<Dtype::f32>());
    case Dtype::f16:
        return call(DtypeIs<Dtype::f16>());
    case Dtype::bf16:
        return call(DtypeIs<Dtype::bf16>());
    }
    throw std::invalid_argument("no type of activations has number " + std::to_string(static_cast<int>(dtype)));
}

// call(FormatIs<format>()), likewise.
template <class Call>
int with_format(Format format, Call call) {
    switch (format) {
    case Format::int2:
        return call(FormatIs<Format::int2>());
    case Format::int3:
        return call(FormatIs<Format::int3>());
    case Format::int4:
        return call(FormatIs<Format::int4>());
    case Format::int8:
        return call(FormatIs<Format::int8>());
    case Format::progressive:
        return call(FormatIs<Format::progressive>());
    case Format::lut2:
        return call(FormatIs<Format::lut2>());
    case Format::lut3:
        return call(FormatIs<Format::lut3>());
    case Format::lut4:
        return call(FormatIs<Format::lut4>());
    case Format::e4m3:
        return call(FormatIs<Format::e4m3>());
    case Format::trellis:
        return call(FormatIs<Format::trellis>());
    }
    throw std::invalid_argument("no packed format has number " + std::to_string(static_cast<int>(format)));
}

} // namespace bitpalette
