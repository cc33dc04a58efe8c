#include "trellis_levels.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <tuple>

#include "trellis_code.h"

namespace bitpalette {
namespace {

constexpr std::align_val_t alignment{64};

struct Free {
    void operator()(int16_t* levels) const { ::operator delete(levels, alignment); }
};

using Table = std::unique_ptr<int16_t, Free>;

Table make_table(int fixed, int window, int lanes, int expand, int fold) {
    const size_t size = size_t{1} << window;
    Table table(static_cast<int16_t*>(::operator new(size * sizeof(int16_t), alignment)));
    int16_t* at = table.get();
    const int block = 1 << (window - fold), within = std::min(1 << expand, lanes), runs = lanes / within;
    for (int first = 0; first < block; first += lanes)
        for (int h = 0; h < 1 << fold; ++h)
            for (int lane = 0; lane < lanes; ++lane) {
                const int t = first + lane % runs * within + lane / runs;
                *at++ = static_cast<int16_t>(fixed * trellis_level(static_cast<uint32_t>(h * block + t)));
            }
    return table;
}

} // namespace

const int16_t* trellis_levels(int fixed, int window, int lanes, int expand, int fold) {
    static std::mutex mutex;
    static std::map<std::tuple<int, int, int, int, int>, Table> tables;
    if (lanes == 1)
        expand = fold = 0;
    const std::lock_guard<std::mutex> locked(mutex);
    Table& table = tables[{fixed, window, lanes, expand, fold}];
    if (table == nullptr)
        table = make_table(fixed, window, lanes, expand, fold);
    return table.get();
}

} // namespace bitpalette
