// class_stats for Python: checks labels, orders the rows by class, runs the segments over threads.
#include <algorithm>
#include <string>
#include <vector>

#include "bindings.h"
#include "kernels.h"
#include "parallel.h"

namespace py = pybind11;

namespace fusedloss {
namespace {

struct Labels {
    const int64_t* data;
    int64_t rows, ignore_index;
};

// Where each class starts in the order by class, (K + 1,); an IndexError for a label outside [0, K).
std::vector<int64_t> class_offsets(const Labels& labels, int64_t num_classes) {
    std::vector<int64_t> offset(num_classes + 1, 0);
    for (int64_t row = 0; row < labels.rows; ++row) {
        const int64_t label = labels.data[row];
        if (label == labels.ignore_index) continue;
        if (label < 0 || label >= num_classes)
            throw py::index_error("labels must lie in [0, " + std::to_string(num_classes) + ") or be ignore_index=" +
                                  std::to_string(labels.ignore_index) + "; got label " + std::to_string(label) +
                                  " at row " + std::to_string(row));
        ++offset[label + 1];
    }
    for (int64_t label = 0; label < num_classes; ++label) offset[label + 1] += offset[label];
    return offset;
}

std::vector<int64_t> rows_by_class(const Labels& labels, std::vector<int64_t> offset) {
    std::vector<int64_t> order(offset.back());
    for (int64_t row = 0; row < labels.rows; ++row)
        if (labels.data[row] != labels.ignore_index) order[offset[labels.data[row]]++] = row;
    return order;
}

// The classes cut into segments of about the same length, the same for any number of threads.
struct Plan {
    std::vector<ClassSegment> segments;
    int64_t num_partials = 0;

    explicit Plan(const std::vector<int64_t>& offset) {
        const int64_t num_classes = int64_t(offset.size()) - 1;
        const int64_t longest = std::clamp<int64_t>(offset.back() / 256, 64, 1024);
        segments.reserve(num_classes + offset.back() / longest);
        for (int64_t label = 0; label < num_classes; ++label) {
            const int64_t first = offset[label], rows = offset[label + 1] - first;
            const int64_t pieces = std::max<int64_t>(1, (rows + longest - 1) / longest);
            for (int64_t piece = 0; piece < pieces; ++piece)
                segments.push_back({label, first + rows * piece / pieces, first + rows * (piece + 1) / pieces,
                                    pieces == 1 ? -1 : num_partials++});
        }
    }

    // The first segment of a share of the work; writing a class costs about as much as adding a row.
    int64_t boundary(int64_t share, int64_t shares) const {
        const int64_t count = int64_t(segments.size());
        if (share == shares) return count;
        const int64_t goal = (segments.back().last + count) * share / shares;
        int64_t low = 0, high = count;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (segments[middle].first + middle < goal) low = middle + 1;
            else high = middle;
        }
        return low;
    }
};

// A class that has no mean yet is measured from its first row.
template <class T>
void start_new_classes(const ClassStats<T>& call, const std::vector<int64_t>& offset, const int64_t* seen) {
    for (int64_t label = 0; label + 1 < int64_t(offset.size()); ++label)
        if (seen[label] == 0 && offset[label + 1] > offset[label])
            kernels().class_stats<T>().widen(call, call.order[offset[label]], call.shift + label * call.width());
}

template <class T>
void add_partials(const ClassStats<T>& call, const Plan& plan) {
    const int64_t size = call.slot_size();
    for (size_t index = 0; index < plan.segments.size();) {
        const ClassSegment& segment = plan.segments[index++];
        if (segment.partial < 0) continue;
        double* total = call.partials + segment.partial * size;
        for (; index < plan.segments.size() && plan.segments[index].label == segment.label; ++index) {
            const double* partial = call.partials + plan.segments[index].partial * size;
            for (int64_t j = 0; j < size; ++j) total[j] += partial[j];
        }
        kernels().class_stats<T>().write(call, segment.label, total);
    }
}

// state: addresses (shift, seen); outputs: addresses (count, sum, square).
template <class T>
void class_stats(const py::object& features, const Labels& labels, int64_t num_classes, bool per_feature,
                 const py::tuple& state, const py::tuple& outputs, int threads) {
    ClassStats<T> call;
    call.features = view_of(features);
    call.per_feature = per_feature;
    call.shift = pointer<T>(state[0].cast<uintptr_t>());
    const int64_t* seen = pointer<const int64_t>(state[1].cast<uintptr_t>());
    int64_t* count = pointer<int64_t>(outputs[0].cast<uintptr_t>());
    call.sum = pointer<T>(outputs[1].cast<uintptr_t>());
    call.square = pointer<T>(outputs[2].cast<uintptr_t>());

    py::gil_scoped_release release;
    const std::vector<int64_t> offset = class_offsets(labels, num_classes);
    for (int64_t label = 0; label < num_classes; ++label) count[label] = offset[label + 1] - offset[label];
    if (num_classes == 0) return;
    const std::vector<int64_t> order = rows_by_class(labels, offset);
    call.order = order.data();
    call.num_kept = int64_t(order.size());
    const Plan plan(offset);
    call.segments = plan.segments.data();
    threads = useful_threads((call.num_kept + num_classes) * call.width(), int64_t(plan.segments.size()), threads);
    std::vector<double> slots((plan.num_partials + threads) * call.slot_size());
    call.partials = slots.data();
    call.scratch = slots.data() + plan.num_partials * call.slot_size();
    start_new_classes(call, offset, seen);
    const auto kernel = kernels().class_stats<T>().sum;
    parallel_ranges(threads, threads, [&](int64_t first, int64_t last, int) {
        for (int64_t share = first; share < last; ++share)
            kernel(call, plan.boundary(share, threads), plan.boundary(share + 1, threads), int(share));
    });
    add_partials(call, plan);
}

// state: addresses (count, mean, scatter, variance or 0); found: addresses (rows, shift, sum, square).
template <class T>
void advance(const py::tuple& state, const py::tuple& found, int64_t num_classes, int64_t width, double momentum,
             int threads) {
    ClassAdvance<T> call;
    call.width = width;
    call.momentum = momentum;
    call.count = pointer<int64_t>(state[0].cast<uintptr_t>());
    call.mean = pointer<T>(state[1].cast<uintptr_t>());
    call.scatter = pointer<double>(state[2].cast<uintptr_t>());
    call.variance = pointer<T>(state[3].cast<uintptr_t>());
    call.rows = pointer<const int64_t>(found[0].cast<uintptr_t>());
    call.shift = pointer<const T>(found[1].cast<uintptr_t>());
    call.sum = pointer<T>(found[2].cast<uintptr_t>());
    call.square = pointer<T>(found[3].cast<uintptr_t>());

    py::gil_scoped_release release;
    threads = useful_threads(num_classes * width, num_classes, threads);
    parallel_ranges(num_classes, threads,
                    [&](int64_t first, int64_t last, int) { kernels().class_stats<T>().advance(call, first, last); });
}

template <class T>
void row_magnitudes(const View& rows, uintptr_t sum, int threads) {
    const RowMagnitudes<T> call{rows, pointer<T>(sum)};

    py::gil_scoped_release release;
    threads = useful_threads(rows.num_rows() * rows.num_classes, rows.num_rows(), threads);
    parallel_ranges(rows.num_rows(), threads, [&](int64_t first, int64_t last, int) {
        kernels().class_stats<T>().magnitudes(call, first, last);
    });
}

// Writes (count, mean, mean squared deviation) of the values whose label is kept; labels may be null.
template <class T>
void moments(const T* values, const Labels& labels, double* found) {
    py::gil_scoped_release release;
    int64_t count = 0;
    double sum = 0, square = 0;
    for (int64_t row = 0; row < labels.rows; ++row) {
        if (labels.data && labels.data[row] == labels.ignore_index) continue;
        ++count;
        sum += values[row];
    }
    const double mean = count == 0 ? 0 : sum / count;
    for (int64_t row = 0; row < labels.rows; ++row) {
        if (labels.data && labels.data[row] == labels.ignore_index) continue;
        square += (values[row] - mean) * (values[row] - mean);
    }
    found[0] = double(count);
    found[1] = mean;
    found[2] = count == 0 ? 0 : square / count;
}

}  // namespace

void bind_class_stats(py::module_& module) {
    module.def("class_stats", [](const py::object& features, const py::tuple& labels, int64_t num_classes,
                                 bool per_feature, const py::tuple& state, const py::tuple& outputs, int threads) {
        const View view = view_of(features);
        const auto* data = pointer<const int64_t>(labels[0].cast<uintptr_t>());
        const Labels given{data, view.outer_size, labels[1].cast<int64_t>()};
        const auto run = view.dtype == DType::float64 ? class_stats<double> : class_stats<float>;
        run(features, given, num_classes, per_feature, state, outputs, threads);
    });
    module.def("advance", [](bool is_double, const py::tuple& state, const py::tuple& found, int64_t num_classes,
                             int64_t width, double momentum, int threads) {
        (is_double ? advance<double> : advance<float>)(state, found, num_classes, width, momentum, threads);
    });
    module.def("row_magnitudes", [](const py::object& rows, uintptr_t sum, int threads) {
        const View view = view_of(rows);
        (view.dtype == DType::float64 ? row_magnitudes<double> : row_magnitudes<float>)(view, sum, threads);
    });
    module.def("moments", [](uintptr_t values, bool is_double, const py::tuple& labels, uintptr_t found) {
        const Labels given{pointer<const int64_t>(labels[0].cast<uintptr_t>()), labels[1].cast<int64_t>(),
                           labels[2].cast<int64_t>()};
        double* out = pointer<double>(found);
        if (is_double) moments(pointer<const double>(values), given, out);
        else moments(pointer<const float>(values), given, out);
    });
}

}  // namespace fusedloss
