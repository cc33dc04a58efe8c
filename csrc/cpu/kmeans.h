// Levels of least weighted squared error for every row of a matrix: k-means of numbers on a line, to the optimum.
//
// On a line the cells are intervals of the sorted numbers, so the best split follows by dynamic programming over
// (levels used, numbers covered); Wang and Song, "Ckmeans.1d.dp", The R Journal 3(2), 2011. The best last cell starts
// no earlier for more numbers or more levels (the cost obeys the quadrangle inequality), so a layer of the program is
// solved by halving: n log n steps in place of n^2.
#pragma once

#include <cstdint>

namespace bitpalette {

// levels [rows, entries], ascending, for values [rows, n] with weights [rows, n], both finite and weights not negative
// (their absolute size does not matter; below 1e-12 of a row's largest they count as that). A row of fewer distinct
// numbers than entries is kept exactly, its largest number repeated. On up to `threads` threads; the result does not
// depend on them. std::invalid_argument for sizes below 1.
void kmeans_rows(const float* values, const float* weights, int64_t rows, int64_t n, int64_t entries, float* levels,
                 int threads);

} // namespace bitpalette
