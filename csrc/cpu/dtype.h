// Types of activations.
#pragma once

namespace bitpalette {

enum class Dtype { f32 = 0, f16 = 1, bf16 = 2 };

} // namespace bitpalette
