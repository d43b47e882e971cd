// supcon for Python: one panel of similarities at a time, its rows or columns shared between threads.
#include <algorithm>
#include <limits>
#include <vector>

#include "bindings.h"
#include "kernels.h"
#include "parallel.h"

namespace py = pybind11;

namespace fusedloss {
namespace {

// A SupConPanel as Python fills it in: addresses, 0 where there is nothing.
struct PanelArguments {
    bool is_double = false;
    uintptr_t similarity = 0;
    int64_t first = 0, rows = 0, columns = 0;
    uintptr_t codes = 0, mask = 0, mask_back = 0;
    double common_shift = 0;
    uintptr_t row_shift = 0, negative_weight = 0, positive_weight = 0, share = 0;

    template <class T>
    SupConPanel<T> view() const {
        SupConPanel<T> panel;
        panel.similarity = pointer<T>(similarity);
        panel.first = first;
        panel.rows = rows;
        panel.columns = columns;
        panel.codes = pointer<const int32_t>(codes);
        panel.mask = pointer<const uint8_t>(mask);
        panel.mask_back = pointer<const uint8_t>(mask_back);
        panel.common_shift = T(common_shift);
        panel.row_shift = pointer<T>(row_shift);
        panel.negative_weight = pointer<const T>(negative_weight);
        panel.positive_weight = pointer<const T>(positive_weight);
        panel.share = pointer<const T>(share);
        return panel;
    }
};

template <class T>
void supcon_maxima(const PanelArguments& arguments, int64_t num_anchors, int threads) {
    const SupConPanel<T> panel = arguments.view<T>();
    py::gil_scoped_release release;
    threads = useful_threads(panel.rows * panel.columns, panel.rows, threads);
    std::vector<T> maxima(panel.columns * threads, -std::numeric_limits<T>::infinity());
    const auto kernel = kernels().supcon<T>().maxima;
    parallel_ranges(panel.rows, threads, [&](int64_t first, int64_t last, int thread) {
        kernel(panel, panel.first + first, panel.first + last, maxima.data() + panel.columns * thread);
    });
    // Columns that are no anchors have no sums and need no shift.
    const int64_t anchor_columns = std::min(panel.columns, num_anchors - panel.first);
    for (int thread = 0; thread < threads; ++thread)
        for (int64_t j = 0; j < anchor_columns; ++j) {
            T& top = panel.row_shift[panel.first + j];
            top = std::max(top, maxima[panel.columns * thread + j]);
        }
}

// Columns of a tile: enough tiles for several threads. It must not follow from their number, or sums would.
int64_t tile_columns(int64_t columns) {
    constexpr int64_t kTiles = 8, kFewest = 256, kMultiple = 64;
    const int64_t rounded = (columns / kTiles + kMultiple - 1) / kMultiple * kMultiple;
    return std::min(std::max(rounded, kFewest), kSupConTileColumns);
}

// Adds to `total`, one value per column of all panels.
template <class T>
void supcon_sums(const PanelArguments& arguments, SupConSums total, int threads) {
    const SupConPanel<T> panel = arguments.view<T>();
    py::gil_scoped_release release;
    // The first column has no pair above the diagonal.
    const int64_t begin = panel.first + 1, width = tile_columns(panel.columns);
    const int64_t tiles = (panel.last() - begin + width - 1) / width;
    std::vector<double> row_sums(tiles * 2 * panel.rows);
    const auto kernel = kernels().supcon<T>().sums;
    threads = useful_threads(panel.rows * panel.columns, tiles, threads);
    parallel_ranges(tiles, threads, [&](int64_t first, int64_t last, int) {
        for (int64_t tile = first; tile < last; ++tile) {
            double* rows = row_sums.data() + tile * 2 * panel.rows;
            const int64_t start = begin + tile * width;
            kernel(panel, start, std::min(start + width, panel.last()), {rows, rows + panel.rows}, total);
        }
    });
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const double* rows = row_sums.data() + tile * 2 * panel.rows;
        for (int64_t i = 0; i < panel.rows; ++i) {
            total.exponentials[panel.first + i] += rows[i];
            total.positives[panel.first + i] += rows[panel.rows + i];
        }
    }
}

// Returns the sum of gradient * (s - shift).
template <class T>
double supcon_backward(const PanelArguments& arguments, SupConCoefficients<T> coefficients, int threads) {
    const SupConPanel<T> panel = arguments.view<T>();
    py::gil_scoped_release release;
    threads = useful_threads(panel.rows * panel.columns, panel.rows, threads);
    std::vector<double> moments(panel.rows);
    const auto kernel = kernels().supcon<T>().backward;
    parallel_ranges(panel.rows, threads, [&](int64_t first, int64_t last, int) {
        for (int64_t i = first; i < last; ++i)
            moments[i] = kernel(panel, panel.first + i, panel.first + i + 1, coefficients);
    });
    double total = 0;
    for (const double moment : moments) total += moment;
    return total;
}

}  // namespace

void bind_supcon(py::module_& module) {
    py::class_<PanelArguments>(module, "SupConPanel")
        .def(py::init<>())
        .def_readwrite("is_double", &PanelArguments::is_double)
        .def_readwrite("similarity", &PanelArguments::similarity)
        .def_readwrite("first", &PanelArguments::first)
        .def_readwrite("rows", &PanelArguments::rows)
        .def_readwrite("columns", &PanelArguments::columns)
        .def_readwrite("codes", &PanelArguments::codes)
        .def_readwrite("mask", &PanelArguments::mask)
        .def_readwrite("mask_back", &PanelArguments::mask_back)
        .def_readwrite("common_shift", &PanelArguments::common_shift)
        .def_readwrite("row_shift", &PanelArguments::row_shift)
        .def_readwrite("negative_weight", &PanelArguments::negative_weight)
        .def_readwrite("positive_weight", &PanelArguments::positive_weight)
        .def_readwrite("share", &PanelArguments::share);
    module.def(
        "supcon_maxima",
        [](const PanelArguments& panel, int64_t num_anchors, int threads) {
            (panel.is_double ? supcon_maxima<double> : supcon_maxima<float>)(panel, num_anchors, threads);
        },
        py::arg("panel"), py::arg("num_anchors"), py::arg("threads"));
    module.def(
        "supcon_sums",
        [](const PanelArguments& panel, uintptr_t exponentials, uintptr_t positives, int threads) {
            const SupConSums total{pointer<double>(exponentials), pointer<double>(positives)};
            (panel.is_double ? supcon_sums<double> : supcon_sums<float>)(panel, total, threads);
        },
        py::arg("panel"), py::arg("exponentials"), py::arg("positives"), py::arg("threads"));
    module.def(
        "supcon_backward",
        [](const PanelArguments& panel, uintptr_t softmax, uintptr_t positive, int threads) {
            if (panel.is_double)
                return supcon_backward<double>(panel, {pointer<const double>(softmax), pointer<const double>(positive)},
                                               threads);
            return supcon_backward<float>(panel, {pointer<const float>(softmax), pointer<const float>(positive)},
                                          threads);
        },
        py::arg("panel"), py::arg("softmax"), py::arg("positive"), py::arg("threads"));
}

}  // namespace fusedloss
